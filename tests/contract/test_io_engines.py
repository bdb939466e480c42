"""What every io engine must do, over the real ones; kvikio runs on host memory, with an emulated driver where there is none."""

from __future__ import annotations

import importlib.util
import mmap
import os
import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.conftest import HAS_GPU
from tests.cuda.build import load
from tierd.errors import Invalid
from tierd.tiers.io import IoEngine, make
from tierd.tiers.io.faulty import Faults, FaultyEngine
from tierd.tiers.io.probe import probe

BLOCK_BYTES = 5 * 4096
BLOCKS = 9


@pytest.fixture(params=["posix", "kvikio", "faulty"])
def engine(request: pytest.FixtureRequest) -> IoEngine:
    """Each engine in turn; faulty without faults is as good as what it wraps."""
    if request.param == "faulty":
        return FaultyEngine(make("posix", 1), Faults(), seed=1)
    if request.param == "kvikio":
        need_kvikio()
        if not HAS_GPU:
            os.environ["KVIKIO_COMPAT_MODE"] = "ON"
            load(request.getfixturevalue("emulation"))
    return make(request.param, 4)


def need_kvikio() -> None:
    """Skip where kvikio is not installed."""
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A preallocated file of BLOCKS blocks."""
    path = tmp_path / "blocks"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, BLOCKS * BLOCK_BYTES)
    return path


def buffers(count: int, seed: int | None = None) -> list[np.ndarray]:
    """Page-aligned blocks, random or zero."""
    memory = np.frombuffer(mmap.mmap(-1, count * BLOCK_BYTES), np.uint8)
    if seed is not None:
        memory[:] = np.frombuffer(Random(seed).randbytes(memory.nbytes), np.uint8)
    return list(memory.reshape(count, BLOCK_BYTES))


def test_blocks_come_back_from_where_they_were_written(engine: IoEngine, path: Path) -> None:
    """Lists in any order; the file itself has the bytes at their offsets."""
    file = engine.open(path)
    written, read = buffers(BLOCKS, seed=1), buffers(BLOCKS)
    order = Random(2).sample(range(BLOCKS), BLOCKS)
    assert file.write([(place * BLOCK_BYTES, written[place]) for place in order]) == [None] * BLOCKS
    assert file.read([(place * BLOCK_BYTES, read[place]) for place in reversed(order)]) == [None] * BLOCKS
    assert all((a == b).all() for a, b in zip(written, read, strict=True))
    assert path.read_bytes() == b"".join(map(bytes, written))
    file.close()


def test_memoryviews_are_as_good_as_arrays(engine: IoEngine, path: Path) -> None:
    """Both kinds of buffer move."""
    file = engine.open(path)
    (written,), (read,) = buffers(1, seed=3), buffers(1)
    assert file.write([(0, memoryview(written))]) == [None] and file.read([(0, memoryview(read))]) == [None]
    assert (written == read).all()
    file.close()


def test_a_block_that_cannot_be_read_fails_alone(engine: IoEngine, path: Path) -> None:
    """The file ends in the middle of one block and before another: both are errors, their neighbours are read."""
    file = engine.open(path)
    written, read = buffers(BLOCKS, seed=4), buffers(4)
    file.write([(place * BLOCK_BYTES, written[place]) for place in range(BLOCKS)])
    os.truncate(path, (BLOCKS - 1) * BLOCK_BYTES + 4096)
    places = [0, BLOCKS - 1, BLOCKS, 1]
    outcomes = file.read([(place * BLOCK_BYTES, read[at]) for at, place in enumerate(places)])
    assert [outcome is None for outcome in outcomes] == [True, False, False, True]
    assert all(isinstance(outcome, OSError | RuntimeError) for outcome in outcomes[1:3])
    assert (read[0] == written[0]).all() and (read[3] == written[1]).all()
    file.close()


def test_nothing_is_a_list_too(engine: IoEngine, path: Path) -> None:
    """No blocks, no outcomes."""
    file = engine.open(path)
    assert file.read([]) == [] and file.write([]) == []
    file.close()


def test_a_file_that_is_not_there_is_an_error(engine: IoEngine, tmp_path: Path) -> None:
    """Opening does not create."""
    with pytest.raises(OSError):
        engine.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_threads_share_a_file(engine: IoEngine, path: Path) -> None:
    """Each thread's blocks arrive whole, whatever the others do."""
    file = engine.open(path)
    wrong: list[int] = []

    def work(place: int) -> None:
        (written,), (read,) = buffers(1, seed=place), buffers(1)
        for _ in range(20):
            outcomes = file.write([(place * BLOCK_BYTES, written)]) + file.read([(place * BLOCK_BYTES, read)])
            if outcomes != [None, None] or not (written == read).all():
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    file.close()


def test_bytes_bypass_the_page_cache_where_the_file_system_allows(engine: IoEngine, path: Path) -> None:
    """`direct` says what an O_DIRECT open says."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
        allowed = True
    except OSError:
        allowed = False
    file = engine.open(path)
    assert file.direct is allowed
    file.close()


def test_the_same_seed_gives_the_same_faults(path: Path) -> None:
    """A failing run can be repeated."""
    runs = []
    for _ in range(2):
        file = FaultyEngine(make("posix", 1), Faults(read_errors=0.3, write_errors=0.2), seed=8).open(path)
        outcomes = [file.write([(0, buffers(1)[0])])[0] or file.read([(0, buffers(1)[0])])[0] for _ in range(30)]
        runs.append([outcome is None for outcome in outcomes])
        file.close()
    assert runs[0] == runs[1] and 5 < sum(runs[0]) < 25


def test_an_unknown_engine_is_refused() -> None:
    """The refusal names those that there are."""
    with pytest.raises(Invalid, match="posix, kvikio"):
        make("uring", 1)


def test_the_probe_says_what_it_chose_and_why(tmp_path: Path) -> None:
    """posix is taken when asked for; auto gives a reason when it is not kvikio. No scratch file stays."""
    assert probe(tmp_path, "posix", 10.0, 1).engine == "posix"
    choice = probe(tmp_path, "auto", 20.0, 1)
    assert choice.engine == "kvikio" or any(text in choice.reason for text in ("no NVIDIA GPU", "not installed", "kvikio"))
    assert list(tmp_path.iterdir()) == []


def test_kvikio_passes_the_probe_in_a_child(tmp_path: Path, emulation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name, and working: the choice says so."""
    need_kvikio()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(emulation.parent))
    monkeypatch.setenv("KVIKIO_COMPAT_MODE", "ON")
    choice = probe(tmp_path, "kvikio", 30.0, 2)
    assert (choice.engine, choice.reason) == ("kvikio", "asked for")
    assert list(tmp_path.iterdir()) == []


def test_kvikio_that_does_not_work_is_refused_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that cannot be loaded, here an empty file, is Invalid with kvikio's own words, never posix in
    silence."""
    need_kvikio()
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(Invalid, match=r"libcuda.so.1.*use 'auto' or 'posix'"):
        probe(tmp_path, "kvikio", 30.0, 1)


def test_a_probe_that_hangs_ends_at_its_deadline(tmp_path: Path) -> None:
    """The child is given up and the reason says so."""
    need_kvikio()
    with pytest.raises(Invalid, match=r"no answer within 0\.001 s"):
        probe(tmp_path, "kvikio", 0.001, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_files_is_refused(tmp_path: Path) -> None:
    """A folder that is not there is Invalid for every engine."""
    for wanted in ("posix", "auto"):
        with pytest.raises(Invalid, match=r"change nvme\.path"):
            probe(tmp_path / "missing", wanted, 5.0, 1)
