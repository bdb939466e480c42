"""Dashboards, rules and their documents: made from their modules, without a finding, and about series that exist."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.__main__ import ROOT
from dashboards.build import DASHBOARDS, files
from dashboards.lint import RULES, lint, panels, targets
from dashboards.rule_tests import CASES, rule_tests
from dashboards.rules import ALERTS, RECORDED, rules
from tests.ops.prometheus import needs_promtool, promtool
from tests.results import Results
from tierd.series import SERIES

RUNBOOK = ROOT / "dashboards/runbook.md"
EXPORTED = {series.exported for series in SERIES} | {
    f"{series.name}_{part}" for series in SERIES if series.type == "histogram" for part in ("bucket", "count", "sum")
}
NAMES = re.compile(r"[a-z_:]*tierd_[a-z_:0-9]+|\bup\b")


def expressions() -> list[str]:
    """All that dashboards, rules and the document's examples ask for."""
    asked = [target.expression for board in DASHBOARDS for target in targets(board)]
    examples = re.findall(r"^    (.*tierd_.*)$", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE)
    assert len(examples) == 4
    return asked + [alert.expression for alert in ALERTS] + list(RECORDED.values()) + examples


def test_what_is_made_is_what_is_in_the_repository() -> None:
    """Making dashboards, rules and docs/metrics.md again changes nothing; no file lies there that nothing makes."""
    made = files()
    assert {name: text for name, text in made.items() if (ROOT / name).read_text() != text} == {}
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "dashboards/grafana").iterdir()} <= made.keys()


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board["uid"])
def test_the_linter_has_no_finding(board: dict[str, Any], results: Results) -> None:
    """All rules of Grafana's dashboard-linter hold, in the file that users import."""
    written = json.loads((ROOT / f"dashboards/grafana/{board['uid']}.json").read_text())
    assert written == board
    found = lint(written)
    results.note(f"lint {board['uid']}", **{rule: sum(finding.startswith(f"{rule}:") for finding in found) for rule in RULES})
    assert found == []


DAMAGE: dict[str, Any] = {
    "template-datasource-rule": lambda board: board["templating"]["list"].pop(0),
    "template-job-rule": lambda board: board["templating"]["list"][1].update(multi=False),
    "template-instance-rule": lambda board: board["templating"]["list"].pop(2),
    "template-label-promql-rule": lambda board: board["templating"]["list"][1]["query"].update(query="tierd_build_info"),
    "template-on-time-change-reload-rule": lambda board: board["templating"]["list"][2].update(refresh=1),
    "panel-datasource-rule": lambda board: board["panels"][1]["targets"][0].update(datasource={"uid": "P1809F7CD0C75ACF3"}),
    "panel-title-description-rule": lambda board: board["panels"][2].update(description=""),
    "panel-units-rule": lambda board: board["panels"][1]["fieldConfig"]["defaults"].pop("unit"),
    "panel-no-targets-rule": lambda board: board["panels"][1].update(targets=[]),
    "target-logql-rule": lambda board: board["templating"]["list"][0].update(query="loki"),
    "target-logql-auto-rule": lambda board: board["templating"]["list"][0].update(query="loki"),
    "target-promql-rule": lambda board: board["panels"][1]["targets"][0].update(expr="sum(rate("),
    "target-rate-interval-rule": lambda board: replace(board, "[$__rate_interval]", "[5m]"),
    "target-job-rule": lambda board: replace(board, 'job=~"$job", ', ""),
    "target-instance-rule": lambda board: replace(board, 'instance=~"$instance"', 'instance="box"'),
    "target-counter-agg-rule": lambda board: replace(board, "rate(", "sum("),
    "uneditable-dashboard-rule": lambda board: board.update(editable=True),
}


def replace(board: dict[str, Any], old: str, new: str) -> None:
    """Change the second panel's first expression."""
    target = board["panels"][1]["targets"][0]
    assert old in target["expr"]
    target["expr"] = target["expr"].replace(old, new)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_what_it_is_there_for(rule: str) -> None:
    """A dashboard with one mistake has a finding of that rule."""
    assert DAMAGE.keys() == RULES.keys()
    board = deepcopy(DASHBOARDS[0])
    DAMAGE[rule](board)
    assert rule in {finding.partition(":")[0] for finding in lint(board)}


