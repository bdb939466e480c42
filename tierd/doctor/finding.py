"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
LEVELS = (OK, NOTE, WARNING, ERROR)
"""Good; absent or slower, as may be meant; to be mended; the daemon does not run so."""


@dataclass(frozen=True)
class Finding:
    """`found` is a fact with its figures; `remedy` what to do about it, empty when there is nothing to do."""

    check: str
    level: str
    found: str
    remedy: str = ""

    def to_map(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
