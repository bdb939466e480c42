"""The site: `python -m pages.site FOLDER` has mkdocs build it, strictly. A page, a link or an anchor that is not there fails.

mkdocs wants all pages below one folder that has nothing else; ours are where they belong in the repository, so a folder of
links to them is made for it. All relative links of the pages hold there as they do in the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pages.made import ROOT

SHOWN = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "docs", "dashboards", "systemd", "examples")


def build(folder: Path) -> str:
    """Build the site; returns what mkdocs said, and ends the process with it where that was a complaint."""
    with tempfile.TemporaryDirectory(prefix="tierd-pages-") as name:
        source = Path(name, "pages")
        source.mkdir()
        for shown in SHOWN:
            (source / shown).symlink_to(ROOT / shown)
        config = (ROOT / "pages/mkdocs.yml").read_text()
        Path(name, "mkdocs.yml").write_text(config)
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder.resolve())]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(done.stderr)
    return done.stderr


if __name__ == "__main__":
    print(build(Path(sys.argv[1])), end="")
