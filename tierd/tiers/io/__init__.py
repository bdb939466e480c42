"""How bytes get between memory and files: one small interface, several engines behind it.

The rule of this package: a block's failure is a value, not an exception, so that one bad block does not lose its
batch; and every call blocks its thread (with the GIL released) until the last byte of its list has moved or failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tierd.errors import Invalid

Buffer = Any
"""Contiguous bytes: a row of a segment's slots, a memoryview, a bytearray (numpy's types lack the buffer protocol)."""
Block = tuple[int, Buffer]
"""Offset in the file and the memory to fill or to write. With O_DIRECT both, and the length, are multiples of a
page."""
Outcomes = list[Exception | None]
"""Per block: None, or why it failed."""


class Io(NamedTuple):
    """How NVMe is reached: the engine, its path ("direct", "buffered") and the best from a GPU ("gds", "bounce"), or "none"."""

    engine: str
    path: str
    gpu: str = "none"


class IoFile(Protocol):
    """An open file; thread safe. `direct` says whether its bytes bypass the page cache."""

    direct: bool

    def read(self, blocks: Sequence[Block]) -> Outcomes:
        """Fill each block's buffer from its offset."""

    def write(self, blocks: Sequence[Block]) -> Outcomes:
        """Write each block's buffer at its offset."""

    def close(self) -> None:
        """Close the file; nobody may be using it."""


class IoEngine(Protocol):
    """A way to open files. `name` is what metrics and `tierd doctor` call it."""

    name: str

    def open(self, path: Path) -> IoFile:
        """Open an existing file for reading and writing, past the page cache where the file system allows."""


def make(name: str, threads: int) -> IoEngine:
    """The engine of that name; `threads` is the size of the engine's own pool, where it has one."""
    if name == "posix":
        from tierd.tiers.io.posix import PosixEngine

        return PosixEngine()
    if name == "kvikio":
        from tierd.tiers.io.kvikio import KvikioEngine

        return KvikioEngine(threads)
    raise Invalid(f"nvme.io_engine {name!r} is not one of posix, kvikio")
