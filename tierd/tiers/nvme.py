"""File segments: the same format as in memory, in two preallocated files, with a copy of the directory kept in memory.

Each step of a write puts whole directory pages into the one file, through the page cache, so that it never waits for
the medium; payloads go to the other by an io engine, past the page cache where possible. Nothing is synced: a lost or
torn write shows up in a CRC or in a payload's digest, and is a miss.
The rule of this file: no payload is written to a slot before FILLING was, and nothing is returned that was not
verified.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, RLock

import numpy as np
import xxhash
from numpy.typing import NDArray

from tierd.errors import Busy, Invalid
from tierd.layout import Namespace
from tierd.tiers.directory import DIGEST_XXH3_64, FILLING, Directory, Scan, Slots, page_ranges
from tierd.tiers.io import Buffer, IoEngine
from tierd.tiers.segment import (
    HEADER_BYTES,
    IDENTITY_BYTES,
    RECENCY_BYTES,
    STATE_BYTES,
    Geometry,
    Header,
    Medium,
)

DIRECTORY, UNFINISHED, SLOTS = ".directory", ".new", ".slots"
"""How the names of a segment's files end, after its id in hex."""
ZEROS = memoryview(bytes(1 << 20))
READ_OK, READ_FAILED, READ_DAMAGED = 0, 1, 2
"""What `FileSegment.read` says per block: good bytes, the medium failed, or other bytes than were written."""
Digest = Callable[[Sequence[Buffer], int], NDArray[np.uint64]]
"""Computes `digests`, wherever the buffers are."""


def digests(payloads: Sequence[Buffer], payload_bytes: int) -> NDArray[np.uint64]:
    """What blocks are verified by when they come back: xxh3-64 of the first bytes of each buffer. Releases the GIL."""
    return np.array([xxhash.xxh3_64_intdigest(memoryview(payload)[:payload_bytes]) for payload in payloads], np.uint64)


