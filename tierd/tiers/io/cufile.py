"""Which way bytes really took between files and a GPU, as cuFile itself counts it (cuFileGetStatsL3, from cuFile 1.14 on).

cuFile has a compatibility mode of its own, in which it copies through host memory and whoever called it sees no difference; so
what it counts is the only truth. kvikio loads the library; this asks the one that is loaded, and loads none.

Source: cufile.h, CUfileStatsLevel3_t.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from ctypes import Structure, c_char, c_int, c_uint32, c_uint64
from functools import cache

LIBRARY = "libcufile.so.0"
LEVEL = 3
WAYS = ("p2p", "nvfs", "posix")
"""Straight by the kernel's PCI peer-to-peer DMA, straight by nvidia-fs, and through host memory."""
_GPUS_MAX, _UUID_BYTES, _DETAILED_NUMBERS = 16, 16, 128


class _Error(Structure):
    """CUfileError_t."""

    _fields_ = (("file", c_int), ("driver", c_int))


class GpuStatistics(Structure):
    """CUfilePerGpuStats_t."""

    _fields_ = (
        ("uuid", c_char * _UUID_BYTES),
        ("read_bytes_and_speed", c_uint64 * 4),
        ("reads_all", c_uint64),
        ("reads", c_uint64 * len(WAYS)),
        ("reads_other", c_uint64 * 5),
        ("write_bytes_and_speed", c_uint64 * 4),
        ("writes_all", c_uint64),
        ("writes", c_uint64 * len(WAYS)),
        ("writes_other", c_uint64 * 3),
        ("registrations", c_uint64 * 5),
    )


class Statistics(Structure):
    """CUfileStatsLevel3_t."""

    _fields_ = (("detailed", c_uint64 * _DETAILED_NUMBERS), ("gpus", c_uint32), ("per_gpu", GpuStatistics * _GPUS_MAX))


def start() -> bool:
    """Open cuFile's driver and begin to count; False where it is not loaded, does not work or has no statistics.

    May never return: some releases spin in `cuFileDriverOpen` where /proc/modules is missing.
    """
    library = _library()
    if library is None or library.cuFileDriverOpen().file or library.cuFileSetStatsLevel(LEVEL).file:
        return False
    return not library.cuFileStatsStart().file


def operations() -> Counter[tuple[str, str]] | None:
    """Reads and writes since `start`, by way and direction ("read", "write"); None where nothing is counted."""
    library, found = _library(), Statistics()
    if library is None or library.cuFileGetStatsL3(ctypes.byref(found)).file:
        return None
    counted: Counter[tuple[str, str]] = Counter()
    for gpu in found.per_gpu[: found.gpus]:
        for way, reads, writes in zip(WAYS, gpu.reads, gpu.writes, strict=True):
            counted[way, "read"] += reads
            counted[way, "write"] += writes
    return counted


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        for name in ("cuFileDriverOpen", "cuFileSetStatsLevel", "cuFileStatsStart", "cuFileGetStatsL3"):
            getattr(library, name).restype = _Error
    except (OSError, AttributeError):
        return None
    return library
