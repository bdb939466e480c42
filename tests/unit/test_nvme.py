"""File segments: writing, verifying, recovering, and every way in which the medium lets one down."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tierd.errors import Busy, Invalid
from tierd.layout import Layout, Namespace
from tierd.tiers.io.faulty import Faults, FaultyEngine
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.nvme import READ_DAMAGED, READ_FAILED, READ_OK, FileSegment, slots_path
from tierd.tiers.segment import Geometry

LAYOUT = Layout(3, 1, 24, "float16", block_tokens=15)
"""6,480 bytes a block: a slot has padding."""
NAMESPACE = Namespace("uid:1000", "model", LAYOUT)
SLOT_COUNT = 6
SEGMENT_BYTES = Geometry(SLOT_COUNT, LAYOUT.block_bytes).total_bytes
ROOT = bytes(32)
BLOCKS_MAX = 64


def block_hash(number: int) -> bytes:
    """The hash of a numbered block."""
    return hashlib.sha256(b"%d" % number).digest()


def chain(numbers: list[int]) -> tuple[bytes, bytes]:
    """Packed hashes and parents of numbered blocks, each the child of the one before."""
    hashes = [block_hash(number) for number in numbers]
    return b"".join(hashes), b"".join([ROOT, *hashes[:-1]])


def content(number: int) -> bytes:
    """The payload of a numbered block."""
    return Random(number).randbytes(LAYOUT.block_bytes)


CONTENTS = {block_hash(number): content(number) for number in range(BLOCKS_MAX)}


def aligned(count: int) -> list[np.ndarray]:
    """Page-aligned empty slots."""
    memory = np.frombuffer(mmap.mmap(-1, count * LAYOUT.slot_bytes), np.uint8)
    return list(memory.reshape(count, LAYOUT.slot_bytes))


def payloads(numbers: list[int]) -> list[np.ndarray]:
    """The slots of memory that numbered blocks are written from."""
    slots = aligned(len(numbers))
    for slot, number in zip(slots, numbers, strict=True):
        slot[: LAYOUT.block_bytes] = np.frombuffer(content(number), np.uint8)
    return slots


def create(folder: Path, io: object | None = None) -> FileSegment:
    """A small new segment."""
    return FileSegment.create(folder, NAMESPACE, SEGMENT_BYTES, 1, io or PosixEngine())


def put(segment: FileSegment, slots: list[int], numbers: list[int]) -> list[bool]:
    """Store numbered blocks in these slots."""
    return segment.write(slots, payloads(numbers), *chain(numbers)).tolist()


def image(path: Path) -> bytes:
    """All bytes of a segment on disk: its directory and then its slots."""
    return path.read_bytes() + slots_path(path).read_bytes()


def put_image(path: Path, data: bytes | bytearray) -> None:
    """Make the files of a segment what they were when the image was taken."""
    size = path.stat().st_size
    path.write_bytes(data[:size])
    slots_path(path).write_bytes(data[size:])


def served(segment: FileSegment) -> dict[bytes, int]:
    """Read all that a scan offers: the code per hash. What is READ_OK is compared with what was stored under its
    hash."""
    scan = segment.scan()
    buffers = aligned(len(scan.slots))
    codes = segment.read(scan.slots, buffers)
    names = [scan.hashes[at : at + 32] for at in range(0, len(scan.hashes), 32)]
    for code, name, buffer in zip(codes, names, buffers, strict=True):
        assert code != READ_OK or bytes(buffer[: LAYOUT.block_bytes]) == CONTENTS[name], "a wrong byte was served"
    return dict(zip(names, codes.tolist(), strict=True))


def reopened(segment: FileSegment) -> FileSegment:
    """The segment as the next life of the daemon finds it."""
    segment.close()
    return FileSegment.open(segment.path, PosixEngine())


def names(*numbers: int) -> set[bytes]:
    """The hashes of numbered blocks."""
    return {block_hash(number) for number in numbers}


def test_a_block_comes_back_in_the_next_life(tmp_path: Path) -> None:
    """Everything that was stored is found, verified and identical after a reopen."""
    segment = create(tmp_path)
    assert put(segment, [5, 0, 3], [1, 2, 3]) == [True] * 3
    segment = reopened(segment)
    assert served(segment) == dict.fromkeys(names(1, 2, 3), READ_OK) and not segment.failures
    assert segment.scan().slots.tolist() == [0, 3, 5]
    segment.close()


def test_a_freed_block_is_gone_in_the_next_life(tmp_path: Path) -> None:
    """An eviction reaches the file."""
    segment = create(tmp_path)
    put(segment, [0, 1, 2], [1, 2, 3])
    segment.free([1])
    assert served(reopened(segment)).keys() == names(1, 3)


def test_a_slot_can_be_used_many_times(tmp_path: Path) -> None:
    """The last block in a slot is the one that is found, with a generation per use."""
    segment = create(tmp_path)
    for number in range(10):
        put(segment, [2], [number])
        if number < 9:
            segment.free([2])
    segment = reopened(segment)
    assert served(segment) == {block_hash(9): READ_OK} and segment.scan().generations.tolist() == [10]


def test_recency_is_written_when_flushed(tmp_path: Path) -> None:
    """Touches survive a close, and those since the last flush do not survive a kill."""
    segment = create(tmp_path)
    put(segment, [0, 1], [1, 2])
    segment.touch([0], 1_700_000_000_000, 3)
    segment.flush()
    segment.touch([1], 1_700_000_000_001, 4)
    killed = FileSegment.open(segment.path, PosixEngine()).scan()
    assert killed.last_use.tolist() == [1_700_000_000_000, 0] and killed.use_counts.tolist() == [3, 0]
    assert reopened(segment).scan().use_counts.tolist() == [3, 4]


def test_padding_does_not_count(tmp_path: Path) -> None:
    """The digest covers the payload alone: stale bytes behind it are nobody's business."""
    segment = create(tmp_path)
    slots = payloads([1])
    slots[0][LAYOUT.block_bytes :] = 255
    segment.write([0], slots, *chain([1]))
    assert served(segment) == {block_hash(1): READ_OK}


