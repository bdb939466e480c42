"""The page at `/` of the metrics port: over HTTP, and in a real headless browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon, hashes_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Tables(HTMLParser):
    """The text of each row of each table, by the table's id; `tags` is what else there is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self._table = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag; rows and cells begin."""
        self.tags.setdefault(tag, []).append(dict(attrs))
        if tag == "table":
            self._table = str(dict(attrs)["id"])
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")

    def handle_data(self, data: str) -> None:
        """The text of a cell."""
        if self._table and self.rows[self._table] and self.rows[self._table][-1]:
            self.rows[self._table][-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        """A table ends."""
        if tag == "table":
            self._table = ""


def work(daemon: Daemon) -> None:
    """Store and look up, and have it noted: the page shows samples of every few seconds."""
    with daemon.peer(client="<b>mallory</b>", model="<script>alert(1)</script>") as peer:
        assert peer.store(hashes_of(1, 30)) == 30
        daemon.ask("sync")
        peer.load(hashes_of(1, 30))
        peer.lookup(hashes_of(2, 10))
    daemon.wait_until(lambda _: "<polyline" in daemon.get("/")[1] and ">40</td><td>75.0%</td><td><svg" in daemon.get("/")[1])


def shows_what_was_done(html: str) -> Tables:
    """Check the tables against what `work` did."""
    found = Tables(html)
    assert [row[0] for row in found.rows["tiers"]] == ["tier", "cpu", "nvme"]
    assert found.rows["tiers"][1][3:5] == ["1.0 MiB", "30"] and found.rows["tiers"][2][3:5] == ["4.0 MiB", "30"]
    assert found.rows["hits"][1][:3] == ["last minutes", "40", "75.0%"]
    assert found.rows["hits"][2] == ["since the start", "40", "75.0%", "cpu 75.0%, miss 25.0%"]
    assert found.rows["transfers"][1][0] == "cpu to nvme" and found.rows["transfers"][1][3] == "120.0 KiB"
    return found


def test_the_page_says_what_the_daemon_did_and_names_nobody(daemon: Daemon) -> None:
    """Tiers, hits and transfers; nothing of what clients called themselves, and nothing to load or run."""
    assert ">nothing has moved yet<" in daemon.get("/")[1]
    work(daemon)
    status, html = daemon.get("/")
    assert status == 200 and "<title>tierd: ready</title>" in html
    found = shows_what_was_done(html)
    assert not found.tags.keys() & {"script", "link", "img", "iframe", "form", "b"}
    assert {tag.get("href") for tag in found.tags["a"]} == {"/metrics", "/readyz"}
    assert not re.search("https?:|url\\(|@import|mallory|alert", html)


def test_a_scrape_and_a_page_on_the_unix_socket_are_the_same(daemon: Daemon) -> None:
    """Whoever may connect to the socket sees the page there too."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-s", "--unix-socket", f"{daemon.runtime}/metrics.sock", "http://tierd/"]
    assert "<h2>Tiers</h2>" in subprocess.run(command, capture_output=True, text=True, timeout=20).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_it_and_asks_for_nothing_else(start: Start, tmp_path: Path) -> None:
    """A real browser makes the same tables of it, draws it, complains of nothing, and loads nothing but the page."""
    daemon = start(log_level="debug")
    work(daemon)
    before = len(daemon.log)
    address = f"http://{daemon.status()['metrics']}/"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--enable-logging=stderr",
        "--window-size=900,800",
    ]
    options += [f"--user-data-dir={tmp_path}/profile", "--disable-background-networking"]
    picture = tmp_path / "page.png"
    browser = [str(BROWSER), *options]
    drawn = subprocess.run([*browser, f"--screenshot={picture}", address], capture_output=True, text=True, timeout=90)
    dumped = subprocess.run([*browser, "--dump-dom", address], capture_output=True, text=True, timeout=90)
    shows_what_was_done(dumped.stdout)
    assert "CONSOLE" not in drawn.stderr + dumped.stderr, drawn.stderr + dumped.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    asked = set(re.findall(r'exporter: request line="\\?"GET (\S+) ', daemon.log[before:]))
    assert "/" in asked and asked <= {"/", "/favicon.ico"}, asked
