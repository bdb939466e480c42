"""Engine process of the demo: `one_run WORK [SOCKET]` loads WORK/model, runs WORK/prompt.txt once and prints JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tierd.client import Client
from tierd.errors import TierdError
from tierd_engine.llm import LLM

WARM_UP = "A warm-up text that has nothing to do with the prompt, but is longer than a block of sixteen tokens. " * 2
NEW_TOKENS = 32


def main(work: str, socket: str | None = None) -> None:
    """One request in a fresh process, with tierd behind `socket` or without; `tiers` are the daemon's counts for it."""
    prompt = Path(work, "prompt.txt").read_text()
    with LLM(Path(work, "model"), connect=partial(Client, socket) if socket else None) as llm:
        llm.generate(WARM_UP, 2)
        before = _tiers(llm)
        generation = llm.generate(prompt, NEW_TOKENS)
        tiers = {tier: blocks - before.get(tier, 0) for tier, blocks in _tiers(llm).items()}
        print(json.dumps(asdict(generation) | {"block_tokens": llm.layout.block_tokens, "tiers": tiers}))


def _tiers(llm: LLM) -> dict[str, int]:
    return dict(llm.client.statistics["tiers"]) if llm.client else {}


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TierdError as error:
        sys.exit(str(error))
