"""Hit rates over capacity, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tierd.errors import Invalid

COLOURS = {"opt": "black", "chd": "tab:red", "lru": "tab:blue", "lfu": "tab:gray", "arc": "tab:green", "s3fifo": "tab:orange"}


def check_plot(file: Path) -> None:
    """Invalid when no picture can be made at this path."""
    if file.suffix != ".png":
        raise Invalid(f"--plot {file}: only .png can be written")
    if not file.parent.is_dir():
        raise Invalid(f"--plot {file}: {file.parent} is not a directory")
    if find_spec("matplotlib") is None:
        raise Invalid("--plot needs matplotlib: pip install 'tierd[replay]'")


def plot(file: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One line for each policy; writes a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = sorted((100 * row["capacity_share"], 100 * row["block_hit"]) for row in rows if row["policy"] == policy)
        style = "--" if policy == "opt" else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=COLOURS[policy], label=policy)
    axes.set(xscale="log", xlabel="capacity, % of unique blocks", ylabel="block hits, %", title=title, ylim=(0, None))
    axes.set_xticks(sorted({100 * row["capacity_share"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110, metadata={"Software": None})
