"""What engines must have in common to share blocks, and what is refused at the start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

from tests.vllm.conftest import transfer
from tests.vllm.house import House
from tierd_engine.connectors.vllm.namespace import check_supported, layout_of, model_name
from tierd_engine.connectors.vllm.options import Options, Wishes


@pytest.fixture
def house(random_model: Path, tmp_path: Path) -> Iterator[House]:
    """An engine without a daemon."""
    house = House(random_model, transfer(tmp_path / "none.sock"))
    yield house
    house.close()


def changed(config: Any, name: str, value: Any) -> Any:
    """A copy of a configuration in which `a.b` is another."""
    config = deepcopy(config)
    *path, last = name.split(".")
    holder = config
    for part in path:
        holder = getattr(holder, part)
    object.__setattr__(holder, last, value)
    return config


def test_engines_that_are_the_same_share(house: House) -> None:
    """However many pages they have, and whatever their names."""
    name = model_name(house.config, house.kv_cache_config)
    more = replace(house.kv_cache_config, num_blocks=9)
    other = changed(house.config, "model_config.served_model_name", "another")
    assert model_name(other, more) == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_config.dtype", "float16"),
        ("model_config.quantization", "fp8"),
        ("model_config.max_model_len", 77),
        ("model_config.hf_config.rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ("model_config.hf_config.rms_norm_eps", 1e-3),
        ("cache_config.cache_dtype", "fp8"),
        ("cache_config.prefix_caching_hash_algo", "sha256_cbor"),
        ("attention_config.backend", "ANOTHER"),
        ("load_config.load_format", "dummy"),
    ],
)
def test_whatever_changes_the_bytes_keeps_engines_apart(house: House, name: str, value: Any) -> None:
    """None of these is in vLLM's block hashes."""
    before = model_name(house.config, house.kv_cache_config)
    assert model_name(changed(house.config, name, value), house.kv_cache_config) != before


def test_layout_layers_and_block_size_keep_engines_apart(house: House) -> None:
    """They come from the KV cache's own configuration."""
    config, [group] = house.kv_cache_config, house.kv_cache_config.kv_cache_groups
    names = {model_name(house.config, config)}
    names.add(model_name(house.config, replace(config, kv_cache_layout="BLHNC")))
    names.add(model_name(house.config, replace(config, kv_cache_groups=[replace(group, layer_names=["second", "first"])])))
    wider = replace(group, kv_cache_spec=replace(group.kv_cache_spec, block_size=64))
    names.add(model_name(house.config, replace(config, kv_cache_groups=[wider])))
    assert len(names) == 4
    assert layout_of(config).block_bytes == 2 * group.kv_cache_spec.page_size_bytes


def test_other_weights_in_the_same_place_are_another_model(house: House, random_model: Path) -> None:
    """Files are known by size and time, unless the operator names the weights."""
    before, named = (model_name(house.config, house.kv_cache_config, name) for name in ("", "mine"))
    [weights] = random_model.glob("*.safetensors")
    os.utime(weights, (1, 1))
    assert model_name(house.config, house.kv_cache_config) != before
    assert model_name(house.config, house.kv_cache_config, "mine") == named
    assert model_name(house.config, house.kv_cache_config, "yours") != named


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("kv_transfer_config.kv_load_failure_policy", "fail", '"kv_load_failure_policy": "recompute"'),
        ("cache_config.enable_prefix_caching", False, "leave out --no-enable-prefix-caching"),
        ("cache_config.prefix_caching_hash_algo", "xxhash", "--prefix-caching-hash-algo sha256_cbor"),
        ("parallel_config.world_size", 2, "Use --tensor-parallel-size only"),
        ("parallel_config.decode_context_parallel_size", 2, "Use --tensor-parallel-size only"),
        ("speculative_config", SimpleNamespace(), "speculative decoding is on"),
        ("model_config.enable_sleep_mode", True, "Leave out --enable-sleep-mode"),
    ],
)
def test_what_would_go_wrong_is_refused_with_the_remedy(house: House, name: str, value: Any, remedy: str) -> None:
    """By name, and before anything is served."""
    check_supported(house.config, house.kv_cache_config)
    with pytest.raises(ValueError, match=remedy):
        check_supported(changed(house.config, name, value), house.kv_cache_config)


def test_on_a_gpu_vllm_is_asked_for_blocks_in_one_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes that layout where its attention can, and another one where it cannot; on the CPU it is not asked."""
    undecided = changed(house.config, "cache_config.kv_cache_layout", None)
    taken = []
    for on_gpu in (False, True):
        monkeypatch.setattr("tierd_engine.connectors.vllm.api.on_gpu", lambda on_gpu=on_gpu: on_gpu)
        taken += [resolve_kv_cache_layout(deepcopy(undecided), [can]).name for can in (["LBNHC", "BLHNC"], ["LBNHC"])]
    assert taken == ["LBNHC", "LBNHC", "BLHNC", "LBNHC"]


def test_a_worker_has_its_own_part_of_every_block(house: House) -> None:
    """Blocks of one rank are not those of another, nor the whole ones of an engine with one worker."""
    two = changed(house.config, "parallel_config.tensor_parallel_size", 2)
    names = {model_name(config, house.kv_cache_config, rank=rank) for config, rank in [(house.config, 0), (two, 0), (two, 1)]}
    assert len(names) == 3


def test_workers_that_share_a_model_do_not_load_within_a_step(house: House) -> None:
    """A load that fails at one of them spoils what the others compute, and they do not know."""
    two = changed(changed(house.config, "parallel_config.tensor_parallel_size", 2), "parallel_config.world_size", 2)
    check_supported(two, house.kv_cache_config, "async")
    with pytest.raises(ValueError, match='Leave out "load": "sync"'):
        check_supported(two, house.kv_cache_config, "sync")


def test_several_groups_are_refused(house: House) -> None:
    """All groups or nothing: at first, nothing."""
    two = replace(house.kv_cache_config, kv_cache_groups=house.kv_cache_config.kv_cache_groups * 2)
    with pytest.raises(ValueError, match="--disable-hybrid-kv-cache-manager"):
        check_supported(house.config, two)


@pytest.mark.parametrize(
    "given", [{"load": "maybe"}, {"load_threads": 0}, {"saving_share": 1.5}, {"socket": 1}, {"sockt": "x"}]
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any]) -> None:
    """With the name of the key."""
    with pytest.raises(ValueError, match=f"kv_connector_extra_config: .*{next(iter(given))}"):
        Options.read(given)


@pytest.mark.parametrize(
    ("params", "wishes"),
    [
        (None, Wishes()),
        ({"tierd": {"store": False}}, Wishes(store=False)),
        ({"tierd": {"load": False, "priority": 300}}, Wishes(load=False)),
        ({"tierd": 7}, Wishes()),
        ({"other": {"store": False}}, Wishes()),
    ],
)
def test_a_request_says_what_it_declines(params: Any, wishes: Wishes) -> None:
    """What cannot be understood is no error to a user."""
    assert Wishes.read(params) == wishes
