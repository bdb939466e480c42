"""The oracle for everything: with a cache, without one and from transformers itself, the tokens are the same."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from tierd.errors import Invalid
from tierd_engine.llm import LLM

NEW = 20


def prompt(length: int, seed: int = 1) -> list[int]:
    """Random token ids, the same for the same length and seed."""
    return [random.Random(seed * 10_000 + place).randrange(128) for place in range(length)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 200, 600])
def test_without_a_client_the_tokens_are_those_of_transformers(family: SimpleNamespace, length: int) -> None:
    """Prompts shorter than a page, around its border, and longer than a prefill chunk."""
    tokens = prompt(length)
    with LLM(family.path, pages=48) as llm:
        assert llm.generate(tokens, NEW).tokens == family.oracle(tokens, NEW)


@pytest.mark.parametrize("kept", [0, 1, 5, 12])
def test_hits_of_every_length_leave_the_tokens_as_they_are(family: SimpleNamespace, cache, kept: int) -> None:
    """None, some or all of 12 blocks come from another engine's work."""
    tokens = prompt(200)
    with LLM(family.path, pages=32, connect=cache.connect) as first:
        cold = first.generate(tokens, NEW)
    for block in list(cache.blocks)[kept:]:
        del cache.blocks[block]
    with LLM(family.path, pages=32, connect=cache.connect) as second:
        warm = second.generate(tokens, NEW)
    assert (cold.hit_tokens, warm.hit_tokens) == (0, kept * 16)
    assert cold.tokens == warm.tokens == family.oracle(tokens, NEW)


@pytest.mark.parametrize("spoiled", [0, 3, 11])
def test_one_wrong_block_changes_the_tokens(llama: Path, cache, spoiled: int) -> None:
    """The oracle can fail: were this test red, the equal tokens above would prove nothing."""
    tokens = prompt(200)
    with LLM(llama, pages=32, connect=cache.connect) as llm:
        right = llm.generate(tokens, NEW)
        llm.check()  # waits until all is stored
        names = list(cache.blocks)
        cache.blocks[names[spoiled]] = cache.blocks[names[(spoiled + 1) % 12]]
        wrong = llm.generate(tokens, NEW)
    assert wrong.hit_tokens == 192
    assert wrong.tokens != right.tokens


def test_blocks_that_fill_during_decode_are_hits_of_the_next_turn(family: SimpleNamespace, cache) -> None:
    """A conversation's second prompt holds the first answer, whose blocks were stored."""
    first = prompt(40)
    with LLM(family.path, pages=32, connect=cache.connect) as llm:
        answer = llm.generate(first, 40).tokens
        second = first + answer + prompt(7, seed=2)
        turn = llm.generate(second, NEW)
    assert turn.hit_tokens == 64, "79 tokens have KV after the first turn: four full blocks"
    assert turn.tokens == family.oracle(second, NEW)


def test_the_last_prompt_token_is_always_computed(llama: Path, cache) -> None:
    """A prompt of exactly two blocks hits one: the logits of its last token must come from somewhere."""
    with LLM(llama, pages=8, connect=cache.connect) as llm:
        cold = llm.generate(prompt(32), NEW)
        warm = llm.generate(prompt(32), NEW)
    assert warm.hit_tokens == 16
    assert warm.tokens == cold.tokens


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 33, 512])
def test_the_tokens_do_not_depend_on_the_chunk(llama: Path, chunk_tokens: int) -> None:
    """Chunks that split pages anywhere give what one large chunk gives."""
    with LLM(llama, pages=16, chunk_tokens=chunk_tokens) as chunked, LLM(llama, pages=16) as whole:
        assert chunked.generate(prompt(100), NEW).tokens == whole.generate(prompt(100), NEW).tokens


def test_bfloat16_gives_the_same_tokens_from_the_cache(llama: Path, cache) -> None:
    """numpy knows no bfloat16: pages travel as bytes. The hit ends where a chunk of prefill did: same sums."""
    with LLM(llama, pages=16, dtype="bfloat16", chunk_tokens=96, connect=cache.connect) as llm:
        cold = llm.generate(prompt(100), NEW)
        warm = llm.generate(prompt(100), NEW)
    assert llm.layout.block_bytes == 2 * 2 * 2 * 16 * 16 * 2
    assert (warm.hit_tokens, warm.tokens) == (96, cold.tokens)


def test_generation_ends_with_the_stop_token(llama: Path) -> None:
    """The stop token is the last one, as in transformers; it comes at its first place in the free-running text."""
    with LLM(llama, pages=16) as llm:
        free = llm.generate(prompt(50), NEW).tokens
        stop = free[7]
        llm.engine.stop_tokens = frozenset([stop])
        assert llm.generate(prompt(50), NEW).tokens == free[: free.index(stop) + 1]


def test_sampling_is_a_function_of_the_seed(llama: Path) -> None:
    """The same seed repeats itself, another does not, and a nucleus of one token is greedy."""
    with LLM(llama, pages=16) as llm:
        runs = [llm.generate(prompt(50), NEW, temperature=1.5, seed=seed).tokens for seed in (1, 1, 2)]
        narrow = llm.generate(prompt(50), NEW, temperature=1.5, top_p=1e-6).tokens
        greedy = llm.generate(prompt(50), NEW).tokens
    assert runs[0] == runs[1] != runs[2]
    assert narrow == greedy != runs[0]


def test_the_parts_of_the_time_add_up(llama: Path, cache) -> None:
    """What is reported as time to first token is waiting, loading and prefill."""
    with LLM(llama, pages=64, connect=cache.connect) as llm:
        done = llm.generate(prompt(900), NEW)
    assert done.timings["load"] + done.timings["prefill"] == pytest.approx(done.time_to_first_token_seconds)
    assert min(done.timings.values()) > 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (dict(prompt=[], max_new_tokens=4), "0 prompt and 4 new"),
        (dict(prompt=[1], max_new_tokens=0), "1 prompt and 0 new"),
        (dict(prompt=[1] * 100, max_new_tokens=40), "do not fit 8 pages"),
        (dict(prompt=[1], max_new_tokens=4, temperature=-1.0), "temperature -1.0"),
        (dict(prompt=[1], max_new_tokens=4, top_p=0.0), "top_p 0.0"),
        (dict(prompt="text", max_new_tokens=4), "no tokenizer"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(llama: Path, request_: dict, reason: str) -> None:
    """Refused before any page is taken."""
    with LLM(llama, pages=8) as llm:
        with pytest.raises(Invalid, match=reason):
            llm.generate(**request_)
        llm.check()


def test_a_prompt_beyond_the_models_positions_is_refused(llama: Path) -> None:
    """The model was made for 2,048 positions."""
    with LLM(llama, pages=200) as llm, pytest.raises(Invalid, match="2048 positions"):
        llm.generate([1] * 2040, 20)


def test_closing_the_engine_closes_its_client(llama: Path, cache) -> None:
    """The engine owns the client that it made."""
    with LLM(llama, pages=8, connect=cache.connect):
        assert cache.connections == 1
    assert cache.connections == 0