class FileSegment:
    """One segment on disk; `path` is its directory's. Thread safe; every method that touches the file blocks.

    Payload buffers are page aligned and `slot_bytes` long (slots of memory segments), of which the first
    `payload_bytes` count; where they are in memory of another kind than the host's, `digest` says how to digest them.
    Failures of the medium are values; `failures` counts them by reason.
    """

    def __init__(self, path: Path, header: Header, io: IoEngine) -> None:
        self.path, self.header = path, header
        self.failures: Counter[str] = Counter()
        self._lock = Lock()  # around changes of the directory's copy: held for microseconds
        self._file_lock = RLock()  # around writes of its pages, so that no older page follows a newer one
        self._count_lock = Lock()
        self._payloads = io.open(slots_path(path))
        try:
            self._pages = _read_directory(path, header.geometry.directory_bytes)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            self._payloads.close()
            raise
        self.directory = Directory(self._pages, header)
        self.directory.holders[:] = 0  # nobody maps a file: bits can only be damage
        self._recency_dirty = np.zeros(header.geometry.slot_count, np.bool_)
        self._freed = np.zeros(header.geometry.slot_count, np.bool_)
        self.is_dirty = False
        """Whether `flush` has something to write."""
        self.shred = False
        """Whether its bytes are to be overwritten before its files are removed."""

    def __repr__(self) -> str:
        return f"<FileSegment {self.path.name}: {self.directory!r}, direct={self.direct}>"

    @classmethod
    def create(cls, folder: Path, namespace: Namespace, segment_bytes: int, epoch: int, io: IoEngine) -> FileSegment:
        """Make a new, preallocated segment file of at most `segment_bytes` in `folder` (its namespace's own).

        Raises Invalid where no block fits, Busy where the file system has no room or fails.
        """
        shape = Geometry.fit(namespace.layout, segment_bytes)
        return cls.format(folder, Header.fresh(Medium.FILE, namespace, shape, epoch), io)

    @classmethod
    def format(cls, folder: Path, header: Header, io: IoEngine) -> FileSegment:
        """Make the files of the segment that a header describes; it is one as soon as its directory has its name."""
        path = folder / f"{header.segment_id.hex()}{DIRECTORY}"
        unfinished, slots = path.with_suffix(UNFINISHED), slots_path(path)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _allocate(slots, header.geometry.slots_bytes, b"")
            _allocate(unfinished, header.geometry.directory_bytes, header.pack())
            unfinished.rename(path)
            return cls(path, header, io)
        except (OSError, RuntimeError) as error:
            for leftover in (unfinished, path, slots):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)
            wanted = header.geometry.total_bytes
            raise Busy(f"no segment of {wanted} bytes in {folder}: {error}; free space or lower nvme.bytes") from error

    @classmethod
    def open(cls, path: Path, io: IoEngine) -> FileSegment:
        """Open a segment as it was left, by the path of its directory.

        Raises Invalid with the reason when it is foreign or damaged, Busy when this process lacks descriptors or
        memory.
        """
        try:
            header, size = read_header(path)
            if header.medium != Medium.FILE:
                raise Invalid(f"{path}: the header says {header.medium.name.lower()}, not file")
            if path.name != (name := f"{header.segment_id.hex()}{DIRECTORY}"):
                raise Invalid(f"{path}: the header calls it {name}")
            shape, slots = header.geometry, slots_path(path)
            for file, found, expected in (
                (path, size, shape.directory_bytes),
                (slots, os.stat(slots).st_size, shape.slots_bytes),
            ):
                if found != expected:
                    raise Invalid(f"{file}: has {found} bytes, the header says {expected}")
            return cls(path, header, io)
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise Busy(f"{path}: {error}; raise the limits (LimitNOFILE=) or use larger segments") from error
            raise Invalid(f"{path}: cannot be opened: {error}") from error

    @property
    def segment_id(self) -> bytes:
        """The segment's 16 random bytes."""
        return self.header.segment_id

    @property
    def direct(self) -> bool:
        """Whether payloads bypass the page cache."""
        return self._payloads.direct

    def write(
        self, slots: Slots, payloads: Sequence[Buffer], hashes: bytes, parents: bytes, digest: Digest = digests
    ) -> NDArray[np.bool_]:
        """Store blocks in free slots; returns which of them are there now. The others' slots are free again.

        hashes and parents are packed. Digests are computed here, so that damage since then is found when a block is read.
        """
        at = np.asarray(slots, dtype=np.int64)
        computed = digest(payloads, self.header.geometry.payload_bytes)
        with self._file_lock:  # no page with a new identity reaches the file before its FILLING
            with self._lock:
                self.directory.begin(at, hashes, parents, computed)
            begun = self._put_states(at) and self._put_identities(at)
        if not begun:
            self._give_up(at)
            return np.zeros(len(at), np.bool_)
        outcomes = self._payloads.write(self._blocks(at, payloads))
        done = np.array([self.noted("write", outcome) for outcome in outcomes], np.bool_)
        with self._lock:
            self.directory.ready(at[done])
            self.directory.free(at[~done])
        if not self._put_states(at):
            self._give_up(at)
            done[:] = False
        return done

    def read(self, slots: Slots, buffers: Sequence[Buffer], digest: Digest = digests) -> NDArray[np.uint8]:
        """Fill each buffer from a slot and verify it; returns READ_OK, READ_FAILED or READ_DAMAGED per block.

        What is not READ_OK must not be used; a damaged slot should not be used again in this life of the daemon. Others may
        have found it damaged since a read of it was decided: it is free then, nobody fills it. The rest of that read is good.
        """
        at = np.asarray(slots, dtype=np.int64)
        with self._lock:
            assert (self.directory.codes()[at] != FILLING).all(), "a slot that is being filled cannot be read"
            rows = self.directory.identity[at]
        outcomes = self._payloads.read(self._blocks(at, buffers))
        came = np.flatnonzero([self.noted("read", outcome) for outcome in outcomes])
        found = digest([buffers[index] for index in came.tolist()], self.header.geometry.payload_bytes)
        right = (rows["digest_kind"][came] == DIGEST_XXH3_64) & (rows["digest"][came] == found)
        codes = np.full(len(at), READ_FAILED, np.uint8)
        codes[came] = np.where(right, READ_OK, READ_DAMAGED)
        for _ in range(len(came) - int(right.sum())):
            self._count("read: digest differs")
        return codes

    def free(self, slots: Slots) -> None:
        """Give slots up; in the file with the next `flush`, or when they are filled again. Never blocks.

        A block that a crash brings back meanwhile is still right: its payload stays until the file says FILLING.
        """
        with self._lock:
            self.directory.free(slots)
        self._freed[np.asarray(slots, dtype=np.int64)] = True
        self.is_dirty = True

    def reset(self, slots: Slots) -> None:
        """Free slots after a scan (its `spare`), so that new generations start above all that the segment has seen."""
        with self._lock:
            self.directory.reset(slots)
        self._put_states(np.asarray(slots, dtype=np.int64))

    def touch(self, slots: Slots, last_use: NDArray[np.uint64] | int, use_counts: NDArray[np.uint32] | int) -> None:
        """Note when (Unix milliseconds) and how often blocks were used; in the file after `flush`. Never
        blocks."""
        self.directory.touch(slots, last_use, use_counts)
        self._recency_dirty[np.asarray(slots, dtype=np.int64)] = True
        self.is_dirty = True

    def flush(self) -> None:
        """Write what `free` and `touch` noted since the last time; nothing any more once the segment is closed."""
        self.is_dirty = False  # first: what is noted from here on may be written now and is written again later
        for noted, put in ((self._freed, self._put_states), (self._recency_dirty, self._put_recency)):
            dirty = np.flatnonzero(noted)
            if len(dirty) and self._descriptor >= 0:
                noted[dirty] = False
                put(dirty)

    def hashes(self, slots: Slots) -> bytes:
        """The packed hashes of the blocks in ready slots."""
        return self.directory.hashes(slots)

    def scan(self) -> Scan:
        """What the directory holds; see `Directory.scan`."""
        with self._lock:
            return self.directory.scan()

    def close(self) -> None:
        """Write what is still to be written and close; nobody may be using the segment."""
        self.flush()
        self._payloads.close()
        with self._file_lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def outdate(self, epoch: int) -> None:
        """Make all that the file has, and what a write under way may still add, stale to whoever reads it; synced.

        Does nothing where the file was removed meanwhile. Raises OSError.
        """
        with suppress(FileNotFoundError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_whole(descriptor, memoryview(self.header.outdated(epoch)), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def wipe(self) -> None:
        """Overwrite all blocks, then their names, and wait for the medium; nothing is noted any more. Raises OSError."""
        self._freed[:] = self._recency_dirty[:] = False
        for path in (slots_path(self.path), self.path):
            with open(path, "r+b", buffering=0) as file:
                for start in range(0, size := os.fstat(file.fileno()).st_size, len(ZEROS)):
                    _write_whole(file.fileno(), ZEROS[: size - start], start)
                os.fsync(file.fileno())

    def unlink(self) -> bool:
        """Close and remove the files; False where they cannot be removed, and keep their bytes."""
        try:
            if self.shred:
                self.wipe()
            self.path.unlink(missing_ok=True)
            slots_path(self.path).unlink(missing_ok=True)
        except OSError as error:
            return self.noted("unlink", error)
        finally:
            self.close()
        return True

    def _blocks(self, at: NDArray[np.int64], buffers: Sequence[Buffer]) -> list[tuple[int, Buffer]]:
        shape = self.header.geometry
        assert all(len(buffer) == shape.slot_bytes for buffer in buffers), "a buffer is a whole slot"
        return list(zip((at * shape.slot_bytes).tolist(), buffers, strict=True))

    def _put_states(self, at: NDArray[np.int64]) -> bool:
        return self._put(self.header.geometry.state_offset, STATE_BYTES, at)

    def _put_identities(self, at: NDArray[np.int64]) -> bool:
        return self._put(self.header.geometry.identity_offset, IDENTITY_BYTES, at)

    def _put_recency(self, at: NDArray[np.int64]) -> bool:
        return self._put(self.header.geometry.recency_offset, RECENCY_BYTES, at)

    def _put(self, column_offset: int, row_bytes: int, at: NDArray[np.int64]) -> bool:
        """Write the directory pages that hold these rows; returns whether the file has them now.

        Pages go out as they are in memory, with what other threads have done to other rows of them meanwhile: all of that
        may be in the file already, since identities wait for their FILLING, payloads for both, and READY for the payload.
        """
        try:
            with self._file_lock:
                if self._descriptor < 0:
                    return False
                for start, length in page_ranges(column_offset, row_bytes, at):
                    _write_whole(self._descriptor, self._pages[start : start + length], start)
        except OSError as error:
            return self.noted("directory", error)
        return True

    def _give_up(self, at: NDArray[np.int64]) -> None:
        """Free slots whose pages could not be written. Should even that not reach the file, its rows are still right:
        a FILLING one is free to a scan, and a READY one has its payload until a next FILLING was written."""
        with self._lock:
            self.directory.free(at)
        self._put_states(at)

    def noted(self, action: str, outcome: Exception | None) -> bool:
        """Count a failure of what was done with the segment, by its reason; returns whether there was none."""
        if outcome is not None:
            code = errno.errorcode.get(outcome.errno or 0, "error") if isinstance(outcome, OSError) else "error"
            self._count(f"{action}: {code}")
        return outcome is None

    def _count(self, reason: str) -> None:
        with self._count_lock:
            self.failures[reason] += 1


def read_header(path: Path) -> tuple[Header, int]:
    """A file's header and size; raises Invalid or OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return Header.unpack(file.read(HEADER_BYTES)), size
        except Invalid as error:
            raise Invalid(f"{path}: {error}") from error


def _read_directory(path: Path, size: int) -> memoryview:
    """A copy of a directory."""
    pages = memoryview(bytearray(size))
    with open(path, "rb", buffering=0) as file:
        received = file.readinto(pages)
    if received != size:
        raise OSError(errno.EIO, f"the directory has {received} bytes, its header says {size}")
    return pages


def sync_folder(folder: Path) -> None:
    """Wait until the medium has what was made and removed in a folder. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def slots_path(directory: Path) -> Path:
    """The file with the slots that belong to a directory."""
    return directory.with_suffix(SLOTS)


def _allocate(path: Path, size: int, start: bytes) -> None:
    """Make a file of `size` bytes that begins with `start`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        _write_whole(descriptor, memoryview(start), 0)
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
