"""What the compiler makes of kernels for GPUs that are not there: wide loads and stores, and nothing spilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.launches import CAPABILITIES

COPIES = ("_copy", "_copy", "_store")
QUANTISATION = ("_quantize", "_dequantize") * 4
ATTENTION = ("_attend", "_combine", "_attend", "_attend")
KERNELS = (*COPIES, "_sum_chunks", "_chain_sums", *QUANTISATION, *ATTENTION)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every kernel, compiled by a child process; by compute capability."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.launches"]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=100)
    assert child.returncode == 0, child.stderr
    launches: dict[str, list[dict[str, Any]]] = json.loads(child.stdout)
    return launches


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills(compiled: dict[str, list[dict[str, Any]]], capability: int) -> None:
    """No register goes to local memory, on A100, H100 or B200."""
    launches = compiled[str(capability)]
    assert [launch["name"] for launch in launches] == list(KERNELS)
    assert [launch for launch in launches if launch["spilled_bytes"] or launch["local_bytes"]] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_copies_move_128_bits_at_a_time(compiled: dict[str, list[dict[str, Any]]], capability: int) -> None:
    """All that is stored and as much that is loaded; what is loaded besides are addresses and indexes."""
    for launch in compiled[str(capability)][: len(COPIES)]:
        assert set(launch["st"]) == {"128"}, launch["name"]
        assert launch["ld"]["128"] == launch["st"]["128"], launch["name"]
        assert set(launch["ld"]) == {"128", "64"}, launch["name"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_checksums_read_128_bits_at_a_time(compiled: dict[str, list[dict[str, Any]]], capability: int) -> None:
    """The kernel that reads the payloads loads nothing narrower but a payload's address, and stores nothing narrower."""
    (launch,) = (launch for launch in compiled[str(capability)] if launch["name"] == "_sum_chunks")
    assert set(launch["ld"]) == {"128", "64"} and launch["ld"]["64"] == 1 and set(launch["st"]) == {"128"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_quantisation_moves_128_bits_of_numbers_at_a_time(compiled: dict[str, list[dict[str, Any]]], capability: int) -> None:
    """Numbers as they are, and packed ones where a group lies along a vector; along tokens the packed side is narrower."""
    launches = [launch for launch in compiled[str(capability)] if launch["name"] in QUANTISATION]
    for launch, axis in zip(launches, ["dim"] * 6 + ["tokens"] * 2, strict=True):
        numbers, packed = ("ld", "st") if launch["name"] == "_quantize" else ("st", "ld")
        assert set(launch[numbers]) == {"128"}, launch["name"]
        assert axis == "tokens" or "128" in launch[packed] or "64" in launch[packed], launch["name"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_fetches_keys_and_values_16_bytes_at_a_time(
    compiled: dict[str, list[dict[str, Any]]], capability: int
) -> None:
    """Ahead of their use, past the registers; and out goes 128 bits at a time."""
    for launch in compiled[str(capability)]:
        if launch["name"] == "_attend":
            assert launch["fetches"] == [16]
            assert "128" in launch["st"]
