"""What a world expects of its tiers, by their names alone: the model does not ask the ladder what is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tierd.block import split
from tierd.core.plan import WRITE_BACK, Transfer

PAGED = "gpu"
COPIES = {"cpu": 1, PAGED: 2, "nvme": 3}
"""How far from a device a block is that is not there: of other devices it comes by way of host memory."""


def tier_sizes(gpu: int, cpu: int, nvme: int, devices: int) -> dict[str, int]:
    """The segments of each tier that has any, top first; all devices have the same."""
    paged = [PAGED] if devices == 1 else [f"{PAGED}{number}" for number in range(devices)]
    sizes = dict.fromkeys(paged, gpu) | {"cpu": cpu, "nvme": nvme}
    return {name: size for name, size in sizes.items() if size}


def kind(name: str) -> str:
    """What the tier is called in the answer to a lookup."""
    return PAGED if name.startswith(PAGED) else name


def nearest(names: Sequence[str], reader: int, places: Iterable[int]) -> int:
    """Which of these places, where a block is, counts for a reader in a tier, and is where a promotion to it reads."""
    if kind(names[reader]) != PAGED:
        return min(places)
    return min(places, key=lambda place: 0 if place == reader else COPIES[kind(names[place])])


def feeds_another(names: Sequence[str], tier: int) -> bool:
    """Whether what is stored in a tier goes on to one below; one device feeds no other."""
    return any(kind(name) != PAGED for name in names[tier + 1 :])


def check_ways(names: Sequence[str], planned: Iterable[Transfer], where: Mapping[bytes, Iterable[int]]) -> None:
    """Raise AssertionError where a promotion does not read what is nearest, or a write-back goes to a device."""
    for transfer in planned:
        source, target = names.index(transfer.source), names.index(transfer.target)
        if transfer.reason == WRITE_BACK:
            assert source < target and kind(transfer.target) != PAGED, "a write-back did not go down"
        else:
            ways = {nearest(names, target, where[block]) for block in split(transfer.hashes)}
            assert ways == {source}, f"a promotion read {transfer.source}, though a copy was nearer"
