"""The 17 rules of Grafana's dashboard-linter, as far as they concern a dashboard with one Prometheus data source.

After https://github.com/grafana/dashboard-linter, whose names the rules have. It parses PromQL, we only find the selectors and
ranges in an expression: whether Prometheus takes it is for a real one to say. `target-logql-rule` and `target-logql-auto-rule`
have nothing to say of a dashboard without Loki.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

UNITS = {"short", "none", "percentunit", "s", "bytes", "Bps", "reqps", "iops"}
"""Of Grafana's units those that we use."""
VALUE_PANELS = {"stat", "singlestat", "graph", "table", "timeseries", "gauge"}
SOURCE = {"$datasource", "${datasource}"}
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
BARE = re.compile(r"\b(?:up|tierd_\w+)\b(?!\s*\{)")
RANGE = re.compile(r"\[([^\]]+)\]")
COUNTER = re.compile(r"_(total|count|sum|bucket)$")
GROWTH = re.compile(r"\b(rate|irate|increase)\($")
Finding = str
Dashboard = dict[str, Any]


def lint(board: Dashboard) -> list[Finding]:
    """What the rules find, as "rule: where: what"; empty when all is well."""
    return [f"{name}: {found}" for name, rule in RULES.items() for found in rule(board)]


class Target(NamedTuple):
    """One query of a panel."""

    where: str
    expression: str


def targets(board: Dashboard) -> Iterator[Target]:
    """All queries."""
    for panel in panels(board):
        for target in panel.get("targets", []):
            yield Target(f"{panel['title']} {target['refId']}", target["expr"])


def panels(board: Dashboard) -> Iterator[dict[str, Any]]:
    """All panels but rows, those in collapsed rows included."""
    for panel in board["panels"]:
        yield from panel.get("panels", [])
        if panel["type"] != "row":
            yield panel


def variables(board: Dashboard, kind: str) -> list[dict[str, Any]]:
    """The variables of one type."""
    return [variable for variable in board["templating"]["list"] if variable["type"] == kind]


def template_datasource(board: Dashboard) -> Iterator[Finding]:
    """There is one data source, a variable, with the usual name and label."""
    found = variables(board, "datasource")
    if len(found) != 1:
        yield f"{len(found)} data source variables"
    for variable in found:
        if variable["name"] not in ("datasource", "prometheus_datasource"):
            yield f"it is named {variable['name']}"
        if variable["label"] not in ("Data source", "Prometheus data source"):
            yield f"it is labelled {variable['label']}"


def template_label(name: str) -> Callable[[Dashboard], Iterator[Finding]]:
    """There is a variable for a label that every scraped series has: a multi-select of that data source."""

    def rule(board: Dashboard) -> Iterator[Finding]:
        found = [variable for variable in variables(board, "query") if variable["name"] == name]
        if len(found) != 1:
            yield f"{len(found)} variables named {name}"
        for variable in found:
            if variable["datasource"]["uid"] not in SOURCE:
                yield f"{name} asks {variable['datasource']}"
            wanted = {"label": name.capitalize(), "multi": True, "allValue": ".+", "includeAll": True}
            yield from (f"{name}: {key} is not {value}" for key, value in wanted.items() if variable.get(key) != value)

    return rule


def template_label_promql(board: Dashboard) -> Iterator[Finding]:
    """Variables ask for the values of a label of a selector."""
    for variable in variables(board, "query"):
        if not re.fullmatch(r"label_values\([a-z_]+(\{[^{}]*\})?, [a-z_]+\)", variable["query"]["query"]):
            yield f"{variable['name']}: {variable['query']['query']}"


def template_reload(board: Dashboard) -> Iterator[Finding]:
    """Variables are asked for again when the time range changes."""
    yield from (variable["name"] for variable in variables(board, "query") if variable["refresh"] != 2)


