"""What quantised KV costs: errors per format, and a model's greedy tokens. Writes the figures into docs/quantisation.md.

`make quantisation`. For 20 prompts the model computes the KV of the prompt's full blocks; each format packs and unpacks
these, and the model goes on from what is left: the rest of the prompt and 32 greedy tokens. All formats of a prompt go
through the model as one batch, beside the KV as it was, so that nothing but the KV differs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from tierd_engine.model import load_model, load_tokenizer
from tierd_kernels.quantize import FORMATS, MXFP4, MXFP8, Format, dequantize, quantize

MODEL = Path(".build/models/SmolLM2-135M-Instruct")
DOCUMENT = Path("docs/quantisation.md")
SOURCES = ("docs/decisions/0001-sockets.md", "docs/decisions/0002-runs.md", "docs/decisions/0003-table.md", "LICENSE")
BEGIN, END = "<!-- begin: written by make quantisation -->", "<!-- end -->"
PROMPTS, PASSAGE_TOKENS, NEW_TOKENS, BLOCK_TOKENS = 20, 160, 32, 16
Restore = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Variant:
    """One way of storing blocks `[blocks, layers, K/V, heads, tokens, dim]`, and what it did to them."""

    name: str
    bits: float
    restore: Restore
    errors: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"keys": [], "values": []})
    tokens: list[list[int]] = field(default_factory=list)
    forced_hits: int = 0


def main() -> None:
    """Measure, print, and write."""
    torch.manual_seed(0)
    model, tokenizer = load_model(MODEL).eval(), load_tokenizer(MODEL)
    text = "\n".join(Path(name).read_text() for name in SOURCES)
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    variants = all_variants()
    prefix_tokens = []
    with torch.inference_mode():
        for number in range(PROMPTS):
            start = number * (len(words) - PASSAGE_TOKENS) // (PROMPTS - 1)
            passage = tokenizer.decode(words[start : start + PASSAGE_TOKENS])
            message = [{"role": "user", "content": f"Summarise this text in two sentences.\n\n{passage}"}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
            prefix_tokens.append(one_prompt(model, prompt, variants))
            print(f"prompt {number + 1} of {PROMPTS}: {len(prompt)} tokens", flush=True)
    report = write_report(model, variants, prefix_tokens)
    print(report)
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{report}{END}{rest.split(END)[1]}")


def all_variants() -> list[Variant]:
    """KV as it was, bfloat16, every format along vectors, and those that fit along tokens."""
    variants = [
        Variant("float32", 32, lambda blocks: blocks),
        Variant("bfloat16", 16, lambda blocks: blocks.bfloat16().float()),
    ]
    shape = (60, 3, BLOCK_TOKENS, 64)
    for format in FORMATS:
        bits = 8 * format.packed_bytes(shape) / torch.Size(shape).numel()
        variants.append(Variant(format.name, bits, packing(format, "dim", "dim")))
        if BLOCK_TOKENS % format.group == 0:
            variants.append(Variant(f"{format.name}, keys along tokens", bits, packing(format, "tokens", "dim")))
            variants.append(Variant(f"{format.name}, both along tokens", bits, packing(format, "tokens", "tokens")))
    mixed = 8 * (MXFP8.packed_bytes(shape) + MXFP4.packed_bytes(shape)) / 2 / torch.Size(shape).numel()
    variants.append(Variant("keys mxfp8, values mxfp4", mixed, packing(MXFP8, "dim", "dim", MXFP4)))
    return variants


def packing(keys: Format, key_axis: str, value_axis: str, values: Format | None = None) -> Restore:
    """A function that packs and unpacks blocks, keys and values each in their own way."""

    def restore(blocks: torch.Tensor) -> torch.Tensor:
        back = []
        for part, format, axis in ((0, keys, key_axis), (1, values or keys, value_axis)):
            numbers = blocks[:, :, part].contiguous()
            packed = torch.zeros(len(blocks), format.packed_bytes(numbers.shape[1:]), dtype=torch.uint8)
            quantize(numbers, packed, format, axis)
            restored = torch.empty_like(numbers)
            dequantize(packed, restored, format, axis)
            back.append(restored)
        return torch.stack(back, dim=2)

    return restore


def one_prompt(model: PreTrainedModel, prompt: list[int], variants: list[Variant]) -> int:
    """Run one prompt in all variants; returns the length of the quantised prefix."""
    prefix = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    computed = model(torch.tensor([prompt[:prefix]]), use_cache=True).past_key_values.layers
    # [layers, K/V, heads, tokens, dim] to [blocks, layers, K/V, heads, tokens of a block, dim]
    kv = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in computed])
    blocks = kv.unflatten(3, (-1, BLOCK_TOKENS)).movedim(3, 0).contiguous()
    restored = []
    for variant in variants:
        back = variant.restore(blocks)
        restored.append(back.movedim(0, 3).flatten(3, 4))
        for part, name in enumerate(variant.errors):
            errors, numbers = (back - blocks)[:, :, part].double(), blocks[:, :, part].double()
            variant.errors[name].append(
                torch.stack([errors.abs().max(), errors.abs().mean(), errors.square().sum(), numbers.square().sum()])
            )
    batch = torch.stack(restored)

    def go_on(tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, past_key_values=cache, use_cache=True).logits
        return logits.argmax(-1)

    rest = torch.tensor([prompt[prefix:]]).expand(len(variants), -1)
    cache = cache_of(batch)
    token = go_on(rest, cache)[:, -1:]
    tokens = [token]
    for _ in range(NEW_TOKENS - 1):
        token = go_on(token, cache)
        tokens.append(token)
    greedy = torch.cat(tokens, dim=1)
    forced = go_on(torch.cat((rest, greedy[:1, :-1].expand(len(variants), -1)), dim=1), cache_of(batch))[:, -NEW_TOKENS:]
    for variant, mine, next_ones in zip(variants, greedy, forced, strict=True):
        variant.tokens.append(mine.tolist())
        variant.forced_hits += int((next_ones == greedy[0]).sum())
    return prefix


def cache_of(kv: torch.Tensor) -> DynamicCache:
    """transformers' own cache with `kv [variants, layers, K/V, heads, tokens, dim]` in it."""
    cache = DynamicCache()
    for layer in range(kv.shape[1]):
        cache.update(kv[:, layer, 0].contiguous(), kv[:, layer, 1].contiguous(), layer)
    return cache


