"""Compiles kernels for a GPU that is not there: a driver for Triton that knows its target, and nothing else.

Within `compiling(90)` whatever is launched is compiled for an H100, with the very arguments of the launch, and not run. Only
for processes of their own: where kernels are interpreted there is nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """One kernel as compiled: the PTX, and what ptxas says about spills."""

    name: str
    ptx: str
    spilled_bytes: int
    local_bytes: int

    def widths(self, verb: str, space: str = "global") -> dict[int, int]:
        """How many instructions `ld.global` (or `st.global`, ...) move how many bits at a time."""
        found = re.findall(rf"\b{verb}\.{space}(?:\.\w+)*?(?:\.v(\d))?\.[a-z](\d+) ", self.ptx)
        counts: dict[int, int] = {}
        for vector, bits in found:
            width = int(vector or 1) * int(bits)
            counts[width] = counts.get(width, 0) + 1
        return counts

    def summary(self) -> dict[str, Any]:
        """All that tests ask about, without the PTX."""
        return {
            "name": self.name,
            "spilled_bytes": self.spilled_bytes,
            "local_bytes": self.local_bytes,
            "ld": self.widths("ld"),
            "st": self.widths("st"),
            "fetches": sorted({int(size, 16) for size in re.findall(r"cp\.async\.c[ag][^;]*?, 0x(\w+)", self.ptx)}),
        }


class Target:
    """As much of Triton's driver as compiling needs. Each capability is a device, since Triton keeps kernels per device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU that is compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """A number of its own for each capability."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Some stream."""
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Launch]]:
    """Compile for a compute capability (90 is an H100) what is launched within; gives the list that launches go to."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(compiled.name, compiled.asm["ptx"], *_resources(compiled.asm["ptx"], capability)))

    triton.runtime.driver.set_active(Target(capability))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Bytes of spills and of local memory, from ptxas itself."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert architecture
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture[1]}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    frame = re.search(r"(\d+) bytes stack frame", log)
    assert spills and frame, log
    return sum(spills), int(frame[1])
