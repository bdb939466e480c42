"""`make gpu`: without a GPU it says so and claims nothing; its measurements run, small, on any machine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.measure import Machine, Result
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
    problems: list[str] = []
    machine = Machine("cpu", scale=1e-3)
    results = list(gpu.measured(machine, True, True, end=float("inf"), problems=problems))
    assert problems == []
    assert len({result.name for result in results}) == len(results) > 20
    assert all(result.bytes > 0 and result.seconds > 0 for result in results)
    assert all((result.share is None) == (result.baseline == "") for result in results)


def test_what_fails_or_takes_too_long_does_not_take_the_rest_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that raises is named, and the next one is measured; at the end of the time the rest is said to be missing."""

    def broken() -> Iterator[Result]:
        yield Result("first", 1, 1.0)
        raise OSError("no such library")

    monkeypatch.setattr(gpu, "parts", lambda *_: iter([broken(), iter([Result("second", 1, 1.0), Result("third", 1, 1.0)])]))
    for end, names, said in (
        (float("inf"), ["first", "second", "third"], ["OSError: no such library"]),
        (0.0, ["first"], ["stopped: there was no time for the rest"]),
    ):
        problems: list[str] = []
        assert [result.name for result in gpu.measured(Machine("cpu"), True, True, end, problems)] == names
        assert problems == said


@without_gpu
def test_the_report_has_what_the_doctor_finds_for_a_gpu_tier() -> None:
    """GPUDirect Storage is tried; here it is refused with the reason, and the lack of a driver is an error."""
    found = {one["check"]: one for one in gpu.examine()}
    assert found["gpu driver"]["level"] == "error"
    assert found["gds in use"]["level"] == "warning" and found["gds in use"]["remedy"]


def test_what_cannot_be_imported_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an engine's packages its daemon runs, without the daemon's none of both."""
    there = set(gpu.DAEMON_NEEDS) | set(gpu.ENGINE_NEEDS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    assert gpu.what_can_run() == (True, True, [])
    there.remove("transformers")
    assert gpu.what_can_run() == (True, False, ["left out: an engine; transformers cannot be imported"])
    there.remove("uvloop")
    said = "left out: the daemon, an engine; uvloop, transformers cannot be imported"
    assert gpu.what_can_run() == (False, False, [said])


def test_a_report_is_written_under_the_device_and_the_date(tmp_path: Path) -> None:
    """And the table says what share was wanted."""
    report = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00", "results": []}
    file = gpu.write(report, tmp_path)
    assert file.name == "gpu-nvidia-h100-80gb-hbm3-2026-01-02.json"
    assert json.loads(file.read_text()) == report
    assert "40.0% of copy (wanted: 85%)" in gpu.table([Result("gather", 10**9, 1.0, "copy", 0.4, 0.85)])
