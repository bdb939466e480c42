"""`tierd fsck`: it finds all that is wrong with a state directory, and changes nothing that it was not asked to."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tierd.block import ROOT, chain
from tierd.cli import DAMAGED, FAILED, OK, USAGE, main
from tierd.layout import Layout, Namespace
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.nvme import FileSegment, slots_path
from tierd.tiers.segment import HEADER_BYTES
from tierd.tiers.state import StateDirectory

LAYOUT = Layout(2, 1, 512, "float16", block_tokens=4)
NAMESPACE = Namespace("uid:1000", "model", LAYOUT)
BLOCKS = 12


def fill(segment: FileSegment) -> None:
    """Write BLOCKS blocks of different bytes."""
    memory = np.frombuffer(mmap.mmap(-1, BLOCKS * LAYOUT.slot_bytes), np.uint8).reshape(BLOCKS, -1)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.shape, np.uint8)
    hashes = chain(list(range(BLOCKS)), 1, ROOT)
    assert segment.write(list(range(BLOCKS)), list(memory), hashes, ROOT + hashes[:-32]).all()


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Path]:
    """The state directory of a daemon that has stopped, with one segment of blocks."""
    state = StateDirectory(tmp_path / "state")
    segment = FileSegment.create(state.folder(NAMESPACE), NAMESPACE, 1 << 20, 1, PosixEngine())
    fill(segment)
    segment.close()
    state.close()
    yield tmp_path / "state"


def directory(state: Path) -> Path:
    """The one segment's file with the directory."""
    (path,) = state.glob("nvme/*/*.directory")
    return path


def contents(state: Path) -> dict[str, str]:
    """A digest of every file but the lock's."""
    files = (path for path in sorted(state.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fsck(state: Path, *options: str) -> int:
    """The command's exit code."""
    return main(["fsck", "--state-dir", str(state), *options])


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_sound_directory_is_read_to_the_last_block(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And stays as it was, also with --repair."""
    before = contents(stopped)
    assert fsck(stopped, "--json") == OK
    found = json.loads(capsys.readouterr().out)
    assert (found["segments"], found["blocks"], found["problems"], found["sound"]) == (1, BLOCKS, [], True)
    assert found["bytes"] == BLOCKS * LAYOUT.block_bytes
    assert fsck(stopped, "--repair") == OK
    assert capsys.readouterr().out.endswith("sound\n")
    assert contents(stopped) == before


def break_payload(state: Path) -> str:
    """One bit of a block, which no header or directory knows of."""
    flip(slots_path(directory(state)), 3 * LAYOUT.slot_bytes + 17)
    return "1 blocks have other bytes than were written (slots 3)"


def break_row(state: Path) -> str:
    """One bit of a row that says which block is in a slot."""
    path = directory(state)
    segment = FileSegment.open(path, PosixEngine())
    offset = segment.header.geometry.identity_offset + 5 * 128
    segment.close()
    flip(path, offset)
    return "1 rows of the directory are damaged"


def break_header(state: Path) -> str:
    """One bit of the page that says what a segment is."""
    flip(directory(state), 90)
    return "its bytes give"


def lose_slots(state: Path) -> str:
    """The file with the blocks is gone."""
    slots_path(directory(state)).unlink()
    return "cannot be opened"


def cut(state: Path) -> str:
    """The file with the directory ends early."""
    with directory(state).open("r+b") as file:
        file.truncate(HEADER_BYTES)
    return "has 4096 bytes, the header says"


def move(state: Path) -> str:
    """A segment that somebody has put in another namespace's folder."""
    path = directory(state)
    other = path.parent.with_name("0" * 16)
    path.parent.rename(other)
    return "is of the namespace in"


@pytest.mark.parametrize("damage", [break_payload, break_row, break_header, lose_slots, cut, move])
def test_damage_is_found_left_and_repaired_when_asked(
    stopped: Path, capsys: pytest.CaptureFixture[str], damage: object
) -> None:
    """4 and no change at first; with --repair 0, and 0 from then on without anything to say."""
    assert callable(damage)
    says = damage(stopped)
    before = contents(stopped)
    assert fsck(stopped) == DAMAGED
    told = capsys.readouterr().out
    assert says in told and "1 problems left: --repair" in told
    assert contents(stopped) == before, "fsck has changed something without being asked to"
    assert fsck(stopped, "--repair") == OK
    assert "-- repaired" in capsys.readouterr().out
    assert fsck(stopped, "--json") == OK
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["blocks"] in (0, BLOCKS - 1)


def test_what_a_crash_leaves_is_no_damage(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of a segment that was being made: named, and removed by --repair."""
    path = directory(stopped)
    for name in ("ab.new", "ab.slots", "cd.slots"):
        path.with_name(name).write_bytes(b"half")
    assert fsck(stopped) == OK
    assert capsys.readouterr().out.count("leftover ") == 2
    assert fsck(stopped, "--repair") == OK
    assert {file.suffix for file in path.parent.iterdir()} == {".directory", ".slots"}
    assert len(list(path.parent.iterdir())) == 2


def test_segments_that_a_purge_did_not_come_to_are_leftovers(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A daemon that died between two headers: what is of the older epoch is named, and removed by --repair; the rest stays."""
    state = StateDirectory(stopped)
    purged = FileSegment.create(state.folder(NAMESPACE), NAMESPACE, 1 << 20, 1, PosixEngine())
    fill(purged)
    purged.outdate(2)
    path = purged.path
    purged.close()
    state.close()
    before = contents(stopped)
    assert fsck(stopped) == OK
    told = capsys.readouterr().out
    assert "of epoch 1, its namespace is at 2" in told and f"{BLOCKS} of a purged epoch" in told
    assert contents(stopped) == before
    assert fsck(stopped, "--repair") == OK
    assert "-- repaired" in capsys.readouterr().out
    assert {file.stem for file in path.parent.iterdir()} == {path.stem}
    assert fsck(stopped, "--json") == OK
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_a_directory_in_use_is_not_touched(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a daemon has it, it cannot be checked: 1, with the daemon's pid."""
    state = StateDirectory(stopped)
    assert fsck(stopped, "--repair") == FAILED
    assert "is used by the tierd with pid" in capsys.readouterr().err
    state.close()


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong path is said, not filled with locks."""
    assert fsck(tmp_path / "nowhere") == USAGE
    assert "server.state_dir" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
