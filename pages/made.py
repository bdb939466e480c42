"""Every page that is made, by its name in the repository."""

from __future__ import annotations

import json
from pathlib import Path

from pages import configuration, promises, seen

ROOT = Path(__file__).parents[1]


def pages() -> dict[str, str]:
    """Name -> text."""
    example = (ROOT / "systemd/tierd.toml").read_text()
    results = {name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("promises", "seen")}
    return {
        "docs/configuration.md": configuration.page(example),
        "docs/promises.md": promises.page(results["promises"]),
        "docs/seen.md": seen.page(results["seen"]),
    }
