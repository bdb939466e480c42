"""Engine process of the demo that runs first: `prepare MODEL CHECKOUT WORK` writes WORK/model and WORK/prompt.txt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tierd.errors import Invalid, TierdError
from tierd_engine.model import load_tokenizer, locate, write_safetensors

DOCUMENTS = ("docs/protocol.md", "docs/segment-format.md", "README.md", "ARCHITECTURE.md", "LICENSE")
QUESTION = "\n\nSay in one sentence what the text above is about."
DOCUMENT_TOKENS = 2000
DOCUMENT_TOKENS_MIN = 1500


def main(model: str, checkout: str, work: str) -> None:
    """Make the model quick to load, once for all engine processes, and cut a long prompt from real documents."""
    directory, options = locate(model)
    target = Path(work) / "model"
    if "gguf_file" in options:
        write_safetensors(model, target)
    else:
        target.symlink_to(directory.resolve(), target_is_directory=True)
    Path(work, "prompt.txt").write_text(_prompt(load_tokenizer(target), Path(checkout)))


def _prompt(tokenizer: Any, checkout: Path) -> str:
    text = "\n".join((checkout / name).read_text() for name in DOCUMENTS if (checkout / name).exists())
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:DOCUMENT_TOKENS]
    if len(tokens) < DOCUMENT_TOKENS_MIN:
        raise Invalid(f"demo: {len(tokens)} tokens of text in {checkout}, {DOCUMENT_TOKENS_MIN} needed; run it in a checkout")
    prompt: str = tokenizer.decode(tokens) + QUESTION
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return prompt


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TierdError as error:
        sys.exit(str(error))
