"""Memory segments."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from tierd.errors import Busy, Invalid
from tierd.layout import Layout, Namespace
from tierd.memory import shared_array
from tierd.tiers.host import SEALS, HostSegment

MIB = 1 << 20
LAYOUT = Layout(4, 2, 32, "bfloat16")
NAMESPACE = Namespace("uid:1000", "model", LAYOUT)
HASH = bytes(range(32))


@pytest.fixture
def segment() -> HostSegment:
    """A segment of one MiB without huge pages."""
    return HostSegment.create(NAMESPACE, MIB, 1, "off")


def memfd(size: int, seals: int = SEALS) -> int:
    """A memfd that tierd did not make."""
    descriptor = os.memfd_create("stranger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_a_segment_costs_what_it_may_and_all_of_it_is_there(segment: HostSegment) -> None:
    """Both memfds together have total_bytes, at most the budget, and every page is allocated."""
    sizes = [os.fstat(descriptor) for descriptor in (segment.directory_fd, segment.slots_fd)]
    assert sum(stat.st_size for stat in sizes) == segment.header.geometry.total_bytes <= MIB
    assert sizes[1].st_blocks * 512 == sizes[1].st_size


def test_descriptors_are_sealed_private_and_closed_on_exec(segment: HostSegment) -> None:
    """Nobody can shrink, grow or unseal them, other users cannot open them again, programs do not inherit them."""
    for descriptor in (segment.directory_fd, segment.slots_fd):
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS
        assert os.fstat(descriptor).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(descriptor)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 4096)


def test_slots_are_page_aligned_rows(segment: HostSegment) -> None:
    """What an O_DIRECT engine needs: each slot starts on a page."""
    shape = segment.header.geometry
    assert segment.slots.shape == (shape.slot_count, shape.slot_bytes) and segment.slots.ctypes.data % 4096 == 0


def test_another_mapping_sees_the_same_memory(segment: HostSegment) -> None:
    """What a client writes into a slot is what the daemon reads, and state words go the other way."""
    shape = segment.header.geometry
    client = mmap.mmap(segment.slots_fd, shape.slots_bytes)
    client[shape.slot_bytes : shape.slot_bytes + 4] = b"kvkv"
    assert bytes(segment.slots[1][:4]) == b"kvkv"
    directory = mmap.mmap(segment.readonly_directory_fd(), shape.directory_bytes, prot=mmap.PROT_READ)
    segment.directory.begin([1], HASH, bytes(32))
    assert directory[shape.state_offset + 8] == 0x3C


def test_the_directory_that_clients_get_cannot_be_written(segment: HostSegment) -> None:
    """Neither by a write nor by a writable mapping."""
    descriptor = segment.readonly_directory_fd()
    with pytest.raises(OSError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 4096)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
def test_another_user_cannot_reopen_the_directory_for_writing(segment: HostSegment) -> None:
    """A read-only descriptor in foreign hands stays read-only."""
    descriptor = segment.readonly_directory_fd()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            os._exit(1)
        except PermissionError:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(descriptor)


def test_an_adopted_segment_has_everything_that_was_in_it(segment: HostSegment) -> None:
    """Header, blocks, recency and payloads are found by a daemon that has only the two descriptors."""
    segment.slots[2][:] = 77
    segment.directory.begin([2], HASH, bytes(32))
    segment.directory.ready([2])
    segment.directory.holders[2] = 1 << 9
    descriptors = os.dup(segment.directory_fd), os.dup(segment.slots_fd)
    segment.close()
    adopted = HostSegment.adopt(*descriptors)
    scan = adopted.directory.scan()
    assert adopted.header.namespace == NAMESPACE and scan.slots.tolist() == [2] and scan.hashes == HASH
    assert scan.held.tolist() == [2] and bool((adopted.slots[2] == 77).all())
    assert adopted.page_kind == "adopted"
    adopted.close()


def test_a_segment_that_is_not_whole_is_not_adopted(segment: HostSegment, tmp_path: Path) -> None:
    """Swapped, unsealed, foreign, resized or damaged descriptors are refused with the reason, and stay the caller's."""
    shape = segment.header.geometry
    unsealed = memfd(shape.slots_bytes, seals=0)
    foreign = memfd(shape.directory_bytes)
    damaged = os.memfd_create("damaged", os.MFD_ALLOW_SEALING)
    os.pwrite(damaged, b"\x01".join([segment.header.pack()[:200], segment.header.pack()[201:]]), 0)
    os.ftruncate(damaged, shape.directory_bytes)
    fcntl.fcntl(damaged, fcntl.F_ADD_SEALS, SEALS)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for pair, reason in (
        ((segment.slots_fd, segment.directory_fd), "magic"),
        ((segment.directory_fd, unsealed), "seals 0x0"),
        ((plain, segment.slots_fd), "seals 0x0"),
        ((foreign, segment.slots_fd), "magic"),
        ((damaged, segment.slots_fd), "crc"),
        ((segment.directory_fd, memfd(shape.slots_bytes + 4096)), f"{shape.slots_bytes + 4096} bytes"),
    ):
        with pytest.raises(Invalid, match=reason):
            HostSegment.adopt(*pair)
        assert all(os.fstat(descriptor) for descriptor in pair)


