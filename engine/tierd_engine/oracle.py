"""The oracle for everything: `python -m tierd_engine.oracle` asks one model three ways, and the tokens must be the same.

For five prompts of 50 to 2,000 tokens from the repository's own documents: transformers' own `generate`, the engine without
tierd, and the engine with a real daemon, where nothing, a third, and all of the prompt's full blocks are hits. Exits non-zero
when any token differs or a hit has another length than it should.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from tierd.client import Client
from tierd.errors import TierdError
from tierd_engine.demo.prepare import DOCUMENTS
from tierd_engine.demo.processes import Daemon
from tierd_engine.llm import LLM
from tierd_engine.model import load_model, load_tokenizer

LENGTHS = (50, 200, 500, 1000, 2000)
NEW_TOKENS = 24
BLOCK_TOKENS = 16


def main() -> int:
    """Compare, print a line per prompt, and say whether all is well."""
    parser = argparse.ArgumentParser(prog="python -m tierd_engine.oracle", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".build/models/SmolLM2-135M-Instruct"), help="a local model")
    model_path = parser.parse_args().model
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemon is stopped, as on Ctrl-C
    tokenizer = load_tokenizer(model_path)
    text = "\n".join(Path(name).read_text() for name in DOCUMENTS if Path(name).exists())
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    reference = load_model(model_path)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="tierd-") as scratch:
        work = Path(scratch)
        daemon = Daemon(work, work / "state", work / "log")
        try:
            daemon.start()
            with LLM(model_path) as plain, LLM(model_path, connect=partial(Client, daemon.socket)) as tiered:
                for at, length in enumerate(LENGTHS):
                    prompt = tokens[at * 97 : at * 97 + length]
                    wrong += compare(reference, plain, tiered, prompt, tokens[-length:])
        finally:
            daemon.stop()
    print("OK: the same tokens in every way" if not wrong else f"FAILED: {wrong} comparisons differ")
    return 1 if wrong else 0


def compare(reference: torch.nn.Module, plain: LLM, tiered: LLM, prompt: list[int], other: list[int]) -> int:
    """One prompt, and one that shares a third of it; returns how many answers are wrong."""
    third = len(prompt) // (3 * BLOCK_TOKENS) * BLOCK_TOKENS
    all_blocks = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    shared = prompt[:third] + other[third:]
    cases = [("none", prompt, 0), ("a third", shared, third), ("all", prompt, all_blocks)]
    wrong = 0
    for name, tokens, hit_tokens in cases:
        expected = greedy(reference, tokens)
        without, with_tierd = plain.generate(tokens, NEW_TOKENS), tiered.generate(tokens, NEW_TOKENS)
        equal = expected == without.tokens == with_tierd.tokens
        complete = with_tierd.hit_tokens == hit_tokens
        wrong += not (equal and complete)
        print(
            f"{len(tokens):5} tokens, hit {name:7}: {with_tierd.hit_tokens:5} of {hit_tokens:5} tokens from tierd, "
            f"tokens {'equal' if equal else 'DIFFER'}, first token {with_tierd.time_to_first_token_seconds:.3f} s "
            f"(without tierd {without.time_to_first_token_seconds:.3f} s)",
            flush=True,
        )
    return wrong


def greedy(model: torch.nn.Module, tokens: list[int]) -> list[int]:
    """What transformers itself generates."""
    with torch.inference_mode():
        output = model.generate(torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False)
    answer: list[int] = output[0, len(tokens) :].tolist()
    return answer


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TierdError as error:
        sys.exit(str(error))
