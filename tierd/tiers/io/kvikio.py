"""The io engine of NVIDIA's kvikio: its own pool of threads, O_DIRECT for memory of the host, GPUDirect Storage for a GPU's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kvikio
import kvikio.defaults

from tierd.errors import Invalid
from tierd.tiers.io import Block, Buffer, Outcomes
from tierd.tiers.io.posix import open_direct

THREADS_MAX = 256


class KvikioEngine:
    """Files read and written by kvikio. Its settings are global to the process, so there is one engine in it."""

    name = "kvikio"

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= THREADS_MAX:
            raise Invalid(f"nvme.io_threads is {threads}, kvikio takes 1 to {THREADS_MAX}")
        settings = {"num_threads": threads, "auto_direct_io_read": True, "auto_direct_io_write": True}
        kvikio.defaults.set(settings | {"gds_threshold": 0})  # a GPU's small blocks go straight as well, or not at all

    def open(self, path: Path) -> KvikioFile:
        """Open for both directions; raises OSError or RuntimeError."""
        return KvikioFile(path)


class KvikioFile:
    """One `kvikio.CuFile`. All blocks of a call are in flight at once."""

    def __init__(self, path: Path) -> None:
        descriptor, self.direct = open_direct(path)  # kvikio falls back without a word, so try what it will try
        os.close(descriptor)
        self._file = kvikio.CuFile(path, "r+")

    def read(self, blocks: Sequence[Block]) -> Outcomes:
        """Fill each block's buffer from its offset."""
        return _move(self._file.pread, blocks)

    def write(self, blocks: Sequence[Block]) -> Outcomes:
        """Write each block's buffer at its offset."""
        return _move(self._file.pwrite, blocks)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _move(call: Callable[..., Any], blocks: Sequence[Block]) -> Outcomes:
    """Submit all blocks, then wait for all: a future does not keep its buffer alive and cannot be cancelled."""
    futures = [_submit(call, offset, buffer) for offset, buffer in blocks]
    return [_outcome(future, len(buffer)) for future, (_, buffer) in zip(futures, blocks, strict=True)]


def _submit(call: Callable[..., Any], offset: int, buffer: Buffer) -> Any:
    try:
        return call(buffer, size=len(buffer), file_offset=offset)
    except RuntimeError as error:
        return error


def _outcome(future: Any, expected: int) -> Exception | None:
    if isinstance(future, Exception):
        return future
    try:
        moved = future.get()
    except RuntimeError as error:  # kvikio's only error; the cause is in its text
        return error
    return None if moved == expected else OSError(errno.EIO, f"kvikio moved {moved} of {expected} bytes")
