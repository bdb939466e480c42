"""`python -m benchmarks.gpu`: the gpu tests, then the measurements; writes benchmarks/results/gpu-<device>-<date>.json.

Exit status: 0 all well, 1 a test or a measurement failed, 3 there is no GPU that torch can use: nothing was run.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import torch
import triton

from benchmarks.gpu.measure import Machine, Result, all_measurements

OK, FAILED, NO_GPU = 0, 1, 3
TESTS_SECONDS_MAX, SECONDS_MAX = 240, 450
ENGINE_NEEDS = ("accelerate", "aiofiles", "msgpack", "prometheus_client", "safetensors", "tokenizers", "transformers", "uvloop")
ENGINE_TESTS = ("tests/engine/test_engine_kernels.py", "tests/daemon/test_pinned_gpu.py", "tests/daemon/test_gpu.py")
RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Test, measure, write and print; returns the exit status."""
    if not torch.cuda.is_available():
        print(
            f"make gpu: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU, so nothing was run and nothing "
            "can be claimed",
            file=sys.stderr,
        )
        return NO_GPU
    start = monotonic()
    tests, passed, learned = run_tests()
    results, problem = [], ""
    try:
        for result in all_measurements(Machine("cuda")):
            results.append(result)
            print(line(result), flush=True)
            if monotonic() - start > SECONDS_MAX:
                problem = f"stopped after {SECONDS_MAX} seconds: what is missing was not measured"
                break
    except (RuntimeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tests": tests,
        "tests_passed": passed,
        "learned": learned,
        "problem": problem,
        "results": [asdict(result) | {"gb_per_second": result.gb_per_second} for result in results],
    }
    print("\n".join(["", tests, *learned]))
    print(f"{table(results)}\n{problem}\nwritten to {write(report, RESULTS)}")
    return OK if passed and not problem else FAILED


def run_tests() -> tuple[str, bool, list[str]]:
    """The tests that need a GPU; returns pytest's last line, whether all passed, and what was found out on the way."""
    lacking = [package for package in ENGINE_NEEDS if importlib.util.find_spec(package) is None]
    learned = [f"tests of the engine and its daemon were left out: {', '.join(lacking)} cannot be imported"] if lacking else []
    files = ["tests/kernels", *([] if lacking else ENGINE_TESTS)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    try:
        child = subprocess.run(command, text=True, stdout=subprocess.PIPE, timeout=TESTS_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        return f"tests took more than {TESTS_SECONDS_MAX} seconds", False, learned
    if child.returncode:
        print(child.stdout)
    learned += sorted(set(re.findall(r"UserWarning: (an exported allocation .*)", child.stdout)))
    return child.stdout.strip().splitlines()[-1], child.returncode == 0, learned


def line(result: Result) -> str:
    """One row of the table."""
    share = "" if result.share is None else f"{result.share:7.1%} of {result.baseline}"
    wanted = "" if result.target is None else f" (wanted: {result.target:.0%})"
    return f"{result.name:62} {result.gb_per_second:9.1f} GB/s {share}{wanted}"


def table(results: Iterable[Result]) -> str:
    """All rows."""
    return "\n".join(line(result) for result in results)


def write(report: dict[str, object], folder: Path) -> Path:
    """Keep a report; returns its file."""
    device = re.sub(r"\W+", "-", str(report["device"])).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu-{device}-{str(report['date'])[:10]}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
