"""Compiles the emulation of CUDA, and has this process or others use it in place of a driver."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CUDA, CUFILE = "libcuda.so.1", "libcufile.so.0"
SOURCES = (HERE / "device.c", HERE / "ptx.c", HERE.parent / "contract" / "stub_libcuda.c")
"""What a later one defines counts only where no earlier one does: its functions are weak."""
PAGE_BYTES = 4096
COMPILE_SECONDS_MAX = 120


def build(folder: Path, name: str = CUDA, sources: tuple[Path, ...] = SOURCES) -> Path:
    """A shared library of that name in `folder`; skips the test where there is no compiler, or the headers are missing."""
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{name}"]
    compile_c([*options, "-o", str(folder / name), *map(str, sources)])
    return folder / name


def compile_c(arguments: list[str]) -> None:
    """Run the C compiler with the real headers of CUDA and cuFile, which come with triton and nvidia-cufile."""
    compiler, (triton, nvidia) = shutil.which("cc"), map(importlib.util.find_spec, ("triton", "nvidia"))
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("cc and triton's cuda.h are needed to build the emulation of CUDA")
    folders = [Path(triton.origin).parent / "backends/nvidia/include"]
    folders += [Path(place) / "cu13/include" for place in (nvidia and nvidia.submodule_search_locations) or ()]
    headers = [f"-I{folder}" for folder in folders]
    subprocess.run([compiler, *headers, *arguments], check=True, timeout=COMPILE_SECONDS_MAX)


def load(library: Path) -> None:
    """From now on this process finds the emulation when it asks for the driver; its units are pages: tests are small.

    Skips the test where there is a real GPU: one process cannot have both drivers.
    """
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a real driver, which this process may have to use")
    ctypes.CDLL(None).setenv(b"STUB_CUDA_GRANULARITY", str(PAGE_BYTES).encode(), 1)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def environ(library: Path, **settings: str) -> dict[str, str]:
    """What processes need that shall use it, with its settings (see device.c)."""
    return {"LD_LIBRARY_PATH": str(library.parent), "STUB_CUDA_GRANULARITY": str(PAGE_BYTES), **settings}


def with_cufile(library: Path, **settings: str) -> dict[str, str]:
    """The same, with an emulated cuFile in place of the one that kvikio brings, and kvikio told to use it."""
    cufile = library.parent / CUFILE
    if not cufile.exists():
        build(library.parent, CUFILE, (HERE / "cufile.c",))
    return environ(library, LD_PRELOAD=str(cufile), KVIKIO_COMPAT_MODE="OFF", **settings)
