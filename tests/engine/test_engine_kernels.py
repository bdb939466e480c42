"""The engine's attention on a GPU, in Triton's interpreter: passes with kernels say what passes in plain torch say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.kernels.conftest import device  # noqa: F401
from tierd.layout import Layout
from tierd_engine.attention import Span, Step, paged_attention
from tierd_engine.kernels import KernelSteps
from tierd_engine.llm import LLM

LAYOUT = Layout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=4)
PAGES, HEADS = 12, 6
SPANS = {
    "decodes": [Span([7, 2, 9], 9, 10), Span([1, 4], 4, 5), Span([3], 0, 1)],
    "a prompt": [Span([5, 0], 0, 7)],
    "behind a prefix": [Span([6, 10, 8], 6, 11)],
    "all together": [Span([7, 2], 6, 7), Span([1], 2, 3), Span([5, 0, 3], 4, 9), Span([4], 0, 3)],
}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_a_pass_with_kernels_is_the_pass_in_plain_torch(device: str, spans: list[Span]) -> None:  # noqa: F811
    """Through the function that transformers calls: what is attended to, and what is in the pages afterwards."""
    generator = torch.Generator().manual_seed(4)
    shape = PAGES, LAYOUT.layers, 2, LAYOUT.kv_heads, LAYOUT.block_tokens, LAYOUT.head_dim
    pages = torch.randn(shape, generator=generator)
    there = pages.to(device, copy=True)
    new = sum(span.end - span.start for span in spans)
    oracle, step = Step(pages, LAYOUT, spans), KernelSteps(there, LAYOUT)(spans)
    assert step.positions.tolist() == oracle.positions.tolist()
    for layer in range(LAYOUT.layers):
        query = torch.randn(1, HEADS, new, LAYOUT.head_dim, generator=generator)
        key = torch.randn(1, LAYOUT.kv_heads, new, LAYOUT.head_dim, generator=generator)
        value = torch.randn(1, new, LAYOUT.kv_heads, LAYOUT.head_dim, generator=generator).transpose(1, 2)
        module = SimpleNamespace(layer_idx=layer)
        expected, _ = paged_attention(module, query, key, value, None, step=oracle, scaling=0.3)
        moved = (tensor.to(device) for tensor in (query, key, value))
        found, _ = paged_attention(module, *moved, None, step=step, scaling=0.3)
        assert found.shape == expected.shape
        torch.testing.assert_close(found.cpu(), expected, atol=2e-6, rtol=2e-6)
    assert step.layers_seen == [0, 1]
    assert torch.equal(there.cpu(), pages)


def test_an_engine_with_kernels_says_the_same_tokens(device: str, tmp_path: Path) -> None:  # noqa: F811
    """Two prompts, one longer than a chunk, and decodes beside it: prefill, prefill behind a prefix, and decode."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.25,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]
    settings = {"pages": 12, "block_tokens": 4, "chunk_tokens": 8}
    with LLM(tmp_path, **settings) as plain:
        expected = [answer.tokens for answer in plain.generate(prompts, 4)]
    with LLM(tmp_path, **settings, device=device) as llm:
        if device == "cpu":
            llm.engine.runner.begin = KernelSteps(llm.memory.tensor, llm.layout)
        assert [answer.tokens for answer in llm.generate(prompts, 4)] == expected
        llm.check()
