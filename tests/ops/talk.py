"""A real engine in the machine: `tierd_engine` with a small random Llama, once with tierd and once alone.

It answers each number on standard input with a line of JSON: how many tokens of that prompt came from tierd, and whether what
it says to it is what the engine alone says.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tierd.client import Client
from tierd_engine.llm import LLM

SOCKET = "/run/tierd/tierd.sock"
VOCABULARY = 128
PROMPT_TOKENS, NEW_TOKENS, PAGES = 200, 8, 48
"""Pages for three prompts: what is asked again comes from tierd."""


def prompt(number: int) -> list[int]:
    """Tokens that follow from a number."""
    dice = random.Random(number)
    return [dice.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]


def main() -> None:
    """Obey until the end of standard input."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,  # weights large enough for one wrong block to change the tokens
    )
    with tempfile.TemporaryDirectory() as model:
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        with LLM(model, pages=PAGES) as alone, LLM(model, pages=PAGES, connect=partial(Client, SOCKET)) as engine:
            for line in sys.stdin:
                tokens = prompt(int(line))
                answer, expected = engine.generate(tokens, NEW_TOKENS), alone.generate(tokens, NEW_TOKENS)
                print(json.dumps({"hit": answer.hit_tokens, "same": answer.tokens == expected.tokens}), flush=True)


if __name__ == "__main__":
    main()
