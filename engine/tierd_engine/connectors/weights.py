"""What tells a model's weights from others: engines with different ones must not share blocks."""

from __future__ import annotations

import json
from pathlib import Path

FILES = (".safetensors", ".bin", ".pt", ".gguf")


def weights_of(model: str, revision: str | None) -> str:
    """Names, sizes and times of the weights' files where `model` is on this machine; else its name and revision."""
    path = Path(model)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in FILES)
    elif path.is_file():
        files = [path]
    else:
        return f"{model}@{revision}"
    return json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
