"""Pictures of the dashboards for the docs: `make pictures`.

Real values from a real Prometheus, drawn by matplotlib in the grid of the dashboard; Grafana itself draws them differently.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dashboards.__main__ import ROOT
from dashboards.build import DASHBOARDS
from dashboards.lint import panels
from tests.ops.busy import small_daemon, under_load
from tests.ops.prometheus import Prometheus
from tierd.values import rounded_size

SECONDS = 90.0
CELL_INCHES = 0.55, 0.32
"""Width and height of a cell of the grid."""
MARGIN = 0.012
LEGEND_MAX = 6


def main() -> None:
    """Load a daemon, watch it, and draw what was seen."""
    with tempfile.TemporaryDirectory(prefix="tierd-", dir="/tmp") as name:
        daemon = small_daemon(Path(name) / "d").start()
        try:
            with Prometheus(Path(name) / "p", {"box:9475": daemon.status()["metrics"]}) as prometheus, under_load(daemon):
                begun = prometheus.now()
                prometheus.wait_until(lambda: prometheus.now() > begun + SECONDS, "its clock stands", 2 * SECONDS)
                for board in DASHBOARDS:
                    draw(board, prometheus, begun + SECONDS, ROOT / f"docs/dashboards/{board['uid']}.png")
        finally:
            daemon.end()


def draw(board: dict[str, Any], prometheus: Prometheus, end: float, file: Path) -> None:
    """One dashboard as a PNG."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(24 * CELL_INCHES[0], (rows + 1) * CELL_INCHES[1]), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(MARGIN, 1 - 0.75 / (rows + 1), board["title"], fontsize=13, weight="bold", va="center")
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - (place["y"] + 1) / (rows + 1)
        if panel["type"] == "row":
            figure.text(left + MARGIN, top - 0.5 / (rows + 1), panel["title"], fontsize=10, weight="bold", va="center")
    for panel in panels(board):
        place = panel["gridPos"]
        height, width = place["h"] / (rows + 1), place["w"] / 24
        bottom = 1 - (place["y"] + 1) / (rows + 1) - height
        # what is around the axes (title, ticks, legend) is as high in every panel: a cell each, two for the legend
        cell, legend = 1 / (rows + 1), 2.4 if panel["type"] == "timeseries" else 0.3
        box = (place["x"] / 24 + 0.045, bottom + legend * cell, width - 0.055, height - (legend + 1.2) * cell)
        found = [
            (label(target["legendFormat"], names), points)
            for target in panel["targets"]
            for names, points in prometheus.series(target["expr"], end, SECONDS)
        ]
        fill(figure.add_axes(box), panel, found, end)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=75, metadata={"Software": None})
    print(file.relative_to(ROOT))


def fill(axes: Any, panel: dict[str, Any], found: list[tuple[str, list[tuple[float, float]]]], end: float) -> None:
    """One panel: its lines, or its latest numbers over its first line."""
    axes.set_title(panel["title"], fontsize=8, loc="left")
    axes.tick_params(labelsize=6)
    show = FORMATS.get(panel["fieldConfig"]["defaults"]["unit"], "{:g}".format)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f} s"))
    found = [(name, [(at - end, value) for at, value in points]) for name, points in found if points]
    if panel["type"] == "stat":
        text = ", ".join(f"{show(points[-1][1])} {name}".strip() for name, points in found)
        axes.text(0.5, 0.5, text, transform=axes.transAxes, fontsize=13, weight="bold", ha="center", va="center")
        axes.set_axis_off()
        return
    is_stacked = "stacking" in panel["fieldConfig"]["defaults"]["custom"]
    times = sorted({at for _, points in found for at, _ in points})
    if is_stacked:
        values = [[dict(points).get(at, 0.0) for at in times] for _, points in found]
        axes.stackplot(times, values, labels=[name for name, _ in found], alpha=0.7)
    else:
        for name, points in found:
            axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
    axes.set_xlim(-SECONDS, 0)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > LEGEND_MAX:
        names[LEGEND_MAX - 1 :] = [f"and {len(names) - LEGEND_MAX + 1} more"]
    axes.legend(
        handles[: len(names)], names, fontsize=5.5, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13)
    )


def label(legend: str, names: dict[str, str]) -> str:
    """What Grafana makes of a legend such as "{{tier}} used"."""
    for name, value in names.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return re.sub(r"\{\{\w+\}\}", "", legend)


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us" if value else "0"


FORMATS = {
    "percentunit": "{:.0%}".format,
    "s": seconds,
    "bytes": lambda value: rounded_size(int(value)),
    "Bps": lambda value: f"{rounded_size(int(value))}/s",
    "reqps": "{:.3g}/s".format,
    "iops": "{:.3g}/s".format,
    "short": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
    "none": "{:.4g}".format,
}

if __name__ == "__main__":
    main()
