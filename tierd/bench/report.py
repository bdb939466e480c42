"""What a bench hands back, and how a person or a program reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
STEAL_SHARE_MAX = 0.02


@dataclass(frozen=True)
class Task:
    """How to measure: scratch files go below `directory`, `quick` shows only that it runs, `say` takes progress."""

    directory: Path
    quick: bool
    say: Callable[[str], None]


class Column(NamedTuple):
    """A column of the table: its title, and the text of one row's value."""

    title: str
    text: Callable[[Row], str]


@dataclass(frozen=True)
class Result:
    """One bench: `rows` for programs, `columns` to show them, `verdicts` on the floors, `notes` on what was done."""

    bench: str
    rows: list[Row]
    columns: Sequence[Column]
    verdicts: list[str]
    notes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the bench found out about the machine."""


def at_least(what: str, value: float, floor: float, unit: str = "") -> str:
    """A verdict on a figure that should be high."""
    return _verdict(what, value, floor, unit, met=value >= floor)


def at_most(what: str, value: float, limit: float, unit: str = "") -> str:
    """A verdict on a figure that should be low."""
    return _verdict(what, value, limit, unit, met=value <= limit)


def _verdict(what: str, value: float, floor: float, unit: str, met: bool) -> str:
    judged = "meets the floor of" if met else "below the floor of"
    return f"{what}: {value:,.3g}{unit}, {judged} {floor:,.3g}{unit}"


def lines(results: Sequence[Result], machine: dict[str, Any]) -> Iterator[str]:
    """The whole report as text: where it ran, then each bench's table, verdicts and notes."""
    width = max(len(name) for name in machine)
    for name, value in machine.items():
        yield f"{name.replace('_', ' '):{width}}  {_shown(name, value)}"
    if machine["steal_share"] > STEAL_SHARE_MAX:
        yield f"{'':{width}}  neighbours of this virtual machine took its time: trust ratios only"
    for result in results:
        yield ""
        yield result.bench
        yield from table(result)
        yield from (f"  {verdict}" for verdict in result.verdicts)
        yield from (f"  note: {note}" for note in result.notes)


def table(result: Result) -> Iterator[str]:
    """Rows and their variants, columns aligned to the right."""
    shown = [row for whole in result.rows for row in (whole, *whole.get("variants", ()))]
    texts = [[column.title for column in result.columns]]
    texts += [[column.text(row) for column in result.columns] for row in shown]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        yield "  " + "  ".join(value.rjust(width) for value, width in zip(text, widths, strict=True)).rstrip()


def size(count: float) -> str:
    """Bytes with a unit: 360 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"


def speed(bytes_per_second: float) -> str:
    """Bytes per second as GB/s (10^9)."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def share(ratio: float) -> str:
    """A ratio in percent."""
    return f"{ratio:.0%}"


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return size(value)
    return share(value) if name.endswith("_share") else str(value)
