"""Everything of SGLang that the connector uses. What differs between its versions is dealt with here, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, HiCacheStorageExtraInfo, PoolName
from sglang.srt.observability.metrics_collector import StorageMetrics
from sglang.srt.runtime_context import get_server_args
from sglang.version import __version__

TESTED = ("0.5.23",)
"""Versions that `make test-sglang` ran with."""

VERSION: str = __version__

__all__ = [
    "TESTED",
    "VERSION",
    "HiCacheStorage",
    "HiCacheStorageConfig",
    "HiCacheStorageExtraInfo",
    "PoolName",
    "StorageMetrics",
    "keys_before",
    "page_addresses",
    "server_arguments",
]


def server_arguments() -> Any:
    """The arguments that the server was started with. Raises ValueError where there is no server."""
    return get_server_args()


def keys_before(extra_info: HiCacheStorageExtraInfo | None) -> list[str] | None:
    """Keys of the pages from the start of the sequence to those of a call; None where SGLang does not say."""
    return None if extra_info is None else extra_info.prefix_keys


def page_addresses(pool: Any, page: int) -> list[tuple[int, int]]:
    """Where the pieces of a page of a host pool are: address and bytes, by what SGLang tells backends that copy in place."""
    found = pool.get_page_buffer_meta(torch.arange(page * pool.page_size, (page + 1) * pool.page_size))
    return [] if found is None else list(zip(*found, strict=True))
