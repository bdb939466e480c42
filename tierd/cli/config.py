"""Look at the configuration without starting anything.

`check` says whether a daemon would take it; `show` prints every key with its value as TOML, with --origin also where each was
set; `schema` prints a JSON Schema of the file, for editors. Exit code 0: it can be used; 2: it cannot, and why.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tierd import __version__
from tierd.cli.options import add_config_arguments, load_config
from tierd.config import FLAGS, KEYS, SECTIONS, SPLIT, Config
from tierd.units import shipped
from tierd.values import SCHEMAS

ORIGIN_COLUMN = 48


def add_arguments(parser: ArgumentParser) -> None:
    """What to do, and every named flag of the configuration."""
    parser.add_argument("action", choices=["check", "show", "schema"])
    parser.add_argument("--origin", action="store_true", help="with show: say where each value is from")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_arguments(parser, *FLAGS)


def run(options: Namespace) -> int:
    """Read it, and print what was asked for."""
    if options.action == "schema":
        print(json.dumps(schema(), indent=2))
        return 0
    config = load_config(options)
    file = str(config.file) if config.file else ""
    if options.action == "show":
        values = {dotted: {"value": value, "origin": origin(config, dotted)} for dotted, value in config.describe().items()}
        print(json.dumps({"file": file, "keys": values}) if options.json else "\n".join(page(config, options.origin)))
    elif options.json:
        print(json.dumps({"file": file, "set": dict(config.origins)}))
    else:
        print(f"{file or 'no file, defaults'}: good, {len(config.origins)} of {len(KEYS)} keys set")
    return 0


def origin(config: Config, dotted: str) -> str:
    """Where a key's value is from."""
    return config.origins.get(dotted, "default")


def page(config: Config, with_origin: bool) -> Iterator[str]:
    """The whole configuration as TOML that gives the same again."""
    for section, keys in groupby(config.describe().items(), key=lambda item: SPLIT[item[0]][0]):
        yield f"[{section}]"
        for dotted, value in keys:
            line = f"{SPLIT[dotted][1]} = {as_toml(value)}"
            yield f"{line:{ORIGIN_COLUMN}}# {origin(config, dotted)}" if with_origin else line
        yield ""


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(key)} = {json.dumps(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return json.dumps(value, ensure_ascii=False)


def schema() -> dict[str, Any]:
    """JSON Schema of the file: types, limits where they can be said, and what the example file says of each key."""
    words = dict(descriptions())
    sections: dict[str, Any] = {name: {"type": "object", "additionalProperties": False, "properties": {}} for name in SECTIONS}
    for dotted, (section, name) in SPLIT.items():
        found = SCHEMAS[KEYS[dotted]["parse"]] | {"description": words[dotted]}
        if (default := KEYS[dotted]["default"]) is not None:
            found["default"] = default
        sections[section]["properties"][name] = found
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"tierd {__version__}",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def descriptions() -> Iterator[tuple[str, str]]:
    """Each key with the comment above it in the example file."""
    section, words = "", []
    for line in shipped("tierd.toml").splitlines():
        name = line.lstrip("#").partition(" = ")[0]
        if line.startswith("["):
            section = line.strip("[]")
        elif line.startswith("# "):
            words.append(line[2:])
        elif f"{section}.{name}" in KEYS:
            yield f"{section}.{name}", " ".join(words)
            words = []
        elif not line:
            words = []
