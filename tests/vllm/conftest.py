"""Models, daemons and engines for tests with vLLM, which `make test-vllm` runs; elsewhere there is nothing to collect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import make, start  # noqa: F401

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

BLOCK_TOKENS = 32
PATIENCE = {"lookup_seconds_max": 5.0, "transfer_seconds_max": 10.0}
"""With a daemon that has a core for itself only now and then."""


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights so large (std 0.25) that one wrong block changes what it says."""
    return write_random_model(tmp_path_factory.mktemp("model"))


def write_random_model(folder: Path) -> Path:
    """Into an empty folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def transfer(socket: Path, **options: Any) -> dict[str, Any]:
    """The one line that a user adds."""
    return {
        "kv_connector": "TierdConnector",
        "kv_connector_module_path": "tierd_engine.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"socket": str(socket), **PATIENCE, **options},
    }


@pytest.fixture
def engine(random_model: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts engines: `engine(socket, load="sync")`; with socket None one without tierd."""
    from tests.vllm.engine import Engine

    started: list[Engine] = []

    def begin(socket: Path | None, *, arguments: dict[str, Any] | None = None, **options: Any) -> Engine:
        given: dict[str, Any] = {
            "model": str(random_model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "block_size": BLOCK_TOKENS,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
            "seed": 0,
            **(arguments or {}),
        }
        if socket is not None:
            given["kv_transfer_config"] = transfer(socket, **options)
        started.append(Engine(tmp_path / f"engine{len(started)}", **given))
        return started[-1]

    yield begin
    for each in started:
        each.end()
    for log in sorted(tmp_path.glob("engine*")):
        print(f"-- {log}\n{log.read_text()[-6000:]}")  # pytest shows it when the test failed
