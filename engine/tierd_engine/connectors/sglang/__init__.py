"""tierd for SGLang: `--hicache-storage-backend dynamic` with this module and `TierdHiCache`, see docs/sglang.md.

SGLang has one backend in each scheduler process, that is for each rank, and calls it from threads of its own: one that looks
up, one that loads, one that saves.
"""

from __future__ import annotations

import logging
from itertools import chain, repeat
from time import perf_counter
from typing import Any

import torch

from tierd.block import HASH_BYTES, ROOT
from tierd.client import Client, Stored
from tierd_engine.connectors.failures import said_not_raised
from tierd_engine.connectors.sglang import api, namespace
from tierd_engine.connectors.sglang.options import Options
from tierd_engine.connectors.sglang.pages import host_pages, page_numbers
from tierd_engine.connectors.sglang.stats import Stats

__all__ = ["TierdHiCache"]

log = logging.getLogger(__name__)


class TierdHiCache(api.HiCacheStorage):
    """SGLang's storage of pages behind its host memory, interface v1. Raises ValueError at the start for what it cannot serve.

    `keys` are consecutive pages of one sequence, 64 hexadecimal digits each; `host_indices` has an index for each of their
    tokens. What comes before them is in `extra_info`, if SGLang is told to say so. Later, failures are misses.
    """

    def __init__(self, storage_config: api.HiCacheStorageConfig, _: dict[str, Any] | None = None) -> None:
        if api.VERSION not in api.TESTED:
            log.warning("TierdHiCache was tested with SGLang %s, this is %s", ", ".join(api.TESTED), api.VERSION)
        namespace.check_supported(storage_config)
        self._options = Options.read(storage_config.extra_config or {})
        self._config = storage_config
        self._told = False

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """SGLang's host memory: with it everything is known that blocks have to have in common."""
        super().register_mem_pool_host(mem_pool_host)
        options = self._options
        self._pages = host_pages(mem_pool_host)
        self._client = Client(
            options.socket or None,
            model=namespace.model_name(self._config, mem_pool_host, options),
            layout=namespace.layout_of(mem_pool_host, self._pages.block_bytes),
            domain=options.domain or None,
            deadline_seconds=options.answer_seconds_max,
            copy_threads=options.copy_threads,
            name=f"sglang-{self._config.tp_rank}",
        )
        self.stats = Stats(self._config, self._pages.block_bytes)
        log.info("%r, %r", self._client.session, self._pages)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuses every pool but the one there is: pages would be served without the state that belongs to them."""
        if host_pool_name != api.PoolName.KV:
            raise ValueError(
                f"TierdHiCache: the model keeps state besides its KV pages ({host_pool_name}), which is not stored yet. "
                "Leave out --hicache-storage-backend, or speculative decoding if that is what needs it. See docs/sglang.md"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def batch_exists(self, keys: list[str], extra_info: api.HiCacheStorageExtraInfo | None = None) -> int:
        """How many of the pages, from the first on, tierd has; those on disk begin to come to memory."""
        began, found = perf_counter(), 0
        with said_not_raised(log, "look-up"):
            found = self._look_up(hashes_of(keys), parent_of(extra_info))
        self.stats.looked_up(found, len(keys) - found, perf_counter() - began)
        return found

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: api.HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill pages, for each whether it has arrived: none does behind one that has not."""
        began, arrived = perf_counter(), 0
        with said_not_raised(log, "load"):
            pages = page_numbers(host_indices, self.mem_pool_host.page_size, len(keys))
            arrived = self._client.load(hashes_of(keys), self._pages, pages, parent_of(extra_info))
        self.stats.loaded(arrived, len(keys) - arrived, perf_counter() - began)
        return leading(arrived, len(keys))

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: api.HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages, for each whether tierd has it now. Those behind one that tierd does not have are counted, not stored."""
        began, stored = perf_counter(), Stored(refused=len(keys))
        if api.keys_before(extra_info) is None:
            self._tell_once()
            stored = Stored(refused=len(keys), parent_unknown=True)
        else:
            with said_not_raised(log, "save"):
                pages = page_numbers(host_indices, self.mem_pool_host.page_size, len(keys))
                stored = self._client.store(hashes_of(keys), self._pages, pages, parent_of(extra_info))
        lost = "unknown_parent" if stored.parent_unknown else "refused"
        counts = {"stored": stored.stored, "present": stored.present, lost: stored.refused}
        self.stats.saved(counts, perf_counter() - began)
        return leading(stored.stored + stored.present, len(keys))

    def get_stats(self) -> api.StorageMetrics:
        """For SGLang's own series about its storage, since the last call."""
        return self.stats.take()

    def clear(self) -> None:
        """Nothing is cleared: an operator who asks may have changed weights, and tierd cannot tell."""
        log.error("tierd keeps its blocks: after a change of weights restart the engine with another model_id")

    def close(self) -> None:
        """End the session with the daemon."""
        self._client.close()

    def _look_up(self, hashes: bytes, parent: bytes) -> int:
        found, pages = 0, len(hashes) // HASH_BYTES
        while found < pages:
            with self._client.lookup(hashes[found * HASH_BYTES :], parent) as lookup:
                asked, more = sum(lookup.tiers.values()), lookup.blocks
            found += more
            if more < asked:
                break
            parent = hashes[(found - 1) * HASH_BYTES : found * HASH_BYTES]
        return found

    def _tell_once(self) -> None:
        if not self._told:
            self._told = True
            log.error(
                "TierdHiCache stores nothing, because SGLang does not say which pages follow which. Add "
                '"hicache_storage_pass_prefix_keys": true to --hicache-storage-backend-extra-config. See docs/sglang.md'
            )

    # -- the interface before v1, which check_supported keeps SGLang from using ----------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """A miss."""

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[None]:
        """Misses."""
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Not stored."""
        return False

    def batch_set(self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        """Not stored."""
        return False

    def exists(self, key: str) -> bool:
        """Whether a sequence begins with this page."""
        return self.batch_exists([key]) == 1


def hashes_of(keys: list[str]) -> bytes:
    """Keys as tierd has them, 32 bytes each. Raises ValueError for one that is no SHA-256."""
    hashes = bytes.fromhex("".join(keys))
    if any(len(key) != 2 * HASH_BYTES for key in keys):
        raise ValueError(f"keys are not all {2 * HASH_BYTES} hexadecimal digits: {keys[:3]}")
    return hashes


def parent_of(extra_info: api.HiCacheStorageExtraInfo | None) -> bytes:
    """The hash before a call's first; the root's where SGLang does not say, behind which a suffix is a miss.

    SGLang's look-ups do not say so for the start of a sequence, either.
    """
    before = api.keys_before(extra_info)
    return hashes_of(before[-1:]) if before else ROOT


def leading(good: int, pages: int) -> list[bool]:
    """True for the first ones."""
    return list(chain(repeat(True, good), repeat(False, pages - good)))
