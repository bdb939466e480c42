"""What the runs must show, and the table that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

SPEED_UP_MIN = 5.0
PROMPT_TOKENS_MIN = 1500


@dataclass(frozen=True)
class Run:
    """One engine process: `source` is the tier that its prefix must come from ("miss": nowhere; None: no tierd at all).

    `result` is what `one_run` printed.
    """

    name: str
    source: str | None
    result: dict[str, Any]

    @property
    def is_hit(self) -> bool:
        """Whether the prefix must come from a tier."""
        return self.source not in (None, "miss")

    @property
    def blocks(self) -> int:
        """Blocks that were asked of tierd: all full ones, but never the last token's."""
        return int((self.result["prompt_tokens"] - 1) // self.result["block_tokens"])

    @property
    def first_token_seconds(self) -> float:
        """Time to first token."""
        return float(self.result["time_to_first_token_seconds"])

    def speed_up(self, cold: Run) -> float:
        """How many times sooner than the cold run the first token came."""
        return cold.first_token_seconds / self.first_token_seconds

    def to_map(self) -> dict[str, Any]:
        """The run for JSON."""
        return asdict(self)


def problems(runs: list[Run]) -> list[str]:
    """Every promise that did not hold, as a sentence each; empty when all did."""
    cold = _cold(runs)
    found = []
    for run in runs:
        if run.result["tokens"] != runs[0].result["tokens"]:
            found.append(f"{run.name}: other tokens than {runs[0].name}")
        if run.result["prompt_tokens"] < PROMPT_TOKENS_MIN:
            found.append(f"{run.name}: a prompt of {run.result['prompt_tokens']} tokens, {PROMPT_TOKENS_MIN} needed")
        hit_tokens, wanted = run.result["hit_tokens"], run.blocks * run.result["block_tokens"] if run.is_hit else 0
        if hit_tokens != wanted:
            found.append(f"{run.name}: {hit_tokens} tokens hit instead of {wanted}")
        counted = {tier: blocks for tier, blocks in run.result["tiers"].items() if blocks}
        promised = {run.source: run.blocks} if run.source else {}
        if counted != promised:
            found.append(f"{run.name}: the daemon counted blocks {counted} instead of {promised}")
        if run.is_hit and run.speed_up(cold) < SPEED_UP_MIN:
            found.append(
                f"{run.name}: first token only {run.speed_up(cold):.1f} times sooner than cold, {SPEED_UP_MIN:g} needed"
            )
    return found


def table(runs: list[Run]) -> Table:
    """One row per run: where its prefix came from, its time to first token, and where all its time went.

    It fits 80 columns.
    """
    cold = _cold(runs)
    phases = list(cold.result["timings"])
    title = f"One prompt of {cold.result['prompt_tokens']} tokens, {len(cold.result['tokens'])} tokens generated"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    out.add_column("run", no_wrap=True)
    out.add_column("blocks\nfrom", no_wrap=True)
    for column in ("tokens\nhit", "first\ntoken", "speed-\nup", *phases):
        out.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        out.add_row(
            run.name,
            _source(run),
            f"{run.result['hit_tokens']:,}",
            _duration(run.first_token_seconds),
            f"{run.speed_up(cold):.1f}x" if run.is_hit else "",
            *(_duration(run.result["timings"][phase]) for phase in phases),
        )
    return out


def _cold(runs: list[Run]) -> Run:
    return next(run for run in runs if run.source == "miss")


def _source(run: Run) -> str:
    counted = [f"{tier} {blocks}" for tier, blocks in run.result["tiers"].items() if blocks and tier != "miss"]
    return ", ".join(counted) or "-"


def _duration(seconds: float) -> str:
    if seconds == 0:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.{1 if seconds < 0.1 else 0}f} ms"
