"""What the engine cannot run is refused by name; what it can run has a name of its own for its KV."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.conftest import HAS_GPU
from tierd.errors import Invalid
from tierd_engine.llm import LLM
from tierd_engine.model import fingerprint, layout_of, load_model

WINDOW = dict(use_sliding_window=True, sliding_window=32, max_window_layers=1)
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window of 64"),
        ("qwen3", WINDOW, "sliding_attention"),
        ("deepseek_v3", {}, "latent attention"),
        ("mamba", {}, "'mamba'"),
        ("jamba", {}, "'jamba'"),
        ("t5", {}, "encoder"),
        ("llama", DYNAMIC, "RoPE of type dynamic"),
    ],
)
def test_a_configuration_without_full_attention_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], reason: str
) -> None:
    """The configuration tells; no weights are read."""
    CONFIG_MAPPING[model_type](num_hidden_layers=2, **changes).save_pretrained(tmp_path)
    with pytest.raises(Invalid, match=reason):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bloom", {}, "BloomForCausalLM has attention code of its own"),
        ("bert", {}, "BertSelfAttention: attention with a mask of its own"),
        ("stablelm", {}, "StableLmForCausalLM does not take paged attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 2, "sliding_window": None, "head_dim": 16}, "softcap=50.0"),
    ],
)
def test_a_model_whose_layers_do_not_page_is_refused(
    write_model: Callable[..., Path], model_type: str, changes: dict[str, Any], reason: str
) -> None:
    """The first forward pass tells what the configuration did not."""
    with pytest.raises(Invalid, match=reason):
        LLM(write_model(model_type, **changes), pages=4)


def test_a_path_without_a_model_is_refused_with_the_path(tmp_path: Path) -> None:
    """No directory, an empty one, one with a choice of files, one with a broken configuration."""
    with pytest.raises(Invalid, match=r"nowhere is neither a directory nor a \.gguf file"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(Invalid, match=r"no config\.json and 0 \.gguf files"):
        LLM(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(Invalid, match=r"2 \.gguf files; name one"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Invalid, match="cannot be read"):
        LLM(tmp_path)


def test_an_unknown_dtype_and_a_foreign_device_are_refused(llama: Path, cache) -> None:
    """Each message names the value."""
    with pytest.raises(Invalid, match="'int4'"):
        LLM(llama, dtype="int4")
    with pytest.raises(Invalid, match="'meta'"):
        LLM(llama, device="meta", connect=cache.connect)
    if not HAS_GPU:
        with pytest.raises(Invalid, match="finds no GPU that is 'cuda'"):
            LLM(llama, device="cuda")


def test_the_fingerprint_is_of_the_content(llama: Path, write_model: Callable[..., Path], tmp_path: Path) -> None:
    """A copy has the same, one changed weight, another dtype or another RoPE base a different one."""
    name = fingerprint(load_model(llama))
    assert fingerprint(load_model(shutil.copytree(llama, tmp_path / "copy"))) == name
    touched = load_model(llama)
    with torch.no_grad():
        touched.get_parameter("model.layers.1.mlp.up_proj.weight")[5, 5] += 1e-6
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    turned = load_model(write_model("llama", num_key_value_heads=2, **rope))
    assert len({name, *map(fingerprint, (touched, load_model(llama, "bfloat16"), turned))}) == 4


def test_the_layout_is_that_of_the_models_own_keys(write_model: Callable[..., Path]) -> None:
    """Heads and head size by the configuration, whatever its keys are called."""
    grouped = layout_of(load_model(write_model("llama", num_key_value_heads=2, head_dim=32)), "float32")
    assert (grouped.layers, grouped.kv_heads, grouped.head_dim, grouped.block_tokens) == (2, 2, 32, 16)
    plain = layout_of(AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](n_layer=1, n_head=3, n_embd=48)), "float32")
    assert (plain.layers, plain.kv_heads, plain.head_dim) == (1, 3, 16)
