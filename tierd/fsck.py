"""Checking a state directory that no daemon uses: files, headers, directories, and every block against its digest.

Nothing is changed without `repair`. With it, what a daemon would remove or free at its next start is removed and freed now, and
so are blocks whose bytes are wrong: all of this is a cache, and what cannot be trusted is worth nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.errors import Invalid
from tierd.tiers.io import IoEngine
from tierd.tiers.nvme import DIRECTORY, READ_DAMAGED, READ_FAILED, SLOTS, UNFINISHED, FileSegment, read_header, slots_path
from tierd.tiers.state import StateDirectory
from tierd.tiers.verify import Verifier

SLOTS_SHOWN_MAX = 8
Numbers = NDArray[np.int32]


class Problem(NamedTuple):
    """Something that is not as it should be. Leftovers of a crash are no `damage`: nobody takes them for blocks."""

    path: Path
    what: str
    damage: bool
    repaired: bool


@dataclass
class Report:
    """What was found; `bytes` are of payloads that were read. `unfinished` rows (of a crash) and `stale` ones (of a purge) are
    no damage.
    """

    segments: int = 0
    blocks: int = 0
    bytes: int = 0
    unfinished: int = 0
    stale: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether there is no damage, or none any more."""
        return all(problem.repaired or not problem.damage for problem in self.problems)


def check(state: StateDirectory, io: IoEngine, repair: bool) -> Report:
    """Examine everything; reads every block. Raises Busy when this process has too few descriptors."""
    report = Report()
    for path in sorted(state.nvme_path.glob(f"*/*{UNFINISHED}")):
        what = "unfinished: a daemon died while it made the segment"
        report.problems.append(Problem(path, what, False, repair and removed(path)))
    paths = sorted(state.nvme_path.glob(f"*/*{DIRECTORY}"))
    epochs = newest_epochs(state, paths)
    for path in paths:
        report.problems += check_segment(state, path, io, repair, report, epochs)
    for path in sorted(state.nvme_path.glob(f"*/*{SLOTS}")):
        if not path.with_suffix(DIRECTORY).exists() and not path.with_suffix(UNFINISHED).exists():
            what = "slots without a directory: a daemon died while it made or removed the segment"
            report.problems.append(Problem(path, what, False, repair and removed(path)))
    return report


def newest_epochs(state: StateDirectory, paths: list[Path]) -> dict[bytes, int]:
    """The epoch that each namespace is at, by id: what is of an older one was purged."""
    epochs: dict[bytes, int] = {}
    for path in paths:
        with suppress(OSError, Invalid):  # whoever opens the segment says what is wrong with it
            header, _ = read_header(path)
            if path.parent == state.folder(header.namespace):
                epochs[header.namespace.id] = max(header.epoch, epochs.get(header.namespace.id, 0))
    return epochs


def check_segment(
    state: StateDirectory, path: Path, io: IoEngine, repair: bool, report: Report, epochs: dict[bytes, int]
) -> Iterator[Problem]:
    """What is wrong with one segment, if anything."""
    try:
        segment = FileSegment.open(path, io)
    except Invalid as error:
        what = str(error).removeprefix(f"{path}: ")
        yield Problem(path, what, True, repair and removed(path, slots_path(path)))
        return
    try:
        if path.parent != (place := state.folder(segment.header.namespace)):
            gone = repair and removed(path, slots_path(path))
            yield Problem(path, f"is of the namespace in {place}", True, gone)
            return
        epoch, newest = segment.header.epoch, epochs.get(segment.header.namespace.id, 0)
        if epoch < newest:
            what = f"of epoch {epoch}, its namespace is at {newest}: a daemon died while it purged that"
            yield Problem(path, what, False, repair and removed(path, slots_path(path)))
            return
        report.segments += 1
        yield from check_rows(segment, repair, report)
    finally:
        segment.close()


def check_rows(segment: FileSegment, repair: bool, report: Report) -> Iterator[Problem]:
    """Damage in a segment's directory and in its blocks; repaired by freeing these slots."""
    scan = segment.scan()
    report.unfinished += scan.unfinished
    report.stale += scan.stale
    found = [f"{scan.damaged} rows of the directory are damaged"] if scan.damaged else []
    codes = read_all(segment, scan.slots)
    report.blocks += len(codes)
    report.bytes += len(codes) * segment.header.geometry.payload_bytes
    lost = [scan.slots[codes == code] for code in (READ_DAMAGED, READ_FAILED)]
    for slots, what in zip(lost, ("blocks have other bytes than were written", "blocks cannot be read"), strict=True):
        if len(slots):
            found.append(f"{len(slots)} {what} (slots {shown(slots)})")
    if not found:
        return
    if repair:
        segment.failures.clear()
        segment.reset(np.concatenate([scan.spare, *lost]))
    yield from (Problem(segment.path, what, True, repair and not segment.failures) for what in found)


def read_all(segment: FileSegment, slots: Numbers) -> NDArray[np.uint8]:
    """A code for each of these slots, batch by batch."""
    verifier = Verifier(segment.header.geometry.slot_bytes)
    batches = [slots[at : at + verifier.batch] for at in range(0, len(slots), verifier.batch)]
    return np.concatenate([np.empty(0, np.uint8), *(verifier.verify(segment, batch) for batch in batches)])


def shown(slots: Numbers) -> str:
    more = ", ..." if len(slots) > SLOTS_SHOWN_MAX else ""
    return ", ".join(map(str, slots[:SLOTS_SHOWN_MAX].tolist())) + more


def removed(*paths: Path) -> bool:
    """Remove files; whether all of them are gone."""
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
