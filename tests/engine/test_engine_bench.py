"""The bench: its arithmetic, and one small run of all of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import log
from pathlib import Path
from random import Random

from tierd_engine.bench.measure import InfiniteCache
from tierd_engine.bench.pairs import median_most
from tierd_engine.bench.workloads import CONTROL, workloads

COMMAND = Path(sys.executable).parent / "tierd-engine"


def test_the_least_that_can_be_computed() -> None:
    """A prompt's blocks are computed once, its last token always, and what was answered is known but for its last token."""
    infinite = InfiniteCache(16)
    first = list(range(40))
    infinite.ask(first)
    assert infinite.prefill_tokens == 40
    infinite.ask(first)
    assert infinite.prefill_tokens == 40 + 8
    infinite.learn([*first, *range(9)])
    infinite.ask([*first, *range(30)])
    assert infinite.prefill_tokens == 40 + 8 + 22
    infinite.ask(list(range(32)))
    assert infinite.prefill_tokens == 40 + 8 + 22 + 16


def test_the_same_seed_asks_the_same_and_the_control_shares_nothing() -> None:
    """Rounds are comparable; one-shot requests have no common beginning."""
    assert workloads(128, 0.2, seed=1) == workloads(128, 0.2, seed=1) != workloads(128, 0.2, seed=2)
    [control] = [workload for workload in workloads(1000, 1, seed=1) if workload.name == CONTROL]
    assert len({tuple(talk[0].tokens[:16]) for talk in control.talks}) == len(control.talks)


def test_the_bound_of_a_median_holds_as_often_as_it_says() -> None:
    """Of many small samples of something skewed, at least 95 in a hundred have their bound above the true median."""
    dice, tries = Random(1), 4000
    for count in (5, 8, 11, 20):
        bounds = [median_most([dice.expovariate(1.0) for _ in range(count)]) for _ in range(tries)]
        held = sum(bound is not None and bound >= log(2) for bound in bounds)
        assert 0.94 * tries <= held < tries
    assert median_most([1.0] * 4) is None, "four of four coins show heads too often"


def test_a_small_bench_runs_through(llama: Path, tmp_path: Path) -> None:
    """Every mode and workload is measured, tierd saves prompt tokens, and the report says on what it ran."""
    command = [COMMAND, "bench", llama, "--rounds", 1, "--scale", 0.03, "--work-dir", tmp_path, "--pool-tokens", 4096]
    files = {"--json": tmp_path / "report.json", "--html": tmp_path / "report.html"}
    for option, file in files.items():
        command += [option, file]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    report = json.loads(files["--json"].read_text())
    found = {(one["workload"], one["mode"], one["block_tokens"]): one["median"] for one in report["results"]}
    assert len(found) == 4 * 4 + 3
    for one in found.values():
        assert one["prefill_tokens"] >= one["prefill_tokens_min"] > 0 and one["requests"] > 0
    assert found["prefix-reuse", "cpu", 16]["prefill_tokens"] < found["prefix-reuse", "off", 16]["prefill_tokens"]
    assert found["prefix-reuse", "all", 16]["prefill_tokens"] < found["prefix-reuse", "off", 16]["prefill_tokens"]
    assert found["prefix-reuse", "all", 16]["blocks_by_tier"]["gpu"] > 0
    pairs = {(one["workload"], one["mode"]): one for one in report["paired"]}
    assert len(pairs) == 4 * 3 and all(one["seconds_ratio"] > 0 and one["cpu_ratio"] > 0 for one in pairs.values())
    assert report["machine"]["cores"] > 0 and report["machine"]["torch"] in done.stderr.replace("\n", "")
    page = files["--html"].read_text()
    assert page.count("<svg") == 3 and not re.search(r"(src|href)=", page)
    assert list(tmp_path.glob("bench-*")) == []
