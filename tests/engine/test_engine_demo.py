"""The demo's verdict: each promise that can break is noticed, and a good demonstration passes."""

from __future__ import annotations

from copy import deepcopy
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from tierd_engine.demo.report import Run, problems, table

TIMINGS = {"hash": 0.0125, "load": 0.1, "prefill": 3.9, "decode": 1.0, "store": 0.0}
TIERS = {"cpu": 0, "nvme": 0, "miss": 0}


def result(hit_blocks: int, seconds: float, **tiers: int) -> dict[str, Any]:
    """What an engine process prints, for a prompt of 2,000 tokens: 124 full blocks before the last token."""
    return {
        "tokens": [5, 6, 7],
        "text": "so be it",
        "prompt_tokens": 2000,
        "hit_tokens": hit_blocks * 16,
        "block_tokens": 16,
        "time_to_first_token_seconds": seconds,
        "timings": TIMINGS,
        "tiers": TIERS | tiers if tiers else {},
    }


def good() -> list[Run]:
    """Runs as they should be."""
    return deepcopy(
        [
            Run("without", None, result(0, 4.1)),
            Run("cold", "miss", result(0, 4.0, miss=124)),
            Run("second", "cpu", result(124, 0.1, cpu=124)),
            Run("restarted", "nvme", result(124, 0.8, nvme=124)),
        ]
    )


def test_a_good_demonstration_has_no_problems() -> None:
    """A hit at exactly a fifth of the cold time still passes."""
    assert problems(good()) == []


@pytest.mark.parametrize(
    ("run", "broken", "complaint"),
    [
        (2, {"tokens": [5, 6, 8]}, "second: other tokens than without"),
        (3, {"time_to_first_token_seconds": 0.81}, "restarted: first token only 4.9 times sooner"),
        (2, {"hit_tokens": 123 * 16}, "second: 1968 tokens hit instead of 1984"),
        (
            3,
            {"tiers": TIERS | {"cpu": 124}},
            "restarted: the daemon counted blocks {'cpu': 124} instead of {'nvme': 124}",
        ),
        (1, {"tiers": TIERS | {"cpu": 1, "miss": 123}}, "cold: the daemon counted blocks"),
        (0, {"tiers": TIERS | {"miss": 124}}, "without: the daemon counted blocks"),
        (1, {"hit_tokens": 16}, "cold: 16 tokens hit instead of 0"),
    ],
)
def test_each_broken_promise_is_told_once(run: int, broken: dict[str, Any], complaint: str) -> None:
    """One field is wrong, one sentence says so."""
    runs = good()
    runs[run].result.update(broken)
    assert len(problems(runs)) == 1
    assert problems(runs)[0].startswith(complaint)


def test_a_short_prompt_is_a_problem() -> None:
    """A demonstration on a few tokens would prove little."""
    runs = [Run("cold", "miss", result(0, 4.0, miss=124))]
    runs[0].result.update(prompt_tokens=1400, tiers=TIERS | {"miss": 87})
    assert problems(runs) == ["cold: a prompt of 1400 tokens, 1500 needed"]


def test_the_table_shows_where_prefix_and_time_came_from() -> None:
    """Every run has its row, and hits their tier and speed-up; nothing is cut on a narrow terminal."""
    console = Console(width=80, file=StringIO())
    console.print(table(good()))
    text = console.file.getvalue()
    for shown in ("cpu 124", "nvme 124", "1,984", "40.0x", "5.0x", "3.90 s", "100 ms", "12.5 ms"):
        assert shown in text, f"{shown} is not in\n{text}"
