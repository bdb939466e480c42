"""Every file that is made, by its name in the repository."""

from __future__ import annotations

import json
from typing import Any

import yaml

from dashboards import clients, overview, tiers
from dashboards.metrics_page import page
from dashboards.rule_tests import rule_tests
from dashboards.rules import rules

DASHBOARDS = (overview.dashboard(), tiers.dashboard(), clients.dashboard())
MADE = "Made by `make dashboards`; edit dashboards/{}.py instead."


def files() -> dict[str, str]:
    """Name -> text."""
    made = {f"dashboards/grafana/{board['uid']}.json": json.dumps(board, indent=1) + "\n" for board in DASHBOARDS}
    made["dashboards/prometheus/tierd-rules.yml"] = as_yaml("rules", rules())
    made["dashboards/prometheus/tierd-rules-test.yml"] = as_yaml("rule_tests", rule_tests())
    made["docs/metrics.md"] = page()
    return made


def as_yaml(module: str, value: Any) -> str:
    """YAML that a person can read, with a note on where it comes from."""
    text: str = yaml.safe_dump(value, sort_keys=False, width=120)
    return f"# {MADE.format(module)}\n{text}"
