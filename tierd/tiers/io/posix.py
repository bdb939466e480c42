"""The io engine that needs nothing: preadv and pwritev with O_DIRECT, in the caller's thread.

Blocks that follow each other in the file are one call: the kernel keeps the medium busy with all of them at once, and
threads that contend for the interpreter contend less often.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tierd.tiers.io import Block, Outcomes

Call = Callable[[int, list[memoryview], int], int]
RUN_BYTES_MAX = 4 << 20
"""And so at most 1,024 buffers of a page each: what one call takes."""


class PosixEngine:
    """Files read and written by system calls; the caller brings the threads."""

    name = "posix"

    def open(self, path: Path) -> PosixFile:
        """Open with O_DIRECT, or without where the file system refuses it (`direct` says which)."""
        return PosixFile(path)


class PosixFile:
    """One file descriptor."""

    def __init__(self, path: Path) -> None:
        self._descriptor, self.direct = open_direct(path)

    def read(self, blocks: Sequence[Block]) -> Outcomes:
        """Fill each block's buffer from its offset."""
        return self._move_all(os.preadv, blocks)

    def write(self, blocks: Sequence[Block]) -> Outcomes:
        """Write each block's buffer at its offset."""
        return self._move_all(os.pwritev, blocks)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def _move_all(self, call: Call, blocks: Sequence[Block]) -> Outcomes:
        outcomes: Outcomes = []
        for run in runs(blocks):
            outcomes += [None] * len(run) if self._move_run(call, run) else [self._move(call, block) for block in run]
        return outcomes

    def _move_run(self, call: Call, run: Sequence[Block]) -> bool:
        """All of a run by one call; False when that did not do, whatever the reason."""
        try:
            return call(self._descriptor, [buffer for _, buffer in run], run[0][0]) == sum(len(buffer) for _, buffer in run)
        except OSError:
            return False

    def _move(self, call: Call, block: Block) -> Exception | None:
        """Repeat the call until the whole block has moved."""
        offset, buffer = block
        rest = memoryview(buffer)
        try:
            while len(rest):
                moved = call(self._descriptor, [rest], offset)
                if moved == 0:
                    return OSError(errno.EIO, f"the file ends at {offset}, {len(rest)} bytes before the block does")
                rest, offset = rest[moved:], offset + moved
        except OSError as error:
            return error
        return None


def runs(blocks: Sequence[Block]) -> Iterator[Sequence[Block]]:
    """The blocks cut into runs that follow each other in the file, of at most RUN_BYTES_MAX unless a block is longer."""
    first = size = 0
    for at, (offset, buffer) in enumerate(blocks):
        if at > first and (offset != blocks[first][0] + size or size + len(buffer) > RUN_BYTES_MAX):
            yield blocks[first:at]
            first, size = at, 0
        size += len(buffer)
    if blocks:
        yield blocks[first:]


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading and writing, and whether it bypasses the page cache."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False
