"""The pinned path with a driver that is late, fails and refuses: who waits for what, and that a failure is a miss.

The driver is a stub, so nothing here says anything about a real GPU; see tests/daemon/test_pinned_gpu.py for that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.copies import BLOCKS
from tests.daemon.conftest import daemon, make, start  # noqa: F401
from tests.daemon.harness import LAYOUT, Daemon, hashes_of, payload_of
from tests.engine.conftest import llama, write_model  # noqa: F401
from tierd.block import split
from tierd.client import Client

SECONDS_MAX = 60
KINDS = ["one run", "staged"]
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def copies_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that is tests/contract/stub_copies.c."""
    compiler, triton = shutil.which("cc"), importlib.util.find_spec("triton")
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("cc and triton's cuda.h are needed to build the stub")
    folder = tmp_path_factory.mktemp("copies")
    headers = Path(triton.origin).parent / "backends/nvidia/include"
    options = ["-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    source = Path(__file__).parent / "stub_copies.c"
    subprocess.run([compiler, *options, "-o", str(folder / "libcuda.so.1"), str(source)], check=True, timeout=60)
    return folder


@pytest.fixture
def spawn(copies_stub: Path, short_path: Path, daemon: Daemon) -> Spawn:  # noqa: F811
    """Starts a process that plays a scenario of tests/contract/copies.py with the daemon."""
    files = {"LATE": "late", "FAIL": "fail", "REFUSE": "refuse"}
    environment = os.environ | {f"STUB_COPIES_{name}": str(short_path / file) for name, file in files.items()}
    environment |= {"STUB_PINS_REFUSED": str(short_path / "unpinned"), "STUB": str(short_path)}
    environment |= {"LD_LIBRARY_PATH": str(copies_stub)}

    def begin(scenario: str, kind: str, **settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.contract.copies", scenario, str(daemon.socket), kind]
        if kind == "staged":
            settings["STUB_COPIES_EAGER"] = "1"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment | settings, text=True, **pipes)  # type: ignore[call-overload]

    return begin


def play(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What the scenario found out, with what was logged as `log`."""
    try:
        out, log = child.communicate(timeout=SECONDS_MAX)
    finally:
        child.kill()
    assert child.returncode == 0, log
    found: dict[str, Any] = json.loads(out)
    return found | {"log": log}


@pytest.mark.parametrize("batch", ["1", "0"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_go_to_slots_and_come_back_before_and_after_these_are_registered(spawn: Spawn, kind: str, batch: str) -> None:
    """Byte for byte; one call a batch where memory is registered and the driver has such calls, else one a block."""
    found = play(spawn("there_and_back", kind, STUB_COPIES_BATCH=batch))
    assert found["stored"] == found["loaded"] == [BLOCKS, BLOCKS]
    assert found["good"] and found["failures"] == {} and found["log"] == ""
    assert found["before"] == {"batches": 0, "singles": BLOCKS}
    if batch == "1":
        assert found["after"]["batches"] >= 3 and found["after"]["singles"] == BLOCKS
    else:
        assert found["after"] == {"batches": 0, "singles": 4 * BLOCKS}
    assert found["pinned"] > 0 and found["refused"] == found["left"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_where_memory_cannot_be_registered_copies_go_on_without(spawn: Spawn, short_path: Path, kind: str) -> None:
    """The driver refuses: it is counted, said once, and costs nothing but speed."""
    (short_path / "unpinned").touch()
    found = play(spawn("there_and_back", kind))
    assert found["stored"] == found["loaded"] == [BLOCKS, BLOCKS]
    assert found["good"] and found["failures"] == {}
    assert found["after"] == {"batches": 0, "singles": 4 * BLOCKS}
    assert found["pinned"] == 0 and found["refused"] >= 1
    assert found["log"].count("cannot be registered") == 1 and "cuMemHostRegister_v2" in found["log"]


def test_a_load_ends_with_its_copies_and_holds_its_slots_until_then(spawn: Spawn) -> None:
    """While the driver is late, the client names every slot as held, and no page has its block."""
    found = play(spawn("late_load", "one run"))
    assert (found["early"], found["held"], found["any"]) == (False, BLOCKS, False)
    assert (found["loaded"], found["good"]) == (BLOCKS, True)


def test_nothing_is_committed_before_its_copies_have_ended(spawn: Spawn) -> None:
    """While the driver is late, nobody finds the blocks; then everybody finds them whole."""
    found = play(spawn("late_store", "one run"))
    assert (found["early"], found["done"]) == (0, False)
    assert (found["stored"], found["loaded"], found["good"]) == (BLOCKS, BLOCKS, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_fails_is_a_miss(spawn: Spawn, kind: str) -> None:
    """Whether it fails on its way or the driver refuses it half-way: nothing is loaded, nothing stored, and it is said once."""
    found = play(spawn("failing", kind))
    assert found["fail"] == found["refuse"] == [0, BLOCKS]
    assert found["failures"] == {"copy": 4}
    assert found["after"][:3] == [BLOCKS, True, BLOCKS] and "0 copies" in found["after"][3]
    assert found["log"].count("counts as a miss") == 1


def test_a_block_that_is_rewritten_under_a_late_copy_is_not_counted(spawn: Spawn) -> None:
    """The state words are compared after the copy has ended, not after it was given to the driver."""
    found = play(spawn("rewritten", "one run"))
    assert (found["counted"], found["left"]) == (7, 0)


def test_an_engine_says_the_same_tokens_through_copy_engines(spawn: Spawn, llama: Path) -> None:  # noqa: F811
    """In float32 and bfloat16, cold and warm, in the same engine and the next: six blocks are hits."""
    found = play(spawn("engine", str(llama)))
    for dtype in ("float32", "bfloat16"):
        assert found[dtype]["hits"] == [0, 96, 96, 96], dtype
        assert found[dtype]["different"] == 1, dtype
    assert found["calls"]["batches"] + found["calls"]["singles"] > 0


def test_what_make_gpu_measures_through_a_daemon_runs_with_copy_engines(spawn: Spawn) -> None:
    """Stores and loads in both sizes, in one run a block and through staging, every block counted as it should be."""
    found = play(spawn("measured", "staged"))
    names = [name for name in found["names"] if "through client and daemon" in name]
    assert len(names) == 8 and sum("a tensor a layer and part" in name for name in names) == 4
    assert found["calls"]["batches"] > 0 and found["log"] == ""


def test_who_dies_with_copies_under_way_leaves_nothing_behind(spawn: Spawn, daemon: Daemon) -> None:  # noqa: F811
    """kill -9 in the middle of a store: the blocks are nobody's, and another client can store and load them."""
    hashes = hashes_of(1, BLOCKS)
    child = spawn("killed", "one run")
    try:
        assert child.stdout and child.stdout.readline() == "under way\n"
        assert daemon.status()["sessions"]
        child.send_signal(signal.SIGKILL)
        child.wait(SECONDS_MAX)
    finally:
        child.kill()
    daemon.wait_until(lambda status: not status["sessions"])
    rows = np.stack([payload_of(name) for name in split(hashes)])
    with Client(daemon.socket, model="model", layout=LAYOUT, deadline_seconds=5) as client:
        assert client.load(hashes, np.zeros_like(rows), range(BLOCKS)) == 0
        assert client.store(hashes, rows, range(BLOCKS)).stored == BLOCKS
        back = np.zeros_like(rows)
        assert client.load(hashes, back, range(BLOCKS)) == BLOCKS and (back == rows).all()
