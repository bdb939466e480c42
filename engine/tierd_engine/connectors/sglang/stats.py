"""What the backend counts: on SGLang's own `/metrics` with `--enable-metrics`. Each series is declared once, in SERIES."""

from __future__ import annotations

from collections import Counter as Amounts
from functools import cache
from threading import Lock
from typing import Any

from tierd_engine.connectors.sglang.api import HiCacheStorageConfig, StorageMetrics

SERIES = {
    "lookup_pages": ("sglang:tierd_lookup_pages", "Pages that were looked up in tierd: hit + miss.", "result"),
    "lookup_seconds": ("sglang:tierd_lookup_seconds", "Time of storage threads in look-ups.", None),
    "load_pages": ("sglang:tierd_load_pages", "Pages that were asked for: loaded + failed.", "result"),
    "load_seconds": ("sglang:tierd_load_seconds", "Time of storage threads in loads.", None),
    "save_pages": (
        "sglang:tierd_save_pages",
        "Pages that were offered: stored + present + refused + unknown_parent.",
        "result",
    ),
    "save_seconds": ("sglang:tierd_save_seconds", "Time of storage threads in saves.", None),
    "copied_bytes": ("sglang:tierd_copied_bytes", "Bytes copied: loaded + stored.", "direction"),
}
"""By the name used here: name of the counter, help, and the label that its amounts have."""

LABELS = ("tp_rank", "pp_rank", "dp_rank")


class Stats:
    """Amounts by (name in SERIES, value of its label or ""), since the start. For several threads."""

    def __init__(self, config: HiCacheStorageConfig, page_bytes: int) -> None:
        self.amounts: Amounts[tuple[str, str]] = Amounts()
        self._exports: bool = config.enable_storage_metrics
        self._ranks = [str(getattr(config, label)) for label in LABELS]
        self._page_bytes = page_bytes
        self._of_sglang = StorageMetrics()
        self._lock = Lock()

    def looked_up(self, hit: int, miss: int, seconds: float) -> None:
        """Count one look-up."""
        self._count("lookup", {"hit": hit, "miss": miss}, seconds)

    def loaded(self, loaded: int, failed: int, seconds: float) -> None:
        """Count one load."""
        self._count("load", {"loaded": loaded, "failed": failed}, seconds, loaded)

    def saved(self, pages: dict[str, int], seconds: float) -> None:
        """Count one save: pages by what became of them."""
        self._count("save", pages, seconds, pages.get("stored", 0))

    def take(self) -> StorageMetrics:
        """What SGLang's own series for storage say about the calls since the last one."""
        with self._lock:
            taken, self._of_sglang = self._of_sglang, StorageMetrics()
        return taken

    def _count(self, what: str, pages: dict[str, int], seconds: float, copied: int = 0) -> None:
        amounts = {(f"{what}_pages", result): float(count) for result, count in pages.items()}
        amounts[f"{what}_seconds", ""] = seconds
        if copied:
            amounts["copied_bytes", "loaded" if what == "load" else "stored"] = float(copied * self._page_bytes)
        with self._lock:
            self.amounts.update(amounts)  # a Counter's adds
            if self._exports and copied:
                self._tell_sglang(what, copied, seconds)
        if self._exports:
            for (name, value), amount in amounts.items():
                counters()[name].labels(*self._ranks, *([value] if value else [])).inc(amount)

    def _tell_sglang(self, what: str, copied: int, seconds: float) -> None:
        told = self._of_sglang
        pages, bandwidth = (
            (told.prefetch_pgs, told.prefetch_bandwidth) if what == "load" else (told.backup_pgs, told.backup_bandwidth)
        )
        pages.append(copied)
        bandwidth.append(copied * self._page_bytes / max(seconds, 1e-9) / 1e9)


@cache
def counters() -> dict[str, Any]:
    """The counters of SERIES, made once in a process, and not before SGLang has said where its processes collect theirs."""
    from prometheus_client import Counter

    return {
        name: Counter(series, text, [*LABELS, *([label] if label else [])]) for name, (series, text, label) in SERIES.items()
    }