def test_a_failing_block_does_not_take_its_batch_along(tmp_path: Path) -> None:
    """Blocks that cannot be written are reported, their slots are free again, and the others are stored."""
    io = FaultyEngine(PosixEngine(), Faults(write_errors=0.5), seed=5)
    segment = create(tmp_path, io)
    done = put(segment, list(range(6)), list(range(6)))
    assert 0 < sum(done) < 6 and segment.failures == {"write: EIO": 6 - sum(done)}
    expected = names(*(number for number in range(6) if done[number]))
    assert served(segment).keys() == expected == served(reopened(segment)).keys()


def test_a_run_that_cannot_be_written_whole_loses_only_the_block_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours are one call; when it fails, or stops short, each block is tried alone."""
    segment = create(tmp_path)
    bad, real, calls = 2 * LAYOUT.slot_bytes, os.pwritev, []

    def write(descriptor: int, buffers: list[object], offset: int) -> int:
        calls.append(len(buffers))
        if offset <= bad < offset + len(buffers) * LAYOUT.slot_bytes:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", write)
    assert put(segment, [0, 1, 2, 3], [1, 2, 3, 4]) == [True, True, False, True]
    assert calls == [4, 1, 1, 1, 1]
    monkeypatch.undo()
    assert served(segment) == dict.fromkeys(names(1, 2, 4), READ_OK)


def test_a_failing_read_is_a_miss_and_not_damage(tmp_path: Path) -> None:
    """The block may be read another time."""
    segment = create(tmp_path, FaultyEngine(PosixEngine(), Faults(read_errors=0.5), seed=5))
    put(segment, list(range(6)), list(range(6)))
    codes = list(served(segment).values())
    assert {READ_OK, READ_FAILED} == set(codes) and segment.failures == {"read: EIO": codes.count(READ_FAILED)}


def test_a_slot_that_others_found_damaged_takes_no_good_block_of_a_read_along(tmp_path: Path) -> None:
    """Two read the same blocks, the first gives up what is damaged: to the second it is damage too, and the rest is served."""
    segment = create(tmp_path)
    assert all(put(segment, [0, 1, 2], [7, 8, 9]))
    damaged = bytearray(slots_path(segment.path).read_bytes())
    damaged[LAYOUT.slot_bytes] ^= 1
    slots_path(segment.path).write_bytes(damaged)
    segment.free([1])
    assert segment.read([0, 1, 2], aligned(3)).tolist() == [READ_OK, READ_DAMAGED, READ_OK]
    segment.close()


@pytest.mark.parametrize("faults", [Faults(torn=0.3), Faults(read_flips=0.3), Faults(write_flips=0.3)])
def test_a_medium_that_lies_is_found_out(tmp_path: Path, faults: Faults) -> None:
    """Torn writes and flipped bits that the medium calls a success are never served, and counted."""
    io = FaultyEngine(PosixEngine(), faults, seed=6)
    segment = create(tmp_path, io)
    damaged = 0
    for _ in range(5):
        assert all(put(segment, list(range(6)), list(range(6))))
        damaged += list(served(segment).values()).count(READ_DAMAGED)
        segment.free(list(range(6)))
    assert 0 < damaged <= io.injected and segment.failures["read: digest differs"] == damaged


def test_a_flipped_bit_anywhere_in_the_file_is_never_served(tmp_path: Path) -> None:
    """Whatever bit changes, each block is right, or missing, or found damaged; and only where the bit was."""
    segment = create(tmp_path)
    put(segment, [0, 1, 2, 4], [1, 2, 3, 4])
    segment.free([1])
    shape = segment.header.geometry
    segment.close()
    whole = image(segment.path)
    rows = [shape.state_offset, shape.identity_offset, shape.recency_offset, shape.directory_bytes]
    random = Random(7)
    near = [base + random.randrange(640) for base in rows for _ in range(60)]
    anywhere = [random.randrange(len(whole)) for _ in range(240)]
    outcomes = {"refused": 0, "missing": 0, "damaged": 0, "harmless": 0}
    for offset in near + anywhere:
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << random.randrange(8)
        put_image(segment.path, flipped)
        try:
            victim = FileSegment.open(segment.path, PosixEngine())
        except Invalid:
            outcomes["refused"] += 1
            assert offset < 4096
            continue
        codes = served(victim)
        assert codes.keys() <= names(1, 3, 4) and len(codes) + victim.scan().damaged == 3
        lost = 3 - list(codes.values()).count(READ_OK)
        assert lost <= 1
        outcomes["missing" if len(codes) < 3 else "damaged" if lost else "harmless"] += 1
        victim.close()
    assert all(outcomes.values()), outcomes


def test_holder_bits_in_a_file_are_only_noise(tmp_path: Path) -> None:
    """Nobody maps a file: a flipped bit in its holders column quarantines nothing."""
    segment = create(tmp_path)
    shape = segment.header.geometry
    segment.close()
    with open(segment.path, "r+b") as file:
        file.seek(shape.holders_offset)
        file.write(b"\x04")
    assert len(FileSegment.open(segment.path, PosixEngine()).scan().held) == 0


class Snapshots:
    """What is in a segment file after each single write to it, as a kill at that moment would leave it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.taken = path, []
        for name in ("pwrite", "pwritev"):
            monkeypatch.setattr(os, name, self._recorded(getattr(os, name)))

    def _recorded(self, call: object) -> object:
        def write(descriptor: int, data: object, offset: int) -> int:
            written = call(descriptor, data, offset)
            self.taken.append(image(self.path))
            return written

        return write


