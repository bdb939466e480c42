"""The io engine that needs nothing: preadv and pwritev with O_DIRECT, in the caller's thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tierd.tiers.io import Block, Outcomes


class PosixEngine:
    """Files read and written by system calls, one block after the other; the caller brings the threads."""

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
        return [self._move(os.preadv, block) for block in blocks]

    def write(self, blocks: Sequence[Block]) -> Outcomes:
        """Write each block's buffer at its offset."""
        return [self._move(os.pwritev, block) for block in blocks]

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def _move(self, call: Callable[[int, list[memoryview], int], int], block: Block) -> Exception | None:
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


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading and writing, and whether it bypasses the page cache."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False
