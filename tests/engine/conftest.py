"""Tiny random models that are written to disk, their transformers twins as oracle, a client that is a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tierd.block import ROOT, split
from tierd.layout import Layout

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=2048,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
    initializer_range=0.25,  # weights large enough for one wrong block to change the tokens
)
GROUPED = dict(num_key_value_heads=2, head_dim=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gpt2": {},
    "mixtral": GROUPED | {"sliding_window": None, "num_local_experts": 4},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and test processes run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model of a type to disk and returns its directory; arguments change its configuration."""

    def write(model_type: str, seed: int = 0, **changes: Any) -> Path:
        config = CONFIG_MAPPING[model_type](**(SIZES | changes))
        torch.manual_seed(seed)
        directory = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return directory

    return write


@pytest.fixture(scope="session")
def spoken(write_model: Callable[..., Path]) -> Path:
    """Directory of a tiny random Llama with a tokenizer: a token is an ASCII character; with a chat template."""
    directory = write_model("llama", **GROUPED)
    characters = {character: byte for byte, character in bytes_to_unicode().items() if byte < 128}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, write_model: Callable[..., Path]) -> SimpleNamespace:
    """One of the model families: `.path`, and `.oracle(tokens, new)`, the greedy tokens of transformers itself."""
    path = write_model(request.param, **FAMILIES[request.param])
    return SimpleNamespace(path=path, oracle=_oracle(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)))


@pytest.fixture(scope="session")
def llama(write_model: Callable[..., Path]) -> Path:
    """Directory of a tiny random Llama."""
    return write_model("llama", **GROUPED)


@pytest.fixture
def cache() -> DictionaryCache:
    """A cache that outlives engines, as tierd does: pass `cache.connect` to an LLM."""
    return DictionaryCache()


class DictionaryCache:
    """Blocks by model and hash in a dictionary, with the client's `lookup`, `store` and `close`."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, bytes], np.ndarray] = {}
        self.offered: set[tuple[str, bytes]] = set()
        self.turns: list[tuple[bytes, str, str | None]] = []
        self.kept: list[tuple[bytes, float, int]] = []
        self.connections = 0

    def connect(self, *, model: str, layout: Layout) -> DictionaryClient:
        self.connections += 1
        return DictionaryClient(self, model, layout)


class DictionaryClient:
    """The tierd client's methods that an engine calls, strict about their arguments."""

    def __init__(self, cache: DictionaryCache, model: str, layout: Layout) -> None:
        self.cache, self.model, self.layout = cache, model, layout

    def lookup(self, hashes: bytes, parent: bytes = ROOT) -> DictionaryLookup:
        assert len(hashes) % 32 == 0
        names = list(split(hashes))  # behind a parent that is on its way here, nothing can be found
        found = list(takewhile(lambda name: (self.model, name) in self.cache.blocks, names))
        return DictionaryLookup([self.cache.blocks[self.model, name] for name in found], len(names))

    def store(self, hashes: bytes, pool: np.ndarray, pages: Sequence[int], parent: bytes = ROOT) -> None:
        self._check(hashes, pool, pages, parent)
        self.cache.offered.update((self.model, name) for name in split(hashes))
        if parent != ROOT and (self.model, parent) not in self.cache.blocks:
            return  # refused, as by the daemon
        for name, page in zip(split(hashes), pages, strict=True):
            self.cache.blocks[self.model, name] = pool[page].copy()

    def ended(self, block: bytes, turn: str, conversation: str | None = None) -> None:
        assert len(block) == 32 and turn
        self.cache.turns.append((block, turn, conversation))

    def keep(self, block: bytes, seconds: float, priority: int = 0) -> None:
        self.cache.kept.append((block, seconds, priority))

    def close(self) -> None:
        self.cache.connections -= 1

    def _check(self, hashes: bytes, pool: np.ndarray, pages: Sequence[int], parent: bytes) -> None:
        assert pool.dtype == np.uint8 and pool.flags.c_contiguous and pool.shape[1] == self.layout.block_bytes
        assert len(hashes) == 32 * len(pages) and len(hashes) > 0
        assert parent == ROOT or (self.model, parent) in self.cache.offered, "a block whose parent was never offered"


class DictionaryLookup:
    """The blocks that were found, for copying out once."""

    def __init__(self, found: list[np.ndarray], asked: int) -> None:
        self.found = found
        self.blocks = self.told = len(found)
        self.tiers = {"cpu": len(found), "miss": asked - len(found)}

    def copy_into(self, pool: np.ndarray, pages: Sequence[int], first: int, count: int) -> int:
        for page, block in zip(pages, self.found[first : first + count], strict=True):
            pool[page] = block
        return count

    def release(self) -> None:
        self.found = []

    def __enter__(self) -> DictionaryLookup:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _oracle(model: PreTrainedModel) -> Callable[[list[int], int], list[int]]:
    def greedy(tokens: list[int], new: int) -> list[int]:
        with torch.inference_mode():
            output = model.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)
        return output[0, len(tokens) :].tolist()

    return greedy