def test_a_kill_after_any_write_leaves_only_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every write of a store, an eviction and a store over it: what is found is right, what stayed is found."""
    segment = create(tmp_path)
    put(segment, [0, 1, 2, 3], [1, 2, 3, 4])
    snapshots = Snapshots(segment.path, monkeypatch)
    segment.free([1, 3])
    evicted_at = len(snapshots.taken)
    put(segment, [3, 1, 5], [11, 12, 13])
    writes = snapshots.taken[:]
    monkeypatch.undo()
    segment.close()
    assert len(writes) == evicted_at + 6, "three directory writes and three payloads"
    for count, data in enumerate(writes, 1):
        put_image(segment.path, data)
        survivor = FileSegment.open(segment.path, PosixEngine())
        codes = served(survivor)
        assert set(codes.values()) == {READ_OK} and survivor.scan().damaged == 0
        new = names(11, 12, 13) if count == len(writes) else set()
        assert codes.keys() == names(1, 3) | new
        survivor.reset(survivor.scan().spare)
        spare = survivor.scan().spare.tolist()
        assert all(put(survivor, spare, list(range(20, 20 + len(spare))))), "recovery leaves every slot usable"
        assert list(served(survivor).values()) == [READ_OK] * SLOT_COUNT
        survivor.close()


def test_a_directory_that_cannot_be_written_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When directory writes fail at any step, no block is claimed, and what was in the file stays right."""
    for failing in range(3):
        segment = create(tmp_path)
        put(segment, [0], [1])
        real, calls = os.pwrite, iter(range(100))

        def refuse(descriptor: int, data: object, offset: int, real=real, calls=calls, failing=failing) -> int:
            if next(calls) >= failing:
                raise OSError(28, "No space left on device")
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", refuse)
        assert put(segment, [1, 2], [2, 3]) == [False, False]
        assert segment.failures["directory: ENOSPC"] >= 1
        monkeypatch.undo()
        assert served(segment).keys() == names(1)
        assert set(served(FileSegment.open(segment.path, PosixEngine())).values()) == {READ_OK}
        assert put(segment, [1, 2], [2, 3]) == [True, True], "and goes on when the medium does"
        assert served(reopened(segment)).keys() == names(1, 2, 3)


