"""The PTX that ships with tierd is what the compiler makes of the kernels, and every GPU from sm_80 on can have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.nvidia.compiler import get_ptxas

from tierd.tiers.kernels import FOLDER, about

FILES = ("digest.json", "sum_chunks.ptx", "chain_sums.ptx")


def test_the_files_that_ship_are_those_that_the_compiler_writes(tmp_path: Path) -> None:
    """To the byte; after a change of the kernels, or of Triton's pinned version, `make ptx` writes them anew."""
    if about()["compiler"] != f"triton {triton.__version__}":
        pytest.skip(f"they were written by {about()['compiler']}, and here is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "tierd_kernels.ahead", str(tmp_path / "ptx")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert child.returncode == 0, child.stderr
    assert sorted(file.name for file in (tmp_path / "ptx").iterdir()) == sorted(FILES)
    for name in FILES:
        assert (FOLDER / name).read_text() == (tmp_path / "ptx" / name).read_text(), f"{name} is old: make ptx"


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_gpus_from_sm_80_on_can_have_it(capability: int, tmp_path: Path) -> None:
    """NVIDIA's assembler, which is in the driver too, takes it for A100, L40S, H100, B200 and what is between and beside."""
    for name in about()["kernels"]:
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}", str(FOLDER / f"{name}.ptx")]
        done = subprocess.run([*command, "-o", str(tmp_path / "binary")], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr


def test_it_needs_no_newer_driver_than_the_rest_of_tierd() -> None:
    """PTX 7.0 came with CUDA 11.0, calls in tierd/driver.py with 11.4; and no file of the compiling machine is named in it."""
    for name in about()["kernels"]:
        text = (FOLDER / f"{name}.ptx").read_text()
        assert ".version 7.0\n.target sm_80\n" in text and ".file" not in text and ".loc" not in text
        assert json.loads((FOLDER / "digest.json").read_text())["kernels"][name]["name"] in text
