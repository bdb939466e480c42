"""What operators set in an engine's own configuration: known keys, of the right types."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def check_options(kind: type[Any], given: Any, where: str) -> None:
    """Raise ValueError unless every key of `given` is a field of the dataclass, of its default's type; it stands in `where`."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a map, not {given!r:.80}")
    known = {field.name: type(field.default) for field in fields(kind)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}; known are {', '.join(sorted(known))}")
        if not isinstance(value, (int, float) if known[name] is float else known[name]):
            raise ValueError(f"{where}: {name} must be of type {known[name].__name__}, not {value!r}")
