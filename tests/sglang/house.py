"""SGLang's storage side of an engine, without the GPU around it: its factory, its host memory, its loops, and our backend.

What is in a page follows from its key, so that a page that is wrong, is not loaded or belongs to another shows.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation, StorageOperation
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs

PAGE_TOKENS, LAYERS, HEADS, WIDTH = 4, 3, 2, 32
POOL_PAGES = 400
CPU = torch.device("cpu")


def serve(**arguments: Any) -> None:
    """Be a server with these arguments, as far as a backend can see."""
    get_context().set_server_args(ServerArgs(**{"model_path": "nowhere/model", **arguments}))


def host_pool(layout: str, kind: str = "mha", dtype: torch.dtype = torch.bfloat16, page_tokens: int = PAGE_TOKENS) -> Any:
    """A real host pool of SGLang: "mha", "mla", or "asymmetric", whose values are narrower than its keys."""
    tokens = POOL_PAGES * page_tokens // 2
    common = {
        "host_to_device_ratio": 2.0,
        "host_size": 0,
        "page_size": page_tokens,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": tokens,
        "start_layer": 0,
        "end_layer": LAYERS,
    }
    with host_memory_budget_scope(1 << 30):
        if kind == "mla":
            return MLATokenToKVPoolHost(latents(tokens, page_tokens, dtype), target_layer_num=LAYERS, **common)
        narrow = WIDTH // 2 if kind == "asymmetric" else WIDTH
        pool = AsymmetricMHATokenToKVPoolHost if kind == "asymmetric" else MHATokenToKVPoolHost
        return pool(keys_and_values(tokens, page_tokens, dtype, narrow), **common)


def latents(tokens: int, page_tokens: int, dtype: torch.dtype) -> MLABufferInfo:
    """What the device has of a model with latent attention."""
    layers = tuple(torch.zeros(tokens, 1, WIDTH, dtype=dtype) for _ in range(LAYERS))
    return MLABufferInfo(
        buffers=layers,
        data_ptrs=pointers(layers),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=page_tokens,
        kv_lora_rank=WIDTH - 8,
        qk_rope_head_dim=8,
        kv_cache_dim=WIDTH,
        dtype=dtype,
        device=CPU,
    )


def keys_and_values(tokens: int, page_tokens: int, dtype: torch.dtype, value_width: int) -> MHABufferInfo:
    """What the device has of a model with heads."""
    keys, values = (
        tuple(torch.zeros(tokens, HEADS, width, dtype=dtype) for _ in range(LAYERS)) for width in (WIDTH, value_width)
    )
    buffers = KVBuffers(
        k=keys, v=values, k_data_ptrs=pointers(keys), v_data_ptrs=pointers(values), layout=next(iter(KVBufferLayout))
    )
    return MHABufferInfo(
        buffers=buffers,
        page_size=page_tokens,
        head_num=HEADS,
        head_dim=WIDTH,
        v_head_dim=value_width,
        dtype=dtype,
        device=CPU,
    )


def pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Where tensors are."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


class Engine(HiCacheController):
    """An engine's storage threads, as plain calls: `save` and `load` run SGLang's own loops over batches of 128 pages."""

    def __init__(self, socket: Path, pool: Any, *, extra: dict[str, Any] | None = None, **config: Any) -> None:
        self.storage_host_pool = self.mem_pool_host = pool
        self.page_size = pool.page_size
        self.prefetch_sync_queue: Queue[Any] = Queue()
        self.page_get_func, self.page_set_func = self._page_get_zero_copy, self._page_set_zero_copy
        self.storage_config = storage_config(socket, pool, extra or {}, **config)
        self.storage_backend = StorageBackendFactory.create_backend("dynamic", self.storage_config, pool)
        self.storage_backend.register_mem_pool_host(pool)

    @property
    def backend(self) -> Any:
        """Ours, also where SGLang's own fault wrapper is around it."""
        return getattr(self.storage_backend, "_backend", self.storage_backend)

    def pages(self, amount: str) -> dict[str, int]:
        """What was counted: `pages("save")` by what became of them."""
        return {result: int(count) for (name, result), count in self.backend.stats.amounts.items() if name == f"{amount}_pages"}

    def save(self, tokens: list[int], computed: int = 0, *, tell_prefix: bool = True) -> int:
        """Compute and store what follows the first `computed` pages; returns how many pages SGLang believes stored."""
        keys = keys_of(tokens, self.page_size)
        indices = self.mem_pool_host.alloc((len(keys) - computed) * self.page_size)
        for page, key in zip(self._numbers(indices), keys[computed:], strict=True):
            self._write(page, key)
        operation = StorageOperation(
            indices, tokens, hash_value=keys[computed:], prefix_keys=keys[:computed] if tell_prefix else None
        )
        self._page_backup(operation)
        self.mem_pool_host.free(indices)
        return operation.completed_tokens // self.page_size

    def load(self, tokens: list[int], computed: int = 0) -> int:
        """Look up and load what follows the first `computed` pages; returns how many arrived, all of which are right."""
        keys = keys_of(tokens, self.page_size)
        known = tokens[: computed * self.page_size]
        operation = PrefetchOperation(
            "request", tokens[len(known) :], keys[computed - 1] if computed else None, keys[:computed]
        )
        operation.hash_value, found_tokens = self._storage_hit_query(operation)
        operation.host_indices = indices = self.mem_pool_host.alloc(max(found_tokens, self.page_size))
        numbers = self._numbers(indices)
        for page in numbers:
            self.mem_pool_host.set_from_flat_data_page(page * self.page_size, torch.full_like(self._read(page), 7))
        arrived = int(self._page_transfer(operation))
        for page, key in zip(numbers[:arrived], keys[computed:], strict=False):
            assert torch.equal(self._read(page).view(torch.uint8), self.content(key)), f"a wrong page was served as {key}"
        self.mem_pool_host.free(indices)
        return arrived

    def content(self, key: str) -> torch.Tensor:
        """The bytes of a page in this pool: they follow from its key."""
        size = self.mem_pool_host.get_dummy_flat_data_page().nbytes
        word = np.frombuffer(sha256(key.encode()).digest(), np.uint8) & 0x3F  # no NaN among them, in any dtype
        return torch.from_numpy(np.resize(word, size))

    def close(self) -> None:
        """End the session."""
        self.storage_backend.close()

    def _numbers(self, indices: torch.Tensor) -> list[int]:
        numbers: list[int] = (indices[:: self.page_size] // self.page_size).tolist()
        return numbers

    def _write(self, page: int, key: str) -> None:
        content = self.content(key).view(self.mem_pool_host.dtype)
        self.mem_pool_host.set_from_flat_data_page(page * self.page_size, content)

    def _read(self, page: int) -> torch.Tensor:
        flat: torch.Tensor = self.mem_pool_host.get_data_page(page * self.page_size)
        return flat


def storage_config(socket: Path, pool: Any, extra: dict[str, Any], **config: Any) -> HiCacheStorageConfig:
    """What SGLang makes of the one line that a user adds."""
    line = {"module_path": "tierd_engine.connectors.sglang", "class_name": "TierdHiCache", "backend_name": "tierd"}
    return HiCacheStorageConfig(
        **{
            "tp_rank": 0,
            "tp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
            "attn_cp_rank": 0,
            "attn_cp_size": 1,
            "is_mla_model": isinstance(pool, MLATokenToKVPoolHost),
            "enable_storage_metrics": False,
            "is_page_first_layout": pool.layout == "page_first",
            "model_name": "model",
            "extra_config": {**line, "interface_v1": 1, "tierd": {"socket": str(socket)}, **extra},
            **config,
        }
    )


def keys_of(tokens: list[int], page_tokens: int = PAGE_TOKENS) -> list[str]:
    """SGLang's own keys for a sequence's pages."""
    keys: list[str] = get_hash_str(tokens, None, page_size=page_tokens)
    return keys


def prompt(seed: int, pages: int) -> list[int]:
    """Tokens that no other seed has in the same order."""
    return np.random.default_rng(seed).integers(0, 50_000, pages * PAGE_TOKENS).tolist()
