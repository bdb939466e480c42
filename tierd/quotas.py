"""What namespaces are promised of each tier and the most that they may have; the state directory remembers it.

A quota counts the bytes of whole segments, since a tier is divided into these. The file is replaced and synced before a change
is answered, so no later life has an older one. Who holds and honours quotas: docs/decisions/0024.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tierd.errors import Busy, Invalid
from tierd.notes import replace

FILE = "quotas.json"
FILE_BYTES_MAX = 1 << 20
NAMESPACES_MAX = 1024
ID_BYTES = 32


class Quota(NamedTuple):
    """Bytes of one tier: of `least` other namespaces take nothing, `most` (0: no limit) is never exceeded."""

    least: int = 0
    most: int = 0


UNLIMITED = Quota()
Allotments = dict[bytes, dict[str, Quota]]
"""Quotas that say something, by namespace id and tier."""


class Quotas:
    """The quotas of all namespaces, served or not. Raises Invalid for a file that cannot be understood."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self._changing = asyncio.Lock()
        self._quotas = self._read()

    @property
    def namespaces(self) -> list[bytes]:
        """Who has a quota in any tier."""
        return list(self._quotas)

    def of(self, namespace: bytes) -> Mapping[str, Quota]:
        """Its quotas by tier; a tier that is missing has none."""
        return self._quotas.get(namespace, {})

    async def set(self, namespace: bytes, tier: str, quota: Quota, tier_bytes: int) -> None:
        """Change one quota, when the medium has it. Raises Invalid where the tier's bytes are promised already, and Busy,
        with nothing changed, where it cannot be noted.
        """
        async with self._changing:
            promised = sum(of.get(tier, UNLIMITED).least for name, of in self._quotas.items() if name != namespace)
            if promised + quota.least > tier_bytes:
                raise Invalid(
                    f"quota: {quota.least} bytes cannot be promised: the {tier} tier has {tier_bytes}, of which {promised} are "
                    "promised to other namespaces"
                )
            changed = {**self._quotas, namespace: {**self.of(namespace), tier: quota}}
            changed[namespace] = {name: of for name, of in changed[namespace].items() if of != UNLIMITED}
            changed = {name: of for name, of in changed.items() if of}
            if len(changed) > NAMESPACES_MAX:
                raise Busy(f"quota: {NAMESPACES_MAX} namespaces have one: clear those that are not needed (min and max 0)")
            try:
                await asyncio.to_thread(replace, self._path, {"namespaces": {name.hex(): of for name, of in changed.items()}})
            except OSError as error:
                raise Busy(f"quota: {self._path} cannot be written ({error}): nothing has changed") from error
            self._quotas = changed

    def _read(self) -> Allotments:
        try:
            with self._path.open(encoding="utf-8") as file:
                found = json.loads(file.read(FILE_BYTES_MAX))["namespaces"]
            quotas = {bytes.fromhex(name): {tier: checked(*pair) for tier, pair in of.items()} for name, of in found.items()}
            if any(len(name) != ID_BYTES for name in quotas):
                raise ValueError(f"a namespace's id has {2 * ID_BYTES} digits")
        except FileNotFoundError:
            return {}
        except (Invalid, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "mend it, or remove it to start without quotas"
            raise Invalid(f"{self._path} does not say what namespaces may have ({error}): {remedy}") from error
        return quotas


def checked(least: int, most: int) -> Quota:
    """A quota; raises Invalid where it contradicts itself."""
    if type(least) is not int or type(most) is not int or least < 0 or most < 0:
        raise Invalid(f"quota: minimum and maximum are bytes, not {least!r} and {most!r}")
    if most and least > most:
        raise Invalid(f"quota: a minimum of {least} bytes is over the maximum of {most}")
    return Quota(least, most)