def test_a_closed_segment_gives_its_memory_back() -> None:
    """Opening and closing leaves no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        HostSegment.create(NAMESPACE, MIB, 1, "off").close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_too_small_for_a_block_leaves_nothing_behind() -> None:
    """The refusal names both sizes and costs no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Invalid, match="4096 bytes cannot hold one block of 16384 bytes"):
        HostSegment.create(NAMESPACE, 4096, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_cannot_be_had_is_busy() -> None:
    """More than the address space can map is refused as an ordinary outcome, with the remedy."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Busy, match="lower the tier's bytes"):
        HostSegment.create(Namespace("a", "b", Layout(1, 1, 1 << 20, "float32", kv_parts=1)), 1 << 48, 1, "off")
    assert len(os.listdir("/proc/self/fd")) == before


def test_required_huge_pages_come_from_the_pool_or_not_at_all() -> None:
    """Without a configured pool the refusal says what to set; with one, the pages are huge or the answer is Busy."""
    try:
        segment = HostSegment.create(NAMESPACE, 4 * MIB, 1, "require")
    except Invalid as error:
        assert "vm.nr_hugepages" in str(error)
    except Busy as error:
        assert "lower the tier's bytes" in str(error)
    else:
        assert segment.page_kind == "hugetlb" and segment.header.geometry.slots_bytes % (2 * MIB) == 0


def test_the_geometry_is_known_before_the_segment() -> None:
    """What `geometry` announces is what `create` makes."""
    expected = HostSegment.geometry(LAYOUT, MIB)
    assert HostSegment.create(NAMESPACE, MIB, 1).header.geometry == expected
    assert isinstance(expected.slot_count, int) and np.prod([expected.slot_count, expected.slot_bytes]) <= MIB


def test_slots_lie_in_huge_pages_where_the_kernel_has_them() -> None:
    """Without any setting of the system: the kernel counts them as huge, in the daemon's mapping and in a client's."""
    segment = HostSegment.create(NAMESPACE, 8 * MIB, 1)
    if segment.page_kind == "4k":
        pytest.skip("this kernel does not collapse shared memory into huge pages (Linux 6.1 does, unless memory is fragmented)")
    client = shared_array(segment.slots_fd, segment.header.geometry.slots_bytes)
    client[:] = 1
    for memory in (segment.slots, client):
        assert huge_bytes(memory.ctypes.data) >= 4 * MIB
    segment.close()


def test_huge_pages_can_be_turned_off() -> None:
    """A segment of small pages is what `off` asks for."""
    segment = HostSegment.create(NAMESPACE, 8 * MIB, 1, "off")
    assert segment.page_kind == "4k" and huge_bytes(segment.slots.ctypes.data) == 0


def huge_bytes(address: int) -> int:
    """How much of the mapping at an address the kernel maps by huge pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped"))
    raise AssertionError(f"nothing is mapped at {address:x}")
