"""Pages that are made from data are what their data say, and the site that all pages make has no loose end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dashboards.lint import RULES as LINTED
from pages import configuration, promises, seen
from pages.made import ROOT, pages
from pages.site import build
from tierd.config import KEYS

RESULTS, SEEN = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("promises", "seen"))


def test_pages_that_are_made_are_those_in_the_repository() -> None:
    """Making them again changes nothing: a new key is in the reference, a new run in the promises."""
    assert {name for name, text in pages().items() if (ROOT / name).read_text() != text} == set()


def test_the_reference_has_every_key_with_its_words() -> None:
    """Each key once, in its section, with what the commented file says of it."""
    text = configuration.page((ROOT / "systemd/tierd.toml").read_text())
    sections = {section.partition("]")[0]: section for section in text.split("\n## [")[1:]}
    for dotted in KEYS:
        section, _, name = dotted.partition(".")
        assert len(re.findall(rf"^\| `{name}` \| `.+` \| (?:live)? ?\| .{{20,}} \|$", sections[section], re.MULTILINE)) == 1, (
            dotted
        )


def test_every_promise_has_tests_that_passed() -> None:
    """Each row names a file of tests that is there, of which some have passed, and every figure comes from the run."""
    text = promises.page(RESULTS)
    for promise in promises.PROMISES:
        assert (ROOT / promise.tests).exists() and RESULTS["passed"][promise.tests] > 0
        assert bool(promise.seen) == bool(promise.note)
    assert "{" not in text


def test_a_run_that_failed_or_was_not_whole_promises_nothing() -> None:
    """No page is made of it, and the error says which test it was."""
    with pytest.raises(ValueError, match="test_torture"):
        promises.page({**RESULTS, "failed": ["tests/faults/test_torture.py::test_fifty"]})
    with pytest.raises(ValueError, match="nothing was noted of torture"):
        promises.page({**RESULTS, "figures": {name: noted for name, noted in RESULTS["figures"].items() if name != "torture"}})


def test_what_tools_say_is_quoted_from_one_whole_run() -> None:
    """Each line that is shown was said; a run in which a test failed, or in which there was no systemd, makes no page."""
    text = seen.page(SEEN)
    for command in seen.SAID[1:3]:
        assert f"    $ {command}\n    {SEEN['said'][command][0]}\n" in text
    assert text.count("| 0 | 0 | 0 |") == len(LINTED)
    with pytest.raises(ValueError, match="test_systemd"):
        seen.page({**SEEN, "failed": ["tests/ops/test_systemd.py::test_reload"]})
    with pytest.raises(ValueError, match="nothing was noted of systemctl status tierd"):
        seen.page({**SEEN, "said": {command: lines for command, lines in SEEN["said"].items() if "status" not in command}})


def test_the_site_has_every_page_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    """mkdocs builds it strictly; a link to nowhere would end it."""
    build(tmp_path / "site")
    assert (tmp_path / "site/docs/quickstart.html").exists() and (tmp_path / "site/index.html").exists()
    assert (tmp_path / "site/dashboards/grafana/tierd-overview.json").exists()