def test_writers_of_one_segment_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Threads that share directory pages store, read and free; whatever is ready at the end is right in the file
    too."""
    layout_slots = 24
    segment = FileSegment.create(tmp_path, NAMESPACE, Geometry(layout_slots, LAYOUT.block_bytes).total_bytes, 1, PosixEngine())
    problems: list[object] = []

    def work(mine: list[int]) -> None:
        for round_number in range(12):
            numbers = [(slot + round_number * layout_slots) % BLOCKS_MAX for slot in mine]
            done = segment.write(mine, payloads(numbers), *chain(numbers))
            buffers = aligned(len(mine))
            codes = segment.read(mine, buffers)
            right = [bytes(b[: LAYOUT.block_bytes]) == content(n) for b, n in zip(buffers, numbers, strict=True)]
            if not (done.all() and (codes == READ_OK).all() and all(right)):
                problems.append((mine, round_number))
            if round_number < 11:
                segment.free(mine)

    threads = [threading.Thread(target=work, args=(list(range(i, layout_slots, 4)),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not problems
    assert len(reopened(segment).scan().slots) == layout_slots


def test_a_segment_is_preallocated_and_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    """The files have all their blocks from the start, mode 0600, and no unfinished twin."""
    segment = create(tmp_path)
    stats = [path.stat() for path in tmp_path.iterdir()]
    assert sum(stat.st_size for stat in stats) == SEGMENT_BYTES
    assert all(stat.st_size <= stat.st_blocks * 512 and stat.st_mode & 0o777 == 0o600 for stat in stats)
    name = segment.segment_id.hex()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.directory", f"{name}.slots"]
    segment.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 4096), "the header says"),
        (lambda path: os.truncate(slots_path(path), 4096), "the header says"),
        (lambda path: slots_path(path).unlink(), "No such file"),
        (lambda path: os.truncate(path, 100), "100 bytes"),
        (lambda path: path.write_bytes(bytes(SEGMENT_BYTES)), "magic"),
        (lambda path: path.rename(path.with_name("00.directory")), "the header calls it"),
    ],
)
def test_a_file_that_is_not_a_whole_segment_is_refused(tmp_path: Path, spoil: object, reason: str) -> None:
    """Cut, emptied, foreign and renamed files are Invalid, with the reason and the path."""
    segment = create(tmp_path)
    segment.close()
    spoil(segment.path)
    (path,) = tmp_path.glob("*.directory")
    with pytest.raises(Invalid, match=reason):
        FileSegment.open(path, PosixEngine())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_refuses_a_segment_and_keeps_the_others(small_disk: Path) -> None:
    """There is no room for one more: Busy with the remedy, nothing left behind, the stored blocks still served."""
    segments = [create(small_disk)]
    put(segments[0], [0, 1], [1, 2])
    with pytest.raises(Busy, match="free space or lower"):
        segments.extend(create(small_disk) for _ in range(100))
    assert 3 < len(segments) == len(list(small_disk.iterdir())) // 2
    assert served(segments[0]) == dict.fromkeys(names(1, 2), READ_OK)
    segments.pop().unlink()
    segments.append(create(small_disk))
    assert put(segments[-1], [0], [3]) == [True]
    for segment in segments:
        segment.close()


def test_a_segment_says_whether_its_payloads_bypass_the_page_cache(tmp_path: Path) -> None:
    """`direct` is what this file system allows."""
    try:
        os.close(os.open(tmp_path / "try", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
        allowed = True
    except OSError:
        allowed = False
    assert create(tmp_path).direct is allowed


def test_files_that_cannot_be_removed_are_counted_and_cost_no_descriptor(tmp_path: Path) -> None:
    """The segment is closed all the same, and says that its bytes are still there."""
    segment = create(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    segment.path.unlink()
    segment.path.mkdir()
    assert not segment.unlink()
    assert segment.failures.total() == 1 and next(iter(segment.failures)).startswith("unlink: ")
    assert len(os.listdir("/proc/self/fd")) < before
