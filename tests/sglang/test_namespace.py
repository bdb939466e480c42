"""What engines must have in common to share pages, and what is refused at the start."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed in this environment: make test-sglang")

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.storage import StorageBackendFactory

from tests.sglang.house import Engine, host_pool, serve, storage_config
from tierd_engine.connectors.sglang.namespace import ARGUMENTS, model_name
from tierd_engine.connectors.sglang.options import Options
from tierd_engine.connectors.sglang.stats import SERIES

NONE = Path("none.sock")


def name(pool: Any, model_id: str = "", **config: Any) -> str:
    """The namespace of an engine with this host memory."""
    return model_name(storage_config(NONE, pool, {}, **config), pool, Options(model_id=model_id))


@pytest.fixture(autouse=True)
def server() -> None:
    """What a server was started with."""
    serve()


def test_engines_that_are_the_same_share() -> None:
    """Whatever their sockets and names."""
    pool = host_pool("page_first")
    assert name(pool) == name(host_pool("page_first"), dp_rank=1, model_name="another", enable_storage_metrics=True)


@pytest.mark.parametrize(
    "config", [{"tp_rank": 1, "tp_size": 2}, {"tp_size": 2}, {"pp_size": 2}, {"attn_cp_size": 2}, {"attn_cp_rank": 1}]
)
def test_ranks_keep_their_parts_apart(config: dict[str, int]) -> None:
    """Each has other heads, layers or tokens of every page."""
    pool = host_pool("page_first")
    assert name(pool, **config) != name(pool)


def test_ranks_that_have_the_same_share() -> None:
    """With latent attention one rank saves for all."""
    pool = host_pool("page_first", "mla")
    assert name(pool, tp_rank=1, tp_size=2) == name(pool, tp_rank=0, tp_size=2)


def test_whatever_changes_the_bytes_keeps_engines_apart() -> None:
    """Layout, dtype, page size and kind of attention, none of which is in SGLang's keys."""
    pools = [
        host_pool("page_first"),
        host_pool("layer_first"),
        host_pool("page_first_direct"),
        host_pool("page_first", dtype=torch.float16),
        host_pool("page_first", page_tokens=8),
        host_pool("page_first", "mla"),
    ]
    assert len({name(pool) for pool in pools}) == len(pools)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kv_cache_dtype", "fp8_e5m2"),
        ("quantization", "fp8"),
        ("attention_backend", "triton"),
        ("json_model_override_args", '{"rope_theta": 1}'),
        ("model_path", "nowhere/another"),
        ("revision", "v2"),
    ],
)
def test_arguments_that_change_the_bytes_keep_engines_apart(argument: str, value: str) -> None:
    """They come from the server's command line."""
    pool = host_pool("page_first")
    before = name(pool)
    serve(**{argument: value})
    assert name(pool) != before
    assert argument in (*ARGUMENTS, "model_path", "revision")


def test_other_weights_in_the_same_place_are_another_model(tmp_path: Path) -> None:
    """Files are known by size and time, unless the operator names the weights."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    serve(model_path=str(tmp_path))
    pool = host_pool("page_first")
    before, named = name(pool), name(pool, "mine")
    os.utime(weights, (1, 1))
    assert name(pool) != before
    assert name(pool, "mine") == named != name(pool, "yours")


@pytest.mark.parametrize(
    ("extra", "remedy"),
    [
        ({"interface_v1": 0}, 'Add "interface_v1": 1'),
        ({"tierd": {"sockt": "x"}}, "tierd: unknown key 'sockt'; known are"),
        ({"tierd": {"copy_threads": "two"}}, "tierd: copy_threads must be of type int"),
        ({"tierd": "x"}, "tierd must be a map"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_remedy(extra: dict[str, Any], remedy: str) -> None:
    """By SGLang's own factory, before anything is served."""
    pool = host_pool("page_first")
    with pytest.raises(ValueError, match=remedy):
        StorageBackendFactory.create_backend("dynamic", storage_config(NONE, pool, extra), pool)


def test_every_option_and_series_is_documented() -> None:
    """What an operator can set, and what is on the server's metrics."""
    text = (Path(__file__).parents[2] / "docs/sglang.md").read_text()
    assert [option.name for option in fields(Options) if f"| `{option.name}` |" not in text] == []
    assert [series for series, _, _ in SERIES.values() if f"`{series}_total" not in text] == []


def test_a_model_with_more_state_than_pages_is_refused() -> None:
    """Pages without the state that belongs to them would be served as if they were all."""
    engine = Engine(NONE, host_pool("page_first"))
    engine.backend.register_mem_host_pool_v2(engine.mem_pool_host, PoolName.KV)
    with pytest.raises(ValueError, match=r"keeps state besides its KV pages \(mamba\)"):
        engine.backend.register_mem_host_pool_v2(engine.mem_pool_host, PoolName.MAMBA)