def write_report(model: PreTrainedModel, variants: list[Variant], prefix_tokens: list[int]) -> str:
    """The tables as Markdown."""
    first = variants[0]
    lines = [
        f"{PROMPTS} prompts, {sum(prefix_tokens)} tokens in full blocks of {BLOCK_TOKENS}, "
        f"{NEW_TOKENS} greedy tokens each. SmolLM2-135M-Instruct (Q4_1 weights, computed in float32): "
        f"{model.config.num_hidden_layers} layers, {model.config.num_key_value_heads} KV heads of 64 numbers. "
        f"Plain-torch twins, torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, no GPU.",
        "",
        "| format | bits | keys: max | mean | relative | values: max | mean | relative |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in variants[1:]:
        cells = []
        for errors in variant.errors.values():
            highest, mean, squares, numbers = torch.stack(errors).unbind(1)
            cells += [f"{highest.max():.3g}", f"{mean.mean():.2g}", f"{(squares.sum() / numbers.sum()).sqrt():.2%}"]
        lines.append(f"| {variant.name} | {variant.bits:.2f} | {' | '.join(cells)} |")
    lines += [
        "",
        "| format | prompts with equal tokens | first different token of the others | same next token after the same text |",
        "|---|---|---|---|",
    ]
    for variant in variants[1:]:
        pairs = zip(variant.tokens, first.tokens, strict=True)
        differing = [
            next(at for at, (one, other) in enumerate(zip(mine, theirs, strict=True), 1) if one != other)
            for mine, theirs in pairs
            if mine != theirs
        ]
        places = ", ".join(map(str, sorted(differing))) or "-"
        share = variant.forced_hits / (PROMPTS * NEW_TOKENS)
        lines.append(f"| {variant.name} | {PROMPTS - len(differing)} of {PROMPTS} | {places} | {share:.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
