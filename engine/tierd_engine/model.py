"""Loads a model from a local path, refuses what the engine cannot run, and names what its KV depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from tierd.errors import Invalid
from tierd.layout import Layout
from tierd_engine.pages import DTYPES

BLOCK_TOKENS = 16
ROPE_OF_LENGTH = {"dynamic", "longrope"}
"""RoPE variants whose keys depend on how long the text becomes: a block's KV is then not a function of its prefix."""
CONFIG_NOISE = {"_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "dtype"}


def load_model(path: str | Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model from a directory (safetensors or one GGUF) or a `.gguf` file; nothing is downloaded.

    Raises Invalid when there is no model, or when it is not a decoder with full attention in every layer.
    """
    if dtype not in DTYPES:
        raise Invalid(f"model: dtype {dtype!r} is not one of {', '.join(DTYPES)}; choose one of these")
    directory, options = locate(path)
    try:
        config = AutoConfig.from_pretrained(directory, **options)
    except (OSError, ValueError) as error:
        raise Invalid(f"model: {directory} cannot be read: {error}") from error
    check_supported(config)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise Invalid(f"model: {directory} has no weights that can be loaded: {error}") from error
    if "gguf_file" in options:
        del model.config.quantization_config  # transformers has dequantised all weights: they are plain tensors now
    placed: PreTrainedModel = model.to(device)
    return placed


def write_safetensors(path: str | Path, directory: str | Path) -> None:
    """Write the model and tokenizer at `path` (a GGUF, say) as safetensors, which load in no time."""
    model = load_model(path)
    # A model that came from a GGUF refuses to be saved; one that is made anew from its configuration does not.
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(model.config.to_dict()))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    load_tokenizer(path).save_pretrained(directory)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer that belongs to the model at `path`; raises Invalid when there is none."""
    directory, options = locate(path)
    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError) as error:
        raise Invalid(f"model: no tokenizer in {directory} ({error}); give the prompt as token ids") from error


def locate(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Directory of the model and options for transformers' `from_pretrained`; raises Invalid when it is not local."""
    path = Path(path)
    options: dict[str, Any] = {"local_files_only": True}
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, options | {"gguf_file": path.name}
    if not path.is_dir():
        raise Invalid(f"model: {path} is neither a directory nor a .gguf file; give the path of a downloaded model")
    if (path / "config.json").exists():
        return path, options
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) != 1:
        raise Invalid(f"model: {path} has no config.json and {len(found)} .gguf files; name one file")
    return path, options | {"gguf_file": found[0]}


def check_supported(config: PreTrainedConfig) -> None:
    """Raise Invalid, naming the reason, for models whose KV is not plain full attention over one chain of tokens.

    What a configuration does not tell is found by the runner, which watches the first forward pass.
    """
    layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)} & ROPE_OF_LENGTH
    reasons = [
        (config.is_encoder_decoder, "an encoder beside its decoder"),
        (bool(layer_types), f"layers of type {', '.join(sorted(map(str, layer_types)))}"),
        (window, f"a sliding window of {window} tokens"),
        (getattr(config, "kv_lora_rank", None), "multi-head latent attention (kv_lora_rank)"),
        (bool(rope_types), f"RoPE of type {', '.join(rope_types)}, which depends on the length"),
        (not getattr(config, "num_attention_heads", None), "no attention heads"),
    ]
    for applies, reason in reasons:
        if applies:
            raise Invalid(
                f"model type {config.model_type!r} has {reason}; "
                "the engine runs decoder models with full attention in every layer (Llama, Mistral, Qwen2, Qwen3, ...)"
            )


def layout_of(model: PreTrainedModel, dtype: str, block_tokens: int = BLOCK_TOKENS) -> Layout:
    """Geometry of the model's KV blocks."""
    config = model.config
    heads = config.num_attention_heads
    return Layout(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        block_tokens=block_tokens,
    )


def fingerprint(model: PreTrainedModel) -> str:
    """A name that differs whenever anything that KV depends on does: configuration, dtype, every weight, every buffer.

    All weights as loaded are digested (xxh3, about 10 GB/s), so files, names and places of a model do not matter.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in CONFIG_NOISE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + xxhash.xxh3_128_digest(data))
    return f"{model.config.model_type}-{digest.hexdigest()[:32]}"
