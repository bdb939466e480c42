"""How many bytes of blocks may be written to nvme in a day: a disk wears out, and a limit that a restart forgets is none.

Bytes are counted by the hour in which they are planned, and the 25 hours before the present one count with it, so that no day,
whenever it begins, has more than the budget. What may be written is taken from the file in grants, before it is written: a
life that is killed loses the rest of its last grant, and the next one never writes too much. A power cut may lose what the file
system had not yet written of the file, which is some seconds of grants.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tierd.errors import Invalid
from tierd.log import get_logger

log = get_logger("endurance")
FILE = "nvme-writes.json"
FILE_BYTES_MAX = 4096
HOUR_MS, HOURS = 3_600_000, 26
GRANTS = 256
"""A grant is this part of the budget."""


class Endurance:
    """A budget of `bytes_per_day` (0: no limit), which the state directory remembers. Times are Unix milliseconds."""

    def __init__(self, state_dir: Path, bytes_per_day: int, now: int) -> None:
        self.bytes_per_day = bytes_per_day
        self._path = state_dir / FILE
        self._granted = 0
        """Bytes that the file counts as written in `_hour`, and that were not yet."""
        self._hour = 0
        self._is_spent = self._is_unnoted = False
        self._hours = until(now // HOUR_MS, self._read() if bytes_per_day else {})

    def left(self, wanted: int, now: int) -> int:
        """How many of `wanted` bytes may be written now."""
        if not self.bytes_per_day:
            return wanted
        hour = now // HOUR_MS
        if hour != self._hour:
            self._hours[self._hour] = self._hours.get(self._hour, 0) - self._granted
            self._hours = until(hour, self._hours)
            self._hour, self._granted = hour, 0
        if self._granted < wanted:
            self._grant(wanted - self._granted)
        return min(wanted, self._granted)

    def spend(self, number: int) -> None:
        """Bytes are being written, no more than were left."""
        if self.bytes_per_day:
            assert number <= self._granted, f"{number} bytes are written where {self._granted} may be"
            self._granted -= number

    def _grant(self, missing: int) -> None:
        most = self.bytes_per_day - sum(self._hours.values())
        grant = min(most, max(missing, self.bytes_per_day // GRANTS))
        if grant <= 0 and not self._is_spent:
            log.warning("the day's writes to nvme are spent", bytes_per_day=self.bytes_per_day)
        self._is_spent = grant <= 0
        if grant > 0:
            hours = {**self._hours, self._hour: self._hours.get(self._hour, 0) + grant}
            if self._write(hours):
                self._hours, self._granted = hours, self._granted + grant

    def _read(self) -> dict[int, int]:
        """The hours of earlier lives; Invalid when the file cannot be understood, since guessing could write too much."""
        try:
            with self._path.open(encoding="utf-8") as file:
                hours = json.loads(file.read(FILE_BYTES_MAX))["hours"]
            return {int(hour): max(0, int(number)) for hour, number in hours.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "remove it if the disk may take a whole day's writes now, or set nvme.write_bytes_per_day = 0"
            raise Invalid(f"{self._path} does not say what was written in the last day ({error}): {remedy}") from error

    def _write(self, hours: dict[int, int]) -> bool:
        """Replace the file whole, before anything is written on the strength of it."""
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps({"hours": hours}) + "\n", encoding="utf-8")
            os.replace(fresh, self._path)
        except OSError as error:
            if not self._is_unnoted:  # it is asked again at every commit
                log.warning("nothing is written to nvme: its budget cannot be noted", path=self._path, reason=error)
            self._is_unnoted = True
            return False
        self._is_unnoted = False
        return True


def until(hour: int, hours: dict[int, int]) -> dict[int, int]:
    """The hours that count in this one. Those that a wrong clock saw ahead of it are this one: else nothing would be written
    until they have come.
    """
    counted: dict[int, int] = {}
    for at, number in hours.items():
        if hour - HOURS < at:
            counted[min(at, hour)] = counted.get(min(at, hour), 0) + number
    return counted
