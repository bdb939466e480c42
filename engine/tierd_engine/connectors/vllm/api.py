"""Everything of vLLM that the connector uses. What differs between its versions is dealt with here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_events import MEDIUM_STORAGE, AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash, to_event_extra_keys
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.metrics.cache_hit_source import CacheHitSource

TESTED = ("0.32.0",)
"""Versions that `make test-vllm` ran with."""

VERSION: str = vllm.__version__

__all__ = [
    "TESTED",
    "VERSION",
    "AllBlocksCleared",
    "CacheHitSource",
    "FullAttentionSpec",
    "KVCacheConfig",
    "KVCacheEvent",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorWorkerMetadata",
    "SupportsHMA",
    "UniformTypeKVCacheSpecs",
    "VllmConfig",
    "block_ids",
    "block_removed",
    "block_stored",
    "init_logger",
    "on_gpu",
    "platform_name",
    "publishes_events",
]


def platform_name() -> str:
    """What computes: the kind of device, and its name."""
    return f"{current_platform.device_type} {current_platform.get_device_name()}"


def on_gpu() -> bool:
    """Whether NVIDIA GPUs compute."""
    return bool(current_platform.is_cuda())


def publishes_events(config: VllmConfig) -> bool:
    """Whether KV events are wanted."""
    return config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events


WHERE = {"medium": MEDIUM_STORAGE, "locality": "LOCAL", "group_idx": 0, "ownership": "tierd"}
"""In words of vLLM's events: behind the engine's own pages, on this machine. Some of it is in memory, but that changes."""


def block_stored(request: Any, first: int, end: int, block_tokens: int) -> KVCacheEvent:
    """The event that tierd has blocks [first, end) of a request."""
    extra_keys, image = [], 0
    for at in range(first, end):
        keys, image = generate_block_hash_extra_keys(request, at * block_tokens, (at + 1) * block_tokens, image)
        extra_keys.append(keys)
    lora = request.lora_request
    return BlockStored(
        block_hashes=[maybe_convert_block_hash(block) for block in request.block_hashes[first:end]],
        parent_block_hash=maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None,
        token_ids=request.all_token_ids[first * block_tokens : end * block_tokens],
        block_size=block_tokens,
        lora_id=lora.adapter_id if lora else None,
        lora_name=lora.name if lora else None,
        extra_keys=to_event_extra_keys(extra_keys),
        session_id=request.session_id,
        **WHERE,
    )


def block_removed(hashes: Iterable[bytes]) -> KVCacheEvent:
    """The event that tierd has these blocks no more."""
    return BlockRemoved(block_hashes=[maybe_convert_block_hash(block) for block in hashes], **WHERE)


def block_ids(scheduler_output: Any, request_id: str) -> list[int]:
    """The pages of a request that is scheduled in this step, in the order of its blocks."""
    groups = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
    pages: list[int] = groups[0]
    return pages
