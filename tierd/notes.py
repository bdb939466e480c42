"""Small JSON files in the state directory that must be right after a crash: each is replaced whole, and synced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace(path: Path, values: dict[str, Any]) -> None:
    """Have a file say this and nothing else, on the medium too. It blocks. Raises OSError, and then it says what it said."""
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
