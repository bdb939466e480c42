"""Mapping a segment: nothing is trusted that a byte offset or a SIGBUS could come from."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.fake_daemon import LAYOUT, NAMESPACE, make_segment
from tierd.client.mapping import Mapping
from tierd.errors import Invalid
from tierd.layout import Layout
from tierd.tiers.host import HostSegment


@pytest.fixture
def segment() -> Iterator[HostSegment]:
    """A real segment."""
    made = make_segment(10)
    yield made
    made.close()


def announce(segment: HostSegment) -> dict[str, Any]:
    """What an attach says of it."""
    shape = segment.header.geometry
    sizes = {name: getattr(shape, name) for name in ("slot_bytes", "directory_bytes", "slots_bytes")}
    return {"tier": "cpu", "ordinal": 0, "segment": segment.segment_id, "slots": shape.slot_count, **sizes}


def mapped(segment: HostSegment, /, **changes: Any) -> Mapping:
    """Map it as a client does."""
    directory = segment.readonly_directory_fd()
    try:
        return Mapping({**announce(segment), **changes}, directory, segment.slots_fd, LAYOUT)
    finally:
        os.close(directory)


def memfd(data: bytes, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    """A memfd with these bytes."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def areas() -> list[str]:
    """The entries of this process's memory map that are tierd's segments, with their flags."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return [entry for entry in entries if "memfd:tierd-" in entry]


def test_a_mapping_shows_states_and_slots_of_the_same_memory(segment: HostSegment) -> None:
    """What the daemon writes is seen, what the client writes arrives; states cannot be written."""
    mapping = mapped(segment)
    segment.directory.begin([3], bytes(32), bytes(32))
    assert mapping.state[3] == segment.directory.state[3] != 0
    mapping.slots[3] = 7
    assert (segment.slots[3] == 7).all()
    assert mapping.namespace == NAMESPACE.id and mapping.slots.shape == segment.slots.shape
    with pytest.raises(ValueError, match="read-only"):
        mapping.state[3] = 0
    mapping.close()


def test_a_mapping_is_not_forked_and_its_directory_is_read_only(segment: HostSegment) -> None:
    """The kernel says so: flag `dc` on both areas, no write permission on the first; close unmaps both."""
    before = areas()
    mapping = mapped(segment)
    mine = [area for area in areas() if area.splitlines()[0] not in {entry.splitlines()[0] for entry in before}]
    assert len(mine) == 2 and all(" dc" in area for area in mine)
    assert sorted(area.split()[1] for area in mine) == ["r--s", "rw-s"]
    mapping.close()
    assert len(areas()) == len(before)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_a_descriptor_that_could_change_size_is_refused(segment: HostSegment, missing: int) -> None:
    """Without either seal somebody could make our memory a SIGBUS."""
    seals = (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) & ~missing
    unsealed = memfd(bytes(announce(segment)["slots_bytes"]), seals)
    with pytest.raises(Invalid, match="slots descriptor has seals"):
        Mapping(announce(segment), segment.directory_fd, unsealed, LAYOUT)
    os.close(unsealed)


def test_an_ordinary_file_is_refused(segment: HostSegment, tmp_path: Path) -> None:
    """Only memfds have seals."""
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(file, announce(segment)["slots_bytes"])
    with pytest.raises(Invalid, match="no sealed memfd"):
        Mapping(announce(segment), segment.directory_fd, file, LAYOUT)
    os.close(file)


@pytest.mark.parametrize("name", ["segment", "slots", "slot_bytes", "directory_bytes", "slots_bytes"])
def test_an_announcement_that_is_not_true_is_refused(segment: HostSegment, name: str) -> None:
    """Every number of the attach is held against the descriptors and the header."""
    value = announce(segment)[name]
    with pytest.raises(Invalid):
        mapped(segment, **{name: bytes(16) if name == "segment" else value + 4096})


def test_a_segment_of_another_layout_is_refused(segment: HostSegment) -> None:
    """The fingerprint differs even where the sizes are the same."""
    twin = Layout(2, 2, 16, "float32", block_tokens=32, kv_parts=1)
    assert twin.block_bytes == LAYOUT.block_bytes
    with pytest.raises(Invalid, match="layout fingerprint"):
        Mapping(announce(segment), segment.directory_fd, segment.slots_fd, twin)


def test_a_flipped_bit_anywhere_in_the_header_is_refused(segment: HostSegment) -> None:
    """The crc covers all of it."""
    page = os.pread(segment.directory_fd, announce(segment)["directory_bytes"], 0)
    for at in [*range(170), 600, 4091, 4095]:
        damaged = bytearray(page)
        damaged[at] ^= 1 << at % 8
        descriptor = memfd(bytes(damaged))
        with pytest.raises(Invalid):
            Mapping(announce(segment), descriptor, segment.slots_fd, LAYOUT)
        os.close(descriptor)


def test_columns_outside_of_the_descriptor_are_refused(segment: HostSegment) -> None:
    """A header with a good crc may still lie about its offsets."""
    page = bytearray(os.pread(segment.directory_fd, announce(segment)["directory_bytes"], 0))
    for offset in (len(page), 4097, 1 << 62):
        struct.pack_into("<Q", page, 120, offset)
        struct.pack_into("<I", page, 4092, zlib.crc32(page[:4092]))
        descriptor = memfd(bytes(page))
        with pytest.raises(Invalid, match="states end at"):
            Mapping(announce(segment), descriptor, segment.slots_fd, LAYOUT)
        os.close(descriptor)


def test_a_child_that_closes_a_mapping_unmaps_nothing_of_its_own(segment: HostSegment) -> None:
    """In a forked child the address may belong to something else by then."""
    mapping = mapped(segment)
    child = os.fork()
    if child == 0:
        with np.errstate(all="ignore"):
            kept = np.ones(64 << 20, np.uint8)  # may well be put where the mapping was
            mapping.close()
            os._exit(0 if kept.all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    mapping.slots[0] = 5
    assert (segment.slots[0] == 5).all()
    mapping.close()
