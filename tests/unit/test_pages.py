"""Pages that are made from data are what their data say, and the site that all pages make has no loose end."""

from __future__ import annotations

import re
from pathlib import Path

from pages import configuration
from pages.made import ROOT, pages
from pages.site import build
from tierd.config import KEYS


def test_pages_that_are_made_are_those_in_the_repository() -> None:
    """Making them again changes nothing: a new key is in the reference."""
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


def test_the_site_has_every_page_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    """mkdocs builds it strictly; a link to nowhere would end it."""
    build(tmp_path / "site")
    assert (tmp_path / "site/docs/quickstart.html").exists() and (tmp_path / "site/index.html").exists()
    assert (tmp_path / "site/dashboards/grafana/tierd-overview.json").exists()
