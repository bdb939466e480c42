"""Whose blocks these are: what the backend refuses, the layout of a block, and a name that differs when the bytes would.

SGLang's keys are SHA-256 over the key before, tokens, the LoRA adapter and `cache_salt`. Neither model, dtype, layout nor
rank is in them: whatever decides what the bytes of a page are, or mean, has to be in the namespace.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from tierd.layout import Layout
from tierd_engine.connectors.sglang.api import VERSION, HiCacheStorageConfig, server_arguments
from tierd_engine.connectors.sglang.options import Options
from tierd_engine.connectors.sglang.pages import describe
from tierd_engine.connectors.weights import weights_of

ARGUMENTS = (
    "attention_backend",
    "context_length",
    "decode_attention_backend",
    "dtype",
    "json_model_override_args",
    "kv_cache_dtype",
    "load_format",
    "model_impl",
    "prefill_attention_backend",
    "quantization",
    "quantization_param_path",
    "speculative_algorithm",
)
"""Arguments of the server that change bytes. An SGLang that has renamed one does not start, rather than to share too much."""

SHAPE = ("layer_num", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim")
"""Attributes of host pools, some of which each kind has."""


def check_supported(config: HiCacheStorageConfig) -> None:
    """Raise ValueError, with what to do, for a configuration in which SGLang would not use the backend as it is meant."""
    if not (config.extra_config or {}).get("interface_v1"):
        raise ValueError(
            "TierdHiCache: without interface_v1 SGLang copies every page twice, and does not say which pages follow which. "
            'Add "interface_v1": 1 to --hicache-storage-backend-extra-config. See docs/sglang.md'
        )


def layout_of(pool: Any, block_bytes: int) -> Layout:
    """A page as tierd sees it: so many layers of so many bytes for each token."""
    token_bytes, left = divmod(block_bytes, pool.layer_num * pool.page_size)
    if left:
        raise ValueError(f"{describe(pool)} has {block_bytes} bytes a page, not the same for each layer and token")
    return Layout(pool.layer_num, 1, token_bytes, "uint8", block_tokens=pool.page_size, kv_parts=1)


def model_name(config: HiCacheStorageConfig, pool: Any, options: Options) -> str:
    """A name that is the same for engines, and ranks of them, whose pages are interchangeable, and for no others.

    `model_id` names the weights; without it a local directory is known by its weight files' names, sizes, times and samples,
    anything else by its name and revision.
    """
    arguments = server_arguments()
    parts: dict[str, Any] = {
        "sglang": VERSION,  # which bytes an attention backend writes is SGLang's own affair
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "weights": options.model_id or weights_of(arguments.model_path, arguments.revision),
        "arguments": {name: getattr(arguments, name) for name in ARGUMENTS},
        "pool": [type(pool).__name__, pool.layout, str(pool.dtype), pool.page_size, pool.storage_format_tag],
        "shape": {name: getattr(pool, name, None) for name in SHAPE},
        "tensor": [None if config.is_mla_model else config.tp_rank, config.tp_size],  # MLA: all ranks have the same
        "pipeline": [config.pp_rank, config.pp_size],
        "context": [config.attn_cp_rank, config.attn_cp_size],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return f"sglang-{digest[:32]}"
