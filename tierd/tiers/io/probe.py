"""Which io engine to use: tried, decided and said, never degraded in silence.

kvikio is tried in a child process with a deadline, because it loads a GPU driver and can spin for ever while doing so.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tierd.errors import Invalid
from tierd.layout import PAGE_BYTES
from tierd.tiers.io import make

_BLOCK_BYTES = 16 * PAGE_BYTES
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")


@dataclass(frozen=True)
class Choice:
    """The engine to `make`, whether its bytes bypass the page cache at that place, and why it was chosen."""

    engine: str
    direct: bool
    reason: str


def probe(folder: Path, wanted: str, timeout_seconds: float, threads: int) -> Choice:
    """Choose the io engine for segment files in `folder`: "posix", "kvikio", or "auto" (kvikio where it serves a GPU).

    Writes and reads one block there. Blocks up to `timeout_seconds` and a little. Raises Invalid when the engine that
    was asked for by name does not work, or none does.
    """
    if wanted == "posix":
        return _posix(folder, "asked for")
    if wanted == "auto" and (lacking := _lacking()):
        return _posix(folder, lacking)
    failure, direct = _try_kvikio(folder, timeout_seconds, threads)
    if not failure:
        return Choice("kvikio", direct, "asked for" if wanted == "kvikio" else "it works and there is a GPU")
    if wanted == "kvikio":
        raise Invalid(f"nvme.io_engine 'kvikio' does not work at {folder}: {failure}; use 'auto' or 'posix'")
    return _posix(folder, f"kvikio does not work: {failure}")


def _posix(folder: Path, reason: str) -> Choice:
    try:
        with _scratch(folder) as path:
            return Choice("posix", try_engine("posix", path, threads=1), reason)
    except (OSError, ValueError) as error:
        raise Invalid(f"no file can be written and read in {folder}: {error}; change nvme.path") from error


def _lacking() -> str:
    """Why kvikio is not even worth a try; empty when it is."""
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed"
    if not any(os.path.exists(device) for device in _GPU_DEVICES):
        return "there is no NVIDIA GPU on this machine"
    return ""


def _try_kvikio(folder: Path, timeout_seconds: float, threads: int) -> tuple[str, bool]:
    """Try kvikio in a process of its own; returns what failed ("" if nothing did) and whether its bytes go direct."""
    try:
        with _scratch(folder) as path:
            return _try_in_child(path, timeout_seconds, threads)
    except OSError as error:
        return str(error), False


def _try_in_child(path: Path, timeout_seconds: float, threads: int) -> tuple[str, bool]:
    failure, output = in_child("tierd.tiers.io.probe", "kvikio", str(path), str(threads), timeout_seconds=timeout_seconds)
    return failure, output == "direct"


def in_child(module: str, *arguments: str, timeout_seconds: float) -> tuple[str, str]:
    """Run a module in a process of its own; returns what failed ("" if nothing did) and what it printed."""
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # a child stuck in the kernel is left behind, we go on
            child.wait(1.0)
        return f"no answer within {timeout_seconds:g} s", ""
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        return last[0], ""
    return "", output.strip()


def try_engine(name: str, path: Path, threads: int) -> bool:
    """Write and read one block of a scratch file; returns whether it went direct, raises whatever went wrong."""
    written, read = _aligned(os.urandom(_BLOCK_BYTES)), _aligned(bytes(_BLOCK_BYTES))
    file = make(name, threads).open(path)
    try:
        for outcome in (*file.write([(0, written)]), *file.read([(0, read)])):
            if outcome:
                raise outcome
    finally:
        file.close()
    if read != written:
        raise ValueError(f"{name} read back other bytes than it wrote")
    return file.direct


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = folder / f".probe-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.truncate(_BLOCK_BYTES)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _aligned(content: bytes) -> memoryview:
    """These bytes in memory that O_DIRECT accepts."""
    buffer = memoryview(mmap.mmap(-1, len(content)))
    buffer[:] = content
    return buffer


if __name__ == "__main__":
    _, engine_name, scratch_name, thread_count = sys.argv
    print("direct" if try_engine(engine_name, Path(scratch_name), int(thread_count)) else "buffered")
