"""`make gpu`: without a GPU it says so and claims nothing; its measurements run, small, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.measure import Machine, Result, all_measurements
from tests.conftest import HAS_GPU

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is an NVIDIA GPU")


@without_gpu
def test_without_a_gpu_nothing_is_run_or_claimed(tmp_path: Path) -> None:
    """Exit status 3 and a plain sentence, before anything is installed."""
    command = [ROOT / "benchmarks" / "gpu" / "run.sh", sys.executable, tmp_path]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert child.returncode == gpu.NO_GPU == 3
    assert "there is no NVIDIA GPU on this machine" in child.stderr
    assert not list(tmp_path.iterdir()) and child.stdout == ""


@without_gpu
def test_a_torch_without_a_gpu_is_told(tmp_path: Path) -> None:
    """The driver may be there and torch built without CUDA: the same status, with torch's version."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    child = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert child.returncode == gpu.NO_GPU
    assert "finds no GPU" in child.stderr


def test_every_measurement_runs_small_on_a_cpu() -> None:
    """With the twins instead of the kernels: names differ, bytes and seconds are positive, shares have baselines."""
    results = list(all_measurements(Machine("cpu", scale=1e-3)))
    assert len({result.name for result in results}) == len(results) > 20
    assert all(result.bytes > 0 and result.seconds > 0 for result in results)
    assert all((result.share is None) == (result.baseline == "") for result in results)


def test_a_report_is_written_under_the_device_and_the_date(tmp_path: Path) -> None:
    """And the table says what share was wanted."""
    report = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00", "results": []}
    file = gpu.write(report, tmp_path)
    assert file.name == "gpu-nvidia-h100-80gb-hbm3-2026-01-02.json"
    assert json.loads(file.read_text()) == report
    assert "40.0% of copy (wanted: 85%)" in gpu.table([Result("gather", 10**9, 1.0, "copy", 0.4, 0.85)])
