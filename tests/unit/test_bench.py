"""`tierd bench`: each bench runs by itself, says what it promises, leaves nothing behind. Not how fast anything is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierd.bench import machine, report
from tierd.bench.echo import Echo
from tierd.bench.prompts import BLOCKS_MAX, KINDS
from tierd.bench.raw import RawFile, in_huge_pages
from tierd.bench.scratch import LAYOUTS, READY_SECONDS_MAX, scratch_daemon, scratch_folder
from tierd.block import HASH_BYTES
from tierd.cli import USAGE
from tierd.clock import monotonic_seconds
from tierd.errors import Closed, Invalid

ROW_KEYS = {
    "lookup": {"blocks", "hit_us_p50", "hit_us_p99", "miss_us_p50"},
    "transfer": {"block_bytes", "store_bytes_per_second", "load_bytes_per_second", "memcpy_bytes_per_second"},
    "nvme": {
        "block_bytes",
        "io_engine",
        "write_bytes_per_second",
        "read_bytes_per_second",
        "raw_write_bytes_per_second",
        "raw_read_bytes_per_second",
    },
    "index": {"blocks", "bytes_per_block", "insert_blocks_per_second"},
}
ROWS = {
    "lookup": {("blocks", 32), ("blocks", 8192)},
    "transfer": {("block_bytes", 368_640), ("block_bytes", 2_097_152)},
    "nvme": {("block_bytes", 368_640), ("block_bytes", 2_097_152)},
    "index": {("prompts", "realistic"), ("prompts", "adversarial"), ("turnover", 1), ("turnover", 10)},
}


def bench(*arguments: str) -> list[str]:
    """The command line of `tierd bench`."""
    return [sys.executable, "-m", "tierd", "bench", *arguments]


@pytest.mark.parametrize("name", ROW_KEYS)
def test_a_bench_prints_one_object_with_its_rows(name: str, tmp_path: Path) -> None:
    """A program finds every figure under the name it is promised under, all over zero, and the machine beside them."""
    command = bench(name, "--json", "--quick", "--directory", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    assert printed["bench"] == name
    assert {"cpu", "cores", "memory_bytes", "kernel", "python", "gpu", "filesystem", "steal_share"} <= printed["machine"].keys()
    for row in printed["rows"]:
        assert ROW_KEYS[name] <= row.keys()
        assert all(value > 0 for key, value in row.items() if key.endswith(("_p50", "_p99", "_second", "_block", "_ratio")))
    assert {(key, value) for row in printed["rows"] for key, value in row.items() if type(value) in (int, str)} >= ROWS[name]
    assert list(tmp_path.iterdir()) == []


def test_a_person_gets_a_table_with_ceilings_and_verdicts(tmp_path: Path) -> None:
    """The machine, the rows, what was compared with what, and whether each floor is met."""
    command = bench("lookup", "--quick", "--directory", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("hit p50", "socket p50", "8,192", "kernel", "floor of 500 us", "ceiling: "):
        assert part in done.stdout


def test_an_interrupted_bench_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither its daemon nor its files."""
    child = subprocess.Popen(bench("transfer", "--directory", str(tmp_path)), stderr=subprocess.PIPE)
    deadline = monotonic_seconds() + READY_SECONDS_MAX
    while not (locks := list(tmp_path.glob("*/lock"))) or not locks[0].read_text().strip():
        assert monotonic_seconds() < deadline and child.poll() is None
    daemon = int(locks[0].read_text())
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    with pytest.raises(ProcessLookupError):
        os.kill(daemon, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """With its name and what to do."""
    command = bench("nvme", "--quick", "--directory", str(tmp_path / "absent"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == USAGE
    assert str(tmp_path / "absent") in done.stderr and "name another one" in done.stderr


def test_a_full_disk_is_noticed_before_measuring(tmp_path: Path) -> None:
    """What is needed and what there is, and no scratch folder stays."""
    with pytest.raises(Invalid, match="MiB free, there are"), scratch_folder(tmp_path, needed_bytes=1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The end of its log is in the error."""
    with pytest.raises(Closed, match="io_engine"), scratch_daemon(tmp_path, nvme__io_engine="abacus"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_layouts_have_the_block_sizes_they_stand_for() -> None:
    """360 KiB and 2 MiB are two models' real blocks."""
    assert all(layout.block_bytes == block_bytes for block_bytes, layout in LAYOUTS.items())


def test_a_bare_round_trip_carries_as_many_bytes_as_it_is_told() -> None:
    """More than a socket buffer holds, both ways, several times."""
    with Echo() as echo:
        assert all(echo.round_trip(bytes(3 << 20), 3 << 20) > 0 for _ in range(3))


def test_raw_access_reaches_every_block_of_its_file(tmp_path: Path) -> None:
    """What is written goes behind what was written before, around the end of the file too, and is read from there."""
    memory, other = in_huge_pages(4, 4096), in_huge_pages(4, 4096)
    with RawFile(tmp_path / "raw", blocks=6, filling=memory, threads=2) as raw:  # eight of six: two are left to the end
        memory[:] = np.arange(2, 6, dtype=np.uint8)[:, None]
        assert raw.write(memory) > 0
        memory[:2] += 4
        assert raw.write(memory[:2]) > 0
        assert raw.read(other) > 0
    content = np.fromfile(tmp_path / "raw", np.uint8).reshape(6, 4096)
    assert content[:, 0].tolist() == [6, 7, 2, 3, 4, 5] and (content == content[:, :1]).all()
    assert other[:, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_reproducible_and_share_beginnings(kind: str) -> None:
    """Equal seeds give equal prompts of 1 to 2,048 blocks; most begin with known blocks, none is all known."""
    prompts, again = (list(islice(KINDS[kind](7), 600)) for _ in range(2))
    assert prompts == again != list(islice(KINDS[kind](8), 600))
    known: set[bytes] = set()
    shared = 0
    for prompt in prompts:
        blocks = [prompt[at : at + HASH_BYTES] for at in range(0, len(prompt), HASH_BYTES)]
        assert 1 <= len(blocks) <= BLOCKS_MAX and blocks[-1] not in known
        shared += blocks[0] in known
        known.update(blocks)
    assert shared > 300


def test_verdicts_name_the_floor_they_miss() -> None:
    """Above and below, for figures that should be high and for those that should be low."""
    assert report.at_least("copies", 0.9, 0.8) == "copies: 0.9, meets the floor of 0.8"
    assert report.at_least("copies", 0.7, 0.8) == "copies: 0.7, below the floor of 0.8"
    assert report.at_most("lookup", 600, 500, " us") == "lookup: 600 us, below the floor of 500 us"


def test_the_machine_is_described_without_privileges(tmp_path: Path) -> None:
    """Every fact has a value, and time that nobody took from us is between none and all of it."""
    facts = machine.describe(tmp_path)
    assert all(facts.values()) and facts["filesystem"] != "unknown"
    assert 0 <= machine.Steal().share() <= 1
