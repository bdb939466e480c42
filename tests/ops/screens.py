"""Pictures of `tierd top` and of the status page for the docs, of a daemon at work: a part of `make pictures`.

The terminal is drawn by rich, which drew it there too; the page by a headless chromium.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from select import select

from rich.console import Console

from dashboards.__main__ import ROOT
from tests.daemon.harness import Daemon
from tests.daemon.test_page import BROWSER
from tests.ops.busy import small_daemon, under_load
from tierd.cli.screen import screen
from tierd.cli.top import look

FOLDER = ROOT / "docs/operations"
LOADED_SECONDS, INTERVAL_SECONDS = 60.0, 1.0
COLUMNS = 110
PAGE_PIXELS = "900,760"
FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
"""What rich's SVG would fetch from elsewhere; any fixed-width font does."""


def main() -> None:
    """Load a daemon, and look at it in both ways."""
    with tempfile.TemporaryDirectory(prefix="tierd-", dir="/tmp") as name:
        daemon = small_daemon(Path(name) / "d").start()
        try:
            with under_load(daemon):
                select([], [], [], LOADED_SECONDS)
                (FOLDER / "top.svg").write_text(top(daemon))
                (FOLDER / "page.png").write_bytes(page(daemon, Path(name)))
        finally:
            daemon.end()


def top(daemon: Daemon) -> str:
    """What `tierd top` shows of the last second, as SVG."""
    before = look(daemon.admin)
    select([], [], [], INTERVAL_SECONDS)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(screen(look(daemon.admin), before))
    return FONTS.sub("", console.export_svg(title="tierd top", unique_id="top"))


def page(daemon: Daemon, folder: Path) -> bytes:
    """The page at `/` of the metrics port, as PNG."""
    assert BROWSER, "no chromium is installed"
    picture = folder / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += [f"--user-data-dir={folder}/profile", f"--window-size={PAGE_PIXELS}", "--hide-scrollbars"]
    address = f"http://{daemon.status()['metrics']}/"
    subprocess.run([BROWSER, *options, f"--screenshot={picture}", address], capture_output=True, check=True, timeout=90)
    return picture.read_bytes()


if __name__ == "__main__":
    main()