def panel_datasource(board: Dashboard) -> Iterator[Finding]:
    """Panels and queries ask the data source that was chosen."""
    for panel in panels(board):
        for asking in (panel, *panel["targets"]):
            if asking["datasource"]["uid"] not in SOURCE:
                yield f"{panel['title']}: {asking['datasource']}"


def panel_title_description(board: Dashboard) -> Iterator[Finding]:
    """Panels say what they show."""
    for panel in panels(board):
        if not panel.get("title") or not panel.get("description"):
            yield f"panel {panel['id']} {panel.get('title')}"


def panel_units(board: Dashboard) -> Iterator[Finding]:
    """Values have a unit."""
    for panel in panels(board):
        unit = panel["fieldConfig"]["defaults"].get("unit")
        if panel["type"] in VALUE_PANELS and unit not in UNITS:
            yield f"{panel['title']}: {unit}"


def panel_no_targets(board: Dashboard) -> Iterator[Finding]:
    """Panels ask for something."""
    yield from (panel["title"] for panel in panels(board) if not panel.get("targets"))


def no_loki(board: Dashboard) -> Iterator[Finding]:
    """There is no Loki here, whose queries this rule is about."""
    yield from (variable["name"] for variable in variables(board, "datasource") if variable["query"] == "loki")


def target_promql(board: Dashboard) -> Iterator[Finding]:
    """Expressions are not empty, and their brackets match."""
    for where, expression in targets(board):
        bare = re.sub(r'"[^"]*"', "", expression)
        opened: list[str] = []
        for character in bare:
            if character in "([{":
                opened.append(")]}"["([{".index(character)])
            elif character in ")]}" and (not opened or opened.pop() != character):
                opened.append("!")
                break
        if opened or not bare.strip():
            yield f"{where}: {expression}"


def target_rate_interval(board: Dashboard) -> Iterator[Finding]:
    """Ranges follow the resolution of the graph and the scrape interval."""
    for where, expression in targets(board):
        yield from (f"{where}: [{found}]" for found in RANGE.findall(expression) if found != "$__rate_interval")


def target_label(name: str) -> Callable[[Dashboard], Iterator[Finding]]:
    """Every selector takes the label that was chosen."""

    def rule(board: Dashboard) -> Iterator[Finding]:
        for where, expression in targets(board):
            for selector, matchers in SELECTOR.findall(expression):
                if f'{name}=~"${name}"' not in [matcher.strip() for matcher in matchers.split(",")]:
                    yield f"{where}: {selector}"
            yield from (f"{where}: {found}" for found in BARE.findall(expression))

    return rule


def target_counter(board: Dashboard) -> Iterator[Finding]:
    """A counter's value says nothing: only how it grows does."""
    for where, expression in targets(board):
        for match in SELECTOR.finditer(expression):
            if COUNTER.search(match[1]) and not GROWTH.search(expression[: match.start()]):
                yield f"{where}: {match[1]}"


def uneditable(board: Dashboard) -> Iterator[Finding]:
    """What is provisioned is not edited in place."""
    if board["editable"]:
        yield "editable"


RULES: dict[str, Callable[[Dashboard], Iterator[Finding]]] = {
    "template-datasource-rule": template_datasource,
    "template-job-rule": template_label("job"),
    "template-instance-rule": template_label("instance"),
    "template-label-promql-rule": template_label_promql,
    "template-on-time-change-reload-rule": template_reload,
    "panel-datasource-rule": panel_datasource,
    "panel-title-description-rule": panel_title_description,
    "panel-units-rule": panel_units,
    "panel-no-targets-rule": panel_no_targets,
    "target-logql-rule": no_loki,
    "target-logql-auto-rule": no_loki,
    "target-promql-rule": target_promql,
    "target-rate-interval-rule": target_rate_interval,
    "target-job-rule": target_label("job"),
    "target-instance-rule": target_label("instance"),
    "target-counter-agg-rule": target_counter,
    "uneditable-dashboard-rule": uneditable,
}
