"""A small builder of classic Grafana dashboards: plain dictionaries, laid out in rows of a 24-column grid.

Panels are as Grafana 11 writes them (schemaVersion 39). Nothing names a data source, a job or an instance: these are variables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
Panel = dict[str, Any]
Query = tuple[str, str]
"""An expression and its legend."""


# -- expressions ----------------------------------------------------------------------------------------------------------


def only(name: str, *matchers: str) -> str:
    """A series of the chosen jobs and instances: `only("up")`, `only("tierd_slots", 'state="free"')`."""
    chosen = ", ".join(('job=~"$job"', 'instance=~"$instance"', *matchers))
    return f"{name}{{{chosen}}}"


def rate(name: str, *matchers: str) -> str:
    """How fast a counter grows, a second."""
    return f"rate({only(name, *matchers)}[$__rate_interval])"


def total(by: str, expression: str) -> str:
    """Summed over all labels but these (comma-separated; none: over all)."""
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def by(labels: str, expression: str) -> Query:
    """The query of most panels: summed by these labels (comma-separated), and a legend that has their values."""
    return total(labels, expression), " ".join(f"{{{{{label}}}}}" for label in labels.split(", "))


def quantile(share: float, by: str, name: str, *matchers: str) -> str:
    """A quantile of a histogram, by these labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {total(labels, rate(f'{name}_bucket', *matchers))})"


# -- panels ---------------------------------------------------------------------------------------------------------------


def stat(title: str, unit: str, text: str, expression: str, legend: str = "") -> Panel:
    """One number, with its recent course below it."""
    panel = _panel("stat", title, unit, text, [(expression, legend)], width=6, height=4)
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    panel["options"] = {"reduceOptions": reduce, "graphMode": "area", "colorMode": "value", "textMode": "auto"}
    return panel


def graph(title: str, unit: str, text: str, *queries: Query, stack: bool = False) -> Panel:
    """Lines over time; stacked where they add up to something."""
    panel = _panel("timeseries", title, unit, text, queries, width=8, height=8)
    custom = panel["fieldConfig"]["defaults"]["custom"] = {"fillOpacity": 10, "lineWidth": 1, "showPoints": "never"}
    if stack:
        custom |= {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
    panel["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


def _panel(kind: str, title: str, unit: str, text: str, queries: Iterable[Query], width: int, height: int) -> Panel:
    targets = [
        {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend, "range": True}
        for at, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "gridPos": {"w": width, "h": height},
    }


# -- dashboards -----------------------------------------------------------------------------------------------------------


def dashboard(uid: str, title: str, text: str, rows: Sequence[tuple[str, Sequence[Panel]]]) -> dict[str, Any]:
    """A dashboard of titled rows; panels flow from left to right."""
    panels: list[Panel] = []
    y = 0
    for heading, members in rows:
        panels.append({"type": "row", "title": heading, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        panels[-1]["panels"] = []
        x, y = 0, y + 1
        height = 0
        for panel in members:
            if x + panel["gridPos"]["w"] > COLUMNS:
                x, y, height = 0, y + height, 0
            panels.append({**panel, "gridPos": {"x": x, "y": y, **panel["gridPos"]}})
            x, height = x + panel["gridPos"]["w"], max(height, panel["gridPos"]["h"])
        y += height
    return {
        "uid": uid,
        "title": title,
        "description": text,
        "tags": ["tierd"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "tierd",
                "tags": ["tierd"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": variables()},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def variables() -> list[dict[str, Any]]:
    """The data source, and which jobs and instances."""
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
    }
    return [
        source,
        _choice("job", "label_values(tierd_build_info, job)"),
        _choice("instance", 'label_values(tierd_build_info{job=~"$job"}, instance)'),
    ]


def _choice(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": f"variable-{name}"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }
