"""Whose blocks these are: what the connector refuses, the layout of a block, and a name that differs when the bytes would.

vLLM's block hashes cover tokens, LoRA's name and path, images and `cache_salt`. Everything else that decides what a block's
bytes are, or mean, has to be in the namespace; what cannot be covered is refused here, by name and with the remedy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tierd.layout import Layout
from tierd_engine.connectors.vllm.api import VERSION, FullAttentionSpec, KVCacheConfig, VllmConfig, platform_name
from tierd_engine.connectors.weights import weights_of

CONFIG_NOISE = {"_name_or_path", "_commit_hash", "transformers_version", "architectures"}
ALGORITHMS = ("sha256", "sha256_cbor")


def check_supported(config: VllmConfig, kv_cache_config: KVCacheConfig, load: str = "async") -> None:
    """Raise ValueError, with what to do, for what the connector would get wrong or cannot do yet."""
    transfer, cache, parallel = config.kv_transfer_config, config.cache_config, config.parallel_config
    assert transfer is not None
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    refused = [
        (
            transfer.kv_load_failure_policy != "recompute",
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a block that is lost would fail a user's "
            'request. Add "kv_load_failure_policy": "recompute" to --kv-transfer-config',
        ),
        (
            not cache.enable_prefix_caching,
            "prefix caching is off, and with it block hashes: leave out --no-enable-prefix-caching",
        ),
        (
            cache.prefix_caching_hash_algo not in ALGORITHMS,
            f"block hashes are {cache.prefix_caching_hash_algo}: tierd names blocks by 32 bytes that nobody can forge. "
            "Add --prefix-caching-hash-algo sha256_cbor",
        ),
        (
            parallel.world_size != parallel.tensor_parallel_size or parallel.decode_context_parallel_size > 1,
            f"the model runs on {parallel.world_size} workers, and not by tensor parallelism alone: they divide the layers or "
            "tokens of a block, which the connector does not put together. Use --tensor-parallel-size only",
        ),
        (
            parallel.world_size > 1 and load == "sync",
            "a synchronous load that fails at one worker spoils what the others compute in the same step, and they would store "
            'it. Leave out "load": "sync"',
        ),
        (
            len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec),
            f"the KV cache has {len(groups)} groups ({', '.join(kinds)}): the connector stores one group of full attention. "
            "Add --disable-hybrid-kv-cache-manager, which makes one group of a model with sliding windows",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding is on: blocks may hold tokens that are rejected later. Leave it out",
        ),
        (
            config.model_config.enable_sleep_mode,
            "an engine that falls asleep gives up its pages, and blocks may still be copied from them. "
            "Leave out --enable-sleep-mode",
        ),
        (
            cache.cache_dtype.startswith("fp8") and getattr(cache, "calculate_kv_scales", False),
            "KV scales are computed anew at each start, and stored blocks carry none. Leave out --calculate-kv-scales",
        ),
    ]
    for applies, reason in refused:
        if applies:
            raise ValueError(f"TierdConnector: {reason}. See docs/vllm.md")
    tokens, hashed = groups[0].kv_cache_spec.block_size, kv_cache_config.hash_block_size or groups[0].kv_cache_spec.block_size
    if hashed != tokens:
        raise ValueError(f"TierdConnector: blocks have {tokens} tokens and hashes {hashed}: leave out --hash-block-size")


def layout_of(kv_cache_config: KVCacheConfig) -> Layout:
    """A block as tierd sees it: so many layers of so many bytes for each token."""
    [group] = kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    token_bytes, left = divmod(spec.page_size_bytes, spec.block_size)
    if left:
        raise ValueError(
            f"TierdConnector: a page of {spec.page_size_bytes} bytes for {spec.block_size} tokens is not supported"
        )
    return Layout(len(group.layer_names), 1, token_bytes, "uint8", block_tokens=spec.block_size, kv_parts=1)


def model_name(config: VllmConfig, kv_cache_config: KVCacheConfig, model_id: str = "", rank: int = 0) -> str:
    """A name that is the same for engines whose blocks are interchangeable, and for no others; `rank` is the worker's.

    `model_id` names the weights; without it a local directory is known by its weight files' names, sizes, times and samples,
    anything else by its name and revision.
    """
    model, [group] = config.model_config, kv_cache_config.kv_cache_groups
    hf_config = {key: value for key, value in model.hf_config.to_dict().items() if key not in CONFIG_NOISE}
    parts: dict[str, Any] = {
        "vllm": VERSION,  # which bytes an attention backend writes is vLLM's own affair
        "platform": platform_name(),
        "attention": str(getattr(config.attention_config, "backend", None)),
        "weights": model_id or weights_of(model.model, commit_of(model)),
        "load_format": str(config.load_config.load_format),
        "seed": model.seed if config.load_config.load_format == "dummy" else None,
        "config": hf_config,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "max_model_len": model.max_model_len,  # some kinds of RoPE depend on it
        "kv_dtype": config.cache_config.cache_dtype,
        "kv_layout": kv_cache_config.kv_cache_layout,
        "kv_spec": repr(group.kv_cache_spec),
        "layers": group.layer_names,
        "part": f"{rank} of {config.parallel_config.tensor_parallel_size}",
        "hash": config.cache_config.prefix_caching_hash_algo,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return f"vllm-{getattr(model.hf_config, 'model_type', 'model')}-{digest[:32]}"


def commit_of(model: Any) -> str | None:
    """The commit that a model was fetched from, where vLLM knows it; else the revision that was asked for."""
    commit: str | None = getattr(model.hf_config, "_commit_hash", None) or model.revision
    return commit
