"""OpenAI's request bodies: what is known, what is ill-typed, what asks for something that the engine does not do.

Every refusal names the field. Fields that change nothing at the value they have (`logprobs: false`) are accepted.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tierd.errors import Invalid
from tierd_engine.request import Hints, Sampling

COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat answer may fill the context."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
IGNORED = {"user", "metadata", "prompt_cache_key", "safety_identifier", "service_tier"}
COMMON = {
    "conversation": str,
    "ignore_eos": bool,
    "keep": dict,
    "max_tokens": int,
    "model": str,
    "n": int,
    "seed": int,
    "stop": (str, list),
    "stop_token_ids": list,
    "stream": bool,
    "stream_options": dict,
    "temperature": (int, float),
    "top_p": (int, float),
}
COMPLETION = COMMON | {"prompt": (str, list)}
KEEP = {"ttl_seconds": (int, float), "priority": int}
CHAT = COMMON | {"messages": list, "max_completion_tokens": int}


@dataclass(frozen=True)
class Asked:
    """A checked request: what to continue (text, token ids, or messages) and how."""

    model: str
    content: Any
    sampling: Sampling
    stream: bool
    include_usage: bool
    hints: Hints


class NoModel(Invalid):
    """The model that was asked for is not served here."""


def read(body: Any, chat: bool) -> dict[str, Any]:
    """The fields that are set, each of its type; raises Invalid with the name of the first that cannot be."""
    if not isinstance(body, dict):
        raise Invalid(f"body: a JSON object is needed, not {type(body).__name__}")
    known: Mapping[str, Any] = CHAT if chat else COMPLETION
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name, value in given.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise Invalid(f"{name}: {value!r:.80} is not supported; leave it out")
        elif name not in known:
            raise Invalid(f"{name}: unknown parameter; known are {', '.join(sorted(known))}")
        else:
            check_type(name, value, known[name])
    for name in ("model", "messages" if chat else "prompt"):
        if name not in given:
            raise Invalid(f"{name}: missing")
    return {name: value for name, value in given.items() if name not in NEUTRAL}


def check_type(name: str, value: Any, types: Any) -> None:
    """Raise Invalid unless the value has the type; true and false are no numbers."""
    wanted = types if isinstance(types, tuple) else (types,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise Invalid(f"{name}: {value!r:.80} is not of type {names}")


def asked_of(body: Any, chat: bool, models: set[str]) -> tuple[Asked, int | None]:
    """A request, and how many tokens it wants at most (None: as many as fit); `Sampling.max_tokens` is set later.

    Raises Invalid or NoModel.
    """
    given = read(body, chat)
    if given["model"] not in models:
        raise NoModel(f"model: {given['model']!r:.80} is not served here; served is {', '.join(sorted(models))}")
    stop = given.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stop:
        check_type("stop", one, str)
    for one in given.get("stop_token_ids", ()):
        check_type("stop_token_ids", one, int)
    options = given.get("stream_options", {})
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise Invalid(f"stream_options: unknown parameter {min(unknown)!r}")
    sampling = Sampling(
        temperature=given.get("temperature", 1.0),
        top_p=given.get("top_p", 1.0),
        n=given.get("n", 1),
        seed=given.get("seed", secrets.randbits(32)) & ((1 << 61) - 1),
        stop=stop,
        stop_tokens=tuple(given.get("stop_token_ids", ())),
        ignore_eos=given.get("ignore_eos", False),
    )
    most = given.get("max_completion_tokens", given.get("max_tokens", None if chat else COMPLETION_TOKENS))
    if most is not None and most < 1:
        raise Invalid(f"max_tokens: {most} must be at least 1")
    content = messages_of(given["messages"]) if chat else given["prompt"]
    hints = hints_of(given.get("conversation"), given.get("keep", {}))
    return Asked(given["model"], content, sampling, given.get("stream", False), bool(options.get("include_usage")), hints), most


def hints_of(conversation: str | None, keep: Mapping[str, Any]) -> Hints:
    """What tierd is to be told; raises Invalid for what cannot be."""
    if unknown := keep.keys() - KEEP.keys():
        raise Invalid(f"keep: unknown parameter {min(unknown)!r}; known are {', '.join(KEEP)}")
    for name, value in keep.items():
        check_type(f"keep.{name}", value, KEEP[name])
    return Hints(conversation, **keep)


def messages_of(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages with plain text as content; raises Invalid for what is none."""
    if not messages:
        raise Invalid("messages: at least one is needed")
    plain = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Invalid(f"messages[{at}]: an object with role and content is needed, not {message!r:.80}")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise Invalid(f"messages[{at}].content: text is needed, not {message.get('content')!r:.80}")
        plain.append({"role": message["role"], "content": content})
    return plain
