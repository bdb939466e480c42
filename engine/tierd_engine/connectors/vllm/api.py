"""Everything of vLLM that the connector uses. What differs between its versions is dealt with here, and nowhere else."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.config import VllmConfig
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
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.metrics.cache_hit_source import CacheHitSource

TESTED = ("0.32.0",)
"""Versions that `make test-vllm` ran with."""

VERSION: str = vllm.__version__

__all__ = [
    "TESTED",
    "VERSION",
    "CacheHitSource",
    "FullAttentionSpec",
    "KVCacheConfig",
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
    "init_logger",
    "platform_name",
]


def platform_name() -> str:
    """What computes: the kind of device, and its name."""
    return f"{current_platform.device_type} {current_platform.get_device_name()}"


def block_ids(scheduler_output: Any, request_id: str) -> list[int]:
    """The pages of a request that is scheduled in this step, in the order of its blocks."""
    groups = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
    pages: list[int] = groups[0]
    return pages
