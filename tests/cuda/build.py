"""Compiles the emulation of CUDA, and has this process or others use it in place of a driver."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = (HERE / "device.c", HERE.parent / "contract" / "stub_libcuda.c")
"""What a later one defines counts only where no earlier one does: its functions are weak."""
PAGE_BYTES = 4096
COMPILE_SECONDS_MAX = 120


def build(folder: Path, name: str = "libcuda.so.1", sources: tuple[Path, ...] = SOURCES) -> Path:
    """A shared library of that name in `folder`; skips the test where there is no compiler or no cuda.h."""
    compiler, triton = shutil.which("cc"), importlib.util.find_spec("triton")
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("cc and triton's cuda.h are needed to build the emulation of CUDA")
    headers = Path(triton.origin).parent / "backends/nvidia/include"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        f"-I{headers}",
        f"-Wl,-soname,{name}",
        "-o",
        str(folder / name),
    ]
    subprocess.run([*command, *map(str, sources)], check=True, timeout=COMPILE_SECONDS_MAX)
    return folder / name


@cache
def load(library: Path) -> None:
    """From now on this process finds the emulation when it asks for the driver; its units are pages, so that tests are small."""
    ctypes.CDLL(None).setenv(b"STUB_CUDA_GRANULARITY", str(PAGE_BYTES).encode(), 1)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def environ(library: Path, **settings: str) -> dict[str, str]:
    """What processes need that shall use it, with its settings (see device.c)."""
    return {"LD_LIBRARY_PATH": str(library.parent), "STUB_CUDA_GRANULARITY": str(PAGE_BYTES), **settings}
