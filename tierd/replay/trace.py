"""Traces of requests, as JSON lines in the format of Mooncake (Qin et al., FAST 2025), plain or gzip.

A line is one request: `timestamp` (ms from any start, never falling), `input_length` (tokens), `hash_ids` (the prompt's
blocks; an id names a block *and* all before it, so it has one parent), and where known `stop` (why the turn ended).
`output_length`, `session_id` and other fields are let through. What is wrong is refused with file, line and field.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.errors import Invalid

Ids = NDArray[np.int32]
GZIP_MAGIC = b"\x1f\x8b"
LINE_BYTES_MAX = 64 << 20
LINES_BETWEEN_REPORTS = 256
ID_MAX = (1 << 63) - 1


@dataclass(frozen=True)
class Request:
    """One line: when (ms), how many tokens, which blocks (int32[n], numbered through the trace), why its turn ended."""

    now: int
    tokens: int
    blocks: Ids
    stop: str | None


@dataclass(frozen=True)
class Trace:
    """All requests of one file; `block_tokens` is inferred from their lengths."""

    name: str
    requests: list[Request]
    unique_blocks: int
    block_tokens: int

    @property
    def accesses(self) -> int:
        """Blocks asked for, by all requests together."""
        return sum(len(request.blocks) for request in self.requests)

    @property
    def tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.tokens for request in self.requests)

    def hashes(self) -> Iterator[bytes]:
        """The packed 32-byte hashes of each request's blocks, which are random to whoever reads them."""
        names = block_hashes(self.unique_blocks)
        for request in self.requests:
            yield names[request.blocks].tobytes()


def read_trace(file: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Trace:
    """Read a file; `progress` is called with the bytes read so far and their total (compressed ones of a gzip file)."""
    numbers: dict[int, int] = {}
    parents: list[int] = []
    requests: list[Request] = []
    latest = 0
    for number, line in enumerate(read_lines(file, progress), 1):
        request = parse(file, number, line, numbers, parents)
        if request.now < latest:
            refuse(file, number, "timestamp", f"goes back from {latest} to {request.now} ms: sort the lines by it")
        latest = request.now
        requests.append(request)
    if not numbers:
        what = f"its {len(requests)} requests have no blocks" if requests else "it has no lines"
        raise Invalid(f"{file}: {what}; a trace has one JSON object a line, with timestamp, input_length and hash_ids")
    return Trace(file.name.removesuffix(".gz").removesuffix(".jsonl"), requests, len(numbers), block_tokens(requests))


def read_lines(file: Path, progress: Callable[[int, int], None]) -> Iterator[bytes]:
    """The lines of a plain or gzip file that are not blank."""
    try:
        with file.open("rb") as raw:
            total = file.stat().st_size
            packed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            raw.seek(0)
            lines = gzip.GzipFile(fileobj=raw) if packed else raw
            for number in range(1, ID_MAX):
                if not (line := lines.readline(LINE_BYTES_MAX + 1)):
                    break
                if len(line) > LINE_BYTES_MAX:
                    raise Invalid(f"{file}, line {number}: over {LINE_BYTES_MAX} bytes; a line is one request")
                if number % LINES_BETWEEN_REPORTS == 0:
                    progress(raw.tell(), total)
                yield line
            progress(total, total)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Invalid(f"{file}: not a whole gzip file ({error}): copy it again") from error
    except OSError as error:
        raise Invalid(f"{file} cannot be read ({error.strerror}): give the path of a trace") from error


def parse(file: Path, number: int, line: bytes, numbers: dict[int, int], parents: list[int]) -> Request:
    """One request; ids are numbered in the order in which they come, each with its one parent (-1: none)."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{file}, line {number}: not JSON ({error}); a line is one request, as a JSON object") from error
    if not isinstance(fields, dict):
        raise Invalid(f"{file}, line {number}: {str(fields)[:40]!r} is not a JSON object; a line is one request")
    now = whole(file, number, fields, "timestamp")
    tokens = whole(file, number, fields, "input_length")
    stop = fields.get("stop")
    if stop is not None and not isinstance(stop, str):
        refuse(file, number, "stop", f"is {stop!r}, which is not text")
    ids = fields.get("hash_ids")
    if not isinstance(ids, list):
        refuse(
            file, number, "hash_ids", f"is {str(ids)[:40]}, not a list of block ids" if "hash_ids" in fields else "is missing"
        )
    if len(ids) > tokens:
        refuse(file, number, "hash_ids", f"has {len(ids)} blocks for input_length {tokens}: a block has at least one token")
    blocks = np.empty(len(ids), np.int32)
    above = -1
    for at, name in enumerate(ids):
        if type(name) is not int or not 0 <= name <= ID_MAX:
            refuse(file, number, "hash_ids", f"has {str(name)[:40]!r} at {at}: an id is a whole number from 0 to 2^63 - 1")
        block = numbers.setdefault(name, len(parents))
        if block == len(parents):
            parents.append(above)
        elif parents[block] != above:
            refuse(
                file, number, "hash_ids", f"has block {name} at {at} behind another block than before: ids name whole prefixes"
            )
        blocks[at] = above = block
    return Request(now, tokens, blocks, stop)


def whole(file: Path, number: int, fields: dict[str, Any], name: str) -> int:
    """A field that is a number of at least zero; the fraction of a millisecond is cut off."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= ID_MAX:
        refuse(file, number, name, f"is {str(value)[:40]!r}, not a number from 0" if name in fields else "is missing")
    return int(value)


def refuse(file: Path, number: int, name: str, what: str) -> NoReturn:
    raise Invalid(f"{file}, line {number}: field {name} {what}")


def block_tokens(requests: list[Request]) -> int:
    """Tokens of a block: the largest size that gives no request more tokens in whole blocks than it has.

    Where the last block of a prompt may be part of one, this would be too small: then it is the smallest size for which
    the blocks of every prompt hold all of its tokens.
    """
    pairs = [(request.tokens, len(request.blocks)) for request in requests if len(request.blocks)]
    whole_blocks = min(tokens // blocks for tokens, blocks in pairs)
    if all(tokens // whole_blocks == blocks for tokens, blocks in pairs):
        return whole_blocks
    parts = max(-(-tokens // blocks) for tokens, blocks in pairs)
    return parts if all(-(-tokens // parts) == blocks for tokens, blocks in pairs) else whole_blocks


def block_hashes(count: int) -> NDArray[np.uint64]:
    """A name for each of `count` blocks (uint64[count, 4]): splitmix64 (Steele et al., OOPSLA 2014) of its number."""
    words = HASH_BYTES // 8
    state = (np.arange(1, count * words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).reshape(count, words)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return hashes
