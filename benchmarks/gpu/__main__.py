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
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import torch
import triton

from benchmarks.gpu.decode import decode
from benchmarks.gpu.measure import Machine, Result, checksums, copies, copy_bandwidth, pinned, quantisation

OK, FAILED, NO_GPU = 0, 1, 3
TESTS_SECONDS_MAX, DOCTOR_SECONDS_MAX, SECONDS_MAX = 240, 60, 420
DAEMON_NEEDS = ("aiofiles", "msgpack", "prometheus_client", "uvloop")
DAEMON_TESTS = ("tests/daemon/test_gpu.py", "tests/cuda/test_kernels.py")
ENGINE_NEEDS = ("accelerate", "safetensors", "tokenizers", "transformers")
ENGINE_TESTS = ("tests/engine/test_engine_kernels.py", "tests/daemon/test_pinned_gpu.py")
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
    with_daemon, with_engine, learned = what_can_run()
    tests, passed, found_out = run_tests(with_daemon, with_engine)
    findings = examine() if with_daemon else []
    learned += found_out + [f"{one['check']}: {one['found']}" for one in findings if one["check"].startswith(("gds", "doctor"))]
    results: list[Result] = []
    problems: list[str] = []
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
        "doctor": findings,
        "problems": problems,
        "results": [],
    }
    for result in measured(Machine("cuda"), with_daemon, with_engine, start + SECONDS_MAX, problems):
        results.append(result)
        print(line(result), flush=True)
        report["results"] = [asdict(one) | {"gb_per_second": one.gb_per_second} for one in results]
        write(report, RESULTS)  # each time: what was measured is kept, whatever comes
    file = write(report, RESULTS)
    print("\n".join(["", tests, *learned, table(results), *problems, f"written to {file}"]))
    return OK if passed and not problems else FAILED


def what_can_run() -> tuple[bool, bool, list[str]]:
    """Whether a daemon and an engine can run with the packages that there are, and what that leaves out."""
    lacking = [name for name in (*DAEMON_NEEDS, *ENGINE_NEEDS) if importlib.util.find_spec(name) is None]
    with_daemon, with_engine = not set(lacking) & set(DAEMON_NEEDS), not lacking
    left_out = "an engine" if with_daemon else "the daemon, an engine"
    return with_daemon, with_engine, [f"left out: {left_out}; {', '.join(lacking)} cannot be imported"] if lacking else []


def measured(machine: Machine, with_daemon: bool, with_engine: bool, end: float, problems: list[str]) -> Iterator[Result]:
    """Everything that can be measured until `end`, on the monotonic clock; what fails is a problem, and the others go on."""
    for part in parts(machine, with_daemon, with_engine):
        try:
            for result in part:
                yield result
                if monotonic() > end:
                    problems.append("stopped: there was no time for the rest")
                    return
        except Exception as error:  # of one part, whatever it is
            traceback.print_exc()
            problems.append(f"{type(error).__name__}: {error}")


def parts(machine: Machine, with_daemon: bool, with_engine: bool) -> Iterator[Iterator[Result]]:
    """The measurements that belong together, cheapest first."""
    memory = copy_bandwidth(machine)
    yield iter([memory])
    yield from (copies(machine, memory), pinned(machine), checksums(machine, memory))
    yield from (quantisation(machine, memory), decode(machine, memory))
    if with_daemon:
        from benchmarks.gpu.service import client_copies, digests_by_driver, through_daemon

        yield from (client_copies(machine), digests_by_driver(machine, memory), through_daemon(machine))
    if with_engine:
        from benchmarks.gpu.step import decode_beside_traffic

        yield decode_beside_traffic(machine)


def run_tests(with_daemon: bool, with_engine: bool) -> tuple[str, bool, list[str]]:
    """The tests that need a GPU; returns pytest's last line, whether all passed, and what was found out on the way."""
    files = ["tests/kernels", *(DAEMON_TESTS if with_daemon else ()), *(ENGINE_TESTS if with_engine else ())]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    try:
        child = subprocess.run(command, text=True, stdout=subprocess.PIPE, timeout=TESTS_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        return f"tests took more than {TESTS_SECONDS_MAX} seconds", False, []
    if child.returncode:
        print(child.stdout)
    learned = sorted(set(re.findall(r"UserWarning: (an exported allocation .*)", child.stdout)))
    return child.stdout.strip().splitlines()[-1], child.returncode == 0, learned


def examine() -> list[dict[str, str]]:
    """What `tierd doctor` finds for a gpu tier on this GPU: GPUDirect Storage is tried, in the folder of temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tierd", "doctor", "--json", "--state-dir", folder]
        command += ["--set", "gpu.bytes=1GiB", "--set", "gpu.device=cuda:0"]
        try:
            child = subprocess.run(command, text=True, stdout=subprocess.PIPE, timeout=DOCTOR_SECONDS_MAX)
            findings: list[dict[str, str]] = json.loads(child.stdout)["findings"]
        except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
            return [{"check": "doctor", "level": "error", "found": f"it failed: {error}", "remedy": ""}]
    return findings


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
