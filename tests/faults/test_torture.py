"""Fifty kills at random moments under load; `python -m tests.faults.torture` does any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.house import House
from tests.faults.torture import IO_THREADS, Torture
from tests.results import Results

KILLS, SEED = 50, 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_kills_under_load_cost_no_byte_and_no_slot(
    short_path: Path, capsys: pytest.CaptureFixture[str], results: Results
) -> None:
    """Each life is ready in time and has kept what was whole; at least half as many kills met transfers in flight."""
    with House(short_path, nvme__io_threads=IO_THREADS) as house:
        torture = Torture(house, SEED)
        try:
            torture.run(KILLS, moving=KILLS // 2)
        finally:
            torture.close()
        with capsys.disabled():
            print(f"\n{torture}")
        assert torture.kills >= KILLS
        assert torture.moving >= KILLS // 2, f"too few kills met transfers in flight:\n{torture}"
        assert torture.checks > 5 and torture.blocks_found > 0
        results.note(
            "torture",
            kills=torture.kills,
            moving=torture.moving,
            blocks=torture.blocks_found,
            seconds=round(torture.ready_seconds_max, 2),
        )
