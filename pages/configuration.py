"""docs/configuration.md: every key of `tierd.config.KEYS`, with the words of the commented systemd/tierd.toml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tierd.config import FLAGS, KEYS, SECTIONS

HEAD = """\
<!-- Made by `python -m pages` from tierd/config.py and systemd/tierd.toml; edit these instead. -->
# Configuration

`tierd serve` works without any. Settings come from, each overriding the one before:

1. the defaults below;
2. a TOML file: `/etc/tierd/tierd.toml`, for other users than root `~/.config/tierd/tierd.toml` where it exists, or what
   `--config` names;
3. the environment: `TIERD_<SECTION>_<KEY>`, such as `TIERD_CPU_BYTES=8GiB`;
4. flags: `--set cpu.bytes=8GiB` for any key, and the short ones that are named below.

Sizes are integers (bytes) or strings with a unit: KiB, MiB, GiB, TiB. Unknown keys and impossible values are refused at start,
with the source, the key and the remedy; nothing is guessed. A key that is *live* changes with `systemctl reload tierd`
([reload](operations.md#reload)), all others with a restart, which keeps memory.
"""


class Written(NamedTuple):
    """A key in the commented file: its default as one would write it, and what is said of it."""

    default: str
    text: str


def page(example: str) -> str:
    """The document, with the words of the commented file."""
    return "\n".join(lines(written(example)))


def lines(keys: dict[str, Written]) -> Iterator[str]:
    """Head, and a table by section."""
    flags = {dotted: flag for flag, dotted in FLAGS.items()}
    yield HEAD
    for section, described in SECTIONS.items():
        yield f"## [{section}]\n"
        yield f"{(described.__doc__ or '').strip()}\n"
        yield "| key | default | live | meaning |\n|---|---|---|---|"
        for dotted in (dotted for dotted in KEYS if dotted.startswith(f"{section}.")):
            default, text = keys[dotted]
            flag = f" Flag: `{flags[dotted]}`." if dotted in flags else ""
            live = "live" if KEYS[dotted]["live"] else ""
            yield f"| `{dotted.partition('.')[2]}` | `{default}` | {live} | {text}{flag} |"
        yield ""


def written(example: str) -> dict[str, Written]:
    """What the commented file says: a paragraph of comments is about all keys that follow it."""
    keys: dict[str, Written] = {}
    section, text = "", ""
    for line in example.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif key := re.fullmatch(r"#(\w+) = (.+)", line):
            keys[f"{section}.{key[1]}"] = Written(key[2], text.strip().replace("|", "\\|").replace("<", "&lt;"))
        else:
            text = f"{text} {line[2:]}" if line.startswith("# ") else ""
    return keys
