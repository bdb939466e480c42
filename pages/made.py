"""Every page that is made, by its name in the repository."""

from __future__ import annotations

from pathlib import Path

from pages import configuration

ROOT = Path(__file__).parents[1]


def pages() -> dict[str, str]:
    """Name -> text."""
    return {"docs/configuration.md": configuration.page((ROOT / "systemd/tierd.toml").read_text())}
