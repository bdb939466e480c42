"""The budget of writes to nvme: never exceeded in any day, over any number of lives."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.endurance import FILE, HOUR_MS, Endurance
from tierd.errors import Invalid

DAY_MS = 24 * HOUR_MS
START = 1_800_000_000_000
STEPS = st.lists(
    st.tuples(st.integers(1, 3000), st.sampled_from((0, 1000, HOUR_MS // 2, HOUR_MS, 5 * HOUR_MS)), st.booleans()),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_no_day_has_more_than_its_budget_over_any_number_of_lives(steps: list[tuple[int, int, bool]]) -> None:
    """Whenever the day begins, and however often the daemon is killed."""
    budget, now, written = 10_000, START, []
    with TemporaryDirectory() as folder:
        endurance = Endurance(Path(folder), budget, now)
        for wanted, later, dies in steps:
            now += later
            number = endurance.left(wanted, now)
            endurance.spend(number)
            written.append((now, number))
            if dies:
                endurance = Endurance(Path(folder), budget, now)
    for begin, _ in written:
        assert sum(number for at, number in written if begin <= at < begin + DAY_MS) <= budget


def test_all_of_a_budget_can_be_used_and_comes_back_a_day_later(tmp_path: Path) -> None:
    """What is asked for is given to the last byte, then nothing, then all of it again."""
    endurance = Endurance(tmp_path, 1000, START)
    assert sum(spent(endurance, 30, START + at) for at in range(100)) == 1000
    assert spent(endurance, 1, START + DAY_MS - HOUR_MS) == 0
    assert spent(endurance, 5000, START + DAY_MS + 2 * HOUR_MS) == 1000


def test_a_life_that_is_killed_leaves_nearly_all_of_the_rest(tmp_path: Path) -> None:
    """No more than a grant is lost, and nothing is forgotten."""
    endurance = Endurance(tmp_path, 256_000, START)
    for life in range(10):
        assert spent(endurance, 5000, START + life) == 5000
        endurance = Endurance(tmp_path, 256_000, START + life)
    assert 256_000 - 50_000 - 10 * 1000 <= endurance.left(1 << 30, START) <= 256_000 - 50_000


def test_a_future_that_a_wrong_clock_saw_is_now(tmp_path: Path) -> None:
    """Hours ahead of the clock count as this hour: they do not stop writes for ever."""
    assert spent(Endurance(tmp_path, 1000, START + 900 * DAY_MS), 1000, START + 900 * DAY_MS) == 1000
    endurance = Endurance(tmp_path, 1000, START)
    assert spent(endurance, 1, START) == 0
    assert spent(endurance, 1, START + DAY_MS + 2 * HOUR_MS) == 1


def test_a_clock_that_is_set_right_in_the_same_life_does_not_stop_writes(tmp_path: Path) -> None:
    """It was years ahead for a moment: what was written then counts as written now, and a day later there is all of it."""
    endurance = Endurance(tmp_path, 1000, START)
    assert spent(endurance, 400, START) == 400
    assert spent(endurance, 500, START + 3000 * DAY_MS) == 500
    assert spent(endurance, 1000, START + HOUR_MS) == 500
    assert spent(endurance, 1, START + 2 * HOUR_MS) == 0
    assert spent(endurance, 5000, START + HOUR_MS + DAY_MS + 2 * HOUR_MS) == 1000


def test_a_budget_that_cannot_be_noted_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is asked for with every commit; once it can be noted again and then cannot, it is said again."""
    folder = tmp_path / "gone"
    endurance = Endurance(folder, 1000, START)
    for _ in range(5):
        assert endurance.left(10, START) == 0
    assert len(caplog.records) == 1
    folder.mkdir()
    assert spent(endurance, 10, START) == 10


def test_a_file_that_cannot_be_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Guessing could write twice a day's bytes."""
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(Invalid, match="remove it if the disk may take"):
        Endurance(tmp_path, 1000, START)
    assert Endurance(tmp_path, 0, START).left(1 << 50, START) == 1 << 50


def test_nothing_is_written_that_cannot_be_noted(tmp_path: Path) -> None:
    """Without a place for the file there is no budget."""
    assert Endurance(tmp_path / "gone", 1000, START).left(10, START) == 0


def spent(endurance: Endurance, wanted: int, now: int) -> int:
    """Write as much of this as may be."""
    number = endurance.left(wanted, now)
    endurance.spend(number)
    return number
