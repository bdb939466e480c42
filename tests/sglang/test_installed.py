"""Whether the other modules here can say anything."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def test_the_pinned_sglang_is_the_one_that_is_called_tested() -> None:
    """What is installed, what requirements/ pins, and what the connector and its documentation call tested are one version."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed in this environment: make test-sglang")
    from tierd_engine.connectors.sglang import api

    root = Path(__file__).parents[2]
    assert f"sglang=={api.VERSION}\n" in (root / "requirements/sglang-cpu.txt").read_text()
    assert api.TESTED == (api.VERSION,)
    assert api.VERSION in (root / "docs/sglang.md").read_text()
