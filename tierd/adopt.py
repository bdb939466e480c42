"""Taking over what an earlier life left: memory segments kept by the service manager, segment files, and sessions.

The directories are the truth. A segment that does not fit the present configuration (another geometry, more bytes than the
tier may have) is given up with the reason in the log; everything else is a hit again at once, with its recency.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tierd import systemd
from tierd.core.recovery import Rows, recover
from tierd.errors import Invalid
from tierd.layout import Namespace
from tierd.log import get_logger
from tierd.space import BITS, Arena, Attached, Space
from tierd.tiers.directory import Scan
from tierd.tiers.nvme import FileSegment
from tierd.tiers.tier import MemoryTier, NvmeTier, Tier
from tierd.wire.peer import has_ended, pid_of

log = get_logger("adopt")
Found = tuple[Any, int | None]
"""A segment, and the ordinal that it had."""


@dataclass
class Adopted:
    """What came of it, for the log and the metrics: segments, copies kept, copies given up by reason, sessions."""

    segments: int = 0
    kept: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    sessions: int = 0


def adopt(tiers: list[Tier], stored: dict[str, list[int]], space_of: Callable[[Namespace], Space], now: int) -> Adopted:
    """Fill the spaces from the descriptors `stored` (by name) and from the files of an nvme tier.

    Blocks for reading all directories; `now` is Unix milliseconds.
    """
    result = Adopted()
    found: dict[bytes, list[list[Found]]] = {}
    names: dict[bytes, Namespace] = {}
    for at, segment, ordinal in (*_memory_segments(tiers, stored), *_files(tiers)):
        namespace = segment.header.namespace
        names[namespace.id] = namespace
        found.setdefault(namespace.id, [[] for _ in tiers])[at].append((segment, ordinal))
    for namespace_id, segments_by_tier in found.items():
        try:
            space = space_of(names[namespace_id])
        except Invalid as error:  # no segment as they are configured now can hold one of its blocks
            for tier, segments in zip(tiers, segments_by_tier, strict=True):
                for segment, _ in segments:
                    _give_up_segment(tier, segment, str(error))
            continue
        _adopt_space(space, segments_by_tier, now, result)
        _adopt_sessions(space, stored, result)
    while stored:
        _give_up_descriptors(*stored.popitem())
    if found:
        log.info("adopted", segments=result.segments, copies=result.kept, sessions=result.sessions, **result.lost)
    return result


def _memory_segments(tiers: list[Tier], stored: dict[str, list[int]]) -> Iterator[tuple[int, Any, int | None]]:
    """Tier, segment and ordinal of what was kept under `<tier>.<ordinal>.<id>.d` (directory) and `.s` (slots)."""
    mapped = {tier.name: (at, tier) for at, tier in enumerate(tiers) if isinstance(tier, MemoryTier)}
    for name in [name for name in stored if re.fullmatch(r"[a-z]+\d*\.\d+\.[^.]+\.d", name)]:
        kept_as = name.removesuffix(".d")
        descriptors = stored.pop(name) + stored.pop(f"{kept_as}.s", [])
        try:
            name_of_tier, ordinal, _ = kept_as.split(".")
            if len(descriptors) != 2:
                raise Invalid(f"{len(descriptors)} descriptors are kept for it, not 2")
            if name_of_tier not in mapped:
                raise Invalid(f"there is no {name_of_tier} tier in memory any more")
            at, tier = mapped[name_of_tier]
            segment = tier.adopt(*descriptors)
        except Invalid as error:
            log.warning("memory segment given up", segment=name, reason=str(error))
            _give_up_descriptors(name, descriptors)
            systemd.remove(f"{kept_as}.s")
            continue
        segment.kept_as = kept_as
        yield at, segment, int(ordinal)


def _files(tiers: list[Tier]) -> Iterator[tuple[int, Any, int | None]]:
    for at, tier in enumerate(tiers):
        if isinstance(tier, NvmeTier):
            opened = tier.state.open_segments(tier.io)
            for path, reason in opened.removed:
                log.warning("segment file removed", path=path, reason=reason)
            yield from ((at, segment, None) for segment in opened.segments)


def _adopt_space(space: Space, segments_by_tier: list[list[Found]], now: int, result: Adopted) -> None:
    tables = []
    space.epoch = max(segment.header.epoch for segments in segments_by_tier for segment, _ in segments)
    for arena, segments in zip(space.arenas, segments_by_tier, strict=True):
        scans: list[tuple[int, Scan]] = []
        for segment, ordinal in segments:
            if segment.header.geometry != arena.geometry:
                reason = f"its geometry {segment.header.geometry} is not the configured {arena.geometry}"
            elif segment.header.epoch < space.epoch:  # a purge had begun, and had not come to it
                reason = f"it is of epoch {segment.header.epoch}, its namespace was purged and is at {space.epoch}"
            elif not arena.reserve():
                quota = f", its namespace to {arena.quota.most}" if arena.quota.most else ""
                reason = f"the {arena.tier.name} tier is limited to {arena.tier.budget.most} bytes{quota}"
            else:
                directory = segment if isinstance(segment, FileSegment) else segment.directory
                scan = directory.scan()
                directory.reset(scan.spare)
                scans.append((arena.add(segment, now, ordinal), scan))
                _count(result, damaged=scan.damaged, stale=scan.stale, unfinished=scan.unfinished)
                continue
            _give_up_segment(arena.tier, segment, reason)
        result.segments += len(scans)
        tables.append(_rows(scans, arena.pool.slots_per_segment))
    recovered = recover(space.cache, tables, now)
    result.kept += recovered.kept
    _count(result, duplicates=recovered.duplicates, orphans=recovered.orphans)


def _give_up_segment(tier: Tier, segment: Any, reason: str) -> None:
    log.warning("segment given up", tier=tier.name, segment=segment.segment_id, reason=reason)
    if not tier.discard(segment):
        log.error("its files cannot be removed", tier=tier.name, segment=segment.segment_id)


def _rows(scans: list[tuple[int, Scan]], slots_per_segment: int) -> Rows:
    def joined(name: str, kind: type) -> Any:
        return np.concatenate([np.empty(0, kind), *(getattr(scan, name) for _, scan in scans)])

    return Rows(
        slots=np.concatenate([np.empty(0, np.int32), *(scan.slots + np.int32(at * slots_per_segment) for at, scan in scans)]),
        hashes=b"".join(scan.hashes for _, scan in scans),
        parents=b"".join(scan.parents for _, scan in scans),
        generations=joined("generations", np.uint64),
        last_use=joined("last_use", np.uint64),
        uses=joined("use_counts", np.uint32),
    )


def _adopt_sessions(space: Space, stored: dict[str, list[int]], result: Adopted) -> None:
    """Sessions whose processes live wait for them to resume; the bits of the dead are cleared.

    Bits whose process nobody kept a descriptor of stay set: it may be alive, and still copying.
    """
    dead: set[tuple[str, int]] = set()
    alive: dict[tuple[str, int], Attached] = {}
    tiers = [arena.tier.name for arena in space.mapped]
    for name in [name for name in stored if name.startswith(space.session_prefix)]:
        tier, number, session_id, token = name.removeprefix(space.session_prefix).split(".")
        owner, descriptors = (tier, int(number)), stored.pop(name)
        if tier in tiers and len(descriptors) == 1 and not has_ended(descriptors[0]):
            names = int(session_id, 16), systemd.long(token), int(number)
            alive[owner] = Attached(*names, descriptors[0], pid_of(descriptors[0]), "", space, tiers.index(tier))
        else:
            dead.add(owner)
            _give_up_descriptors(name, descriptors)
    for at, arena in enumerate(space.mapped):
        for bit in range(BITS):
            held, owner = _held(arena, bit), (arena.tier.name, bit)
            if owner in dead:
                for segment in arena.segments.values():
                    segment.directory.unhold_all(bit)
                continue
            if owner not in alive and len(held):
                log.warning("slots are held by an unknown process", namespace=space.namespace.id, bit=bit, slots=len(held))
                alive[owner] = Attached(-1 - bit - BITS * at, os.urandom(16), bit, -1, 0, "unknown", space, at)
            if owner in alive:
                session = space.sessions[alive[owner].id] = alive[owner]
                session.known = {o: segment.segment_id for o, segment in arena.segments.items()}  # it may map them all
                space.cache.restore_session(session.id, bit, session.tier, held)
                result.sessions += 1


def _held(arena: Arena, bit: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Slot numbers that carry a holder bit."""
    found = [np.empty(0, np.int32)]
    for ordinal, segment in arena.segments.items():
        local = np.flatnonzero(segment.directory.holders & np.uint64(1 << bit)).astype(np.int32)
        found.append(local + np.int32(ordinal * arena.pool.slots_per_segment))
    return np.concatenate(found)


def _give_up_descriptors(name: str, descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    systemd.remove(name)


def _count(result: Adopted, **numbers: int) -> None:
    for reason, number in numbers.items():
        result.lost[reason] = result.lost.get(reason, 0) + number