def test_dashboards_are_told_apart_and_panels_do_not_overlap() -> None:
    """Stable ids, a schema that Grafana 11 and later read, and a place for each panel."""
    assert [board["uid"] for board in DASHBOARDS] == ["tierd-overview", "tierd-tiers", "tierd-clients"]
    for board in DASHBOARDS:
        assert 39 <= board["schemaVersion"] <= 42 and "id" not in board and "__inputs" not in board
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        places = [
            (x, y)
            for panel in board["panels"]
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(places) == len(set(places)) and max(x for x, _ in places) < 24
        assert len({panel["title"] for panel in panels(board)}) == sum(1 for _ in panels(board))


def test_every_series_that_is_asked_for_exists() -> None:
    """Dashboards, rules and examples name only what is declared, and what rules record."""
    known = EXPORTED | RECORDED.keys() | {"up"}
    for expression in expressions():
        named = set(NAMES.findall(re.sub(r'"[^"]*"', "", expression)))
        assert named and named <= known, f"{named - known} in {expression}"


def test_every_series_is_in_a_dashboard() -> None:
    """None is declared, documented and then looked at by nobody."""
    shown = {name for board in DASHBOARDS for target in targets(board) for name in NAMES.findall(target.expression)}
    names = {series: {series.exported, f"{series.name}_bucket", f"{series.name}_count"} for series in SERIES}
    assert [series.exported for series, any_of in names.items() if not any_of & shown] == []


def test_every_alert_says_what_is_wrong_and_where_to_read_on() -> None:
    """A summary, a description, a severity, a section of the runbook and a unit test of its own."""
    sections = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert sections == [alert.name for alert in ALERTS]
    assert list(CASES) == sections and len(sections) >= 12
    for alert in ALERTS:
        assert alert.summary.endswith(".") and alert.description.endswith(".") and alert.summary != alert.description
        assert alert.severity in ("critical", "warning", "info")


def test_provisioning_files_name_what_is_there() -> None:
    """They are YAML, load the dashboards from a folder, and the scrape configuration loads the rules."""
    scrape = yaml.safe_load((ROOT / "dashboards/prometheus/scrape.yml").read_text())
    assert [(ROOT / "dashboards/prometheus" / name).exists() for name in scrape["rule_files"]] == [True]
    assert scrape["scrape_configs"][0]["job_name"] == "tierd"
    (provider,) = yaml.safe_load((ROOT / "dashboards/provisioning/dashboards/tierd.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"] in (ROOT / "docs/dashboards.md").read_text()
    (source,) = yaml.safe_load((ROOT / "dashboards/provisioning/datasources/tierd.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"


@needs_promtool
def test_promtool_accepts_the_rules(results: Results) -> None:
    """Syntax and names of all rules."""
    said = "\n".join(promtool("check", "rules", "tierd-rules.yml"))
    assert f"SUCCESS: {len(ALERTS) + len(RECORDED)} rules found" in said
    results.quote("promtool --version", "\n".join(promtool("--version")))
    results.quote("promtool check rules tierd-rules.yml", said)


@needs_promtool
def test_every_alert_is_quiet_fires_and_resolves(results: Results) -> None:
    """promtool's unit tests: not while all is well, with the right labels and text when it is not, not any more afterwards."""
    said = "\n".join(promtool("test", "rules", "tierd-rules-test.yml"))
    assert "SUCCESS" in said
    results.quote("promtool test rules tierd-rules-test.yml", said)


@needs_promtool
@pytest.mark.parametrize("mistake", ["never", "always", "at once"])
def test_the_unit_tests_notice_an_alert_that_is_wrong(mistake: str, tmp_path: Path) -> None:
    """For each alert: one that never fires, one that always does, and one that does not wait fail its test."""
    tests = {test["name"]: test for test in rule_tests()["tests"]}
    for at, alert in enumerate(ALERTS):
        if mistake == "at once" and alert.wait == "0m":
            continue
        wrong = rules()
        rule = wrong["groups"][1]["rules"][at]
        match mistake:
            case "never":
                rule["expr"] = f"({alert.expression}) and on () vector(0) > 1"
            case "always":
                rule["expr"] = "vector(1)"
            case "at once":
                rule["for"] = "0m"
        (tmp_path / "tierd-rules.yml").write_text(yaml.safe_dump(wrong))
        alone = {**rule_tests(), "tests": [tests[alert.name]]}
        (tmp_path / "tierd-rules-test.yml").write_text(yaml.safe_dump(alone))
        with pytest.raises(AssertionError, match="FAILED"):
            promtool("test", "rules", "tierd-rules-test.yml", folder=tmp_path)
