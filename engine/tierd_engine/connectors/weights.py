"""What tells a model's weights from others: engines with different ones must not share blocks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
PIECES, PIECE_BYTES = 64, 4096
"""What of a file is read: pieces from its start to its end, at equal distances."""


def weights_of(model: str, revision: str | None) -> str:
    """Names, sizes, times and samples of the weights' files where `model` is on this machine; else its name and revision.

    In a folder these are the files whose suffix says that they are weights, or all that are in and below it. Neither time nor
    samples would be enough: images of containers may have one time for all files, and a training may change a few tensors only.
    """
    path = Path(model)
    if path.is_dir():
        known = [file for file in path.iterdir() if file.suffix in FILES]
        files = known or [file for file in path.rglob("*") if file.is_file()]
    elif path.is_file():
        files = [path]
    else:
        return f"{model}@{revision}"
    return json.dumps([(str(file.relative_to(path)), *looks_of(file)) for file in sorted(files)])


def looks_of(path: Path) -> tuple[int, int, str]:
    """A file's size in bytes, its time in nanoseconds, and a digest of PIECES pieces of it."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        last = max(0, found.st_size - PIECE_BYTES)
        for number in range(PIECES):
            digest.update(os.pread(file.fileno(), PIECE_BYTES, last * number // (PIECES - 1)))
    return found.st_size, found.st_mtime_ns, digest.hexdigest()
