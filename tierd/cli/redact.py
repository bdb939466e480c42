"""Replacing names of people, models and machines by words that mean nothing, the same word for the same name everywhere."""

from __future__ import annotations

import getpass
import os
import pwd
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tierd.cli.status import NAMESPACE_CHARACTERS

KINDS = {"model": "model", "domain": "domain", "client": "client", "id": "namespace", "namespace": "namespace"}
"""Fields whose values are names, in answers, metrics and logs, and what they become."""
LETTERS_MIN = 3
"""Shorter names are replaced in fields only: anywhere else they would be parts of other words."""
FIELD = re.compile(r"""\b(model|domain|client|namespace)("?\s*[=:]\s*|\s(?='))("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,}"']+)""")
"""Also in sentences, where names are quoted: domain 'red' is not open."""
NUMBERS = re.compile(r"-?[0-9.]+")


class Redactor:
    """Learns names from fields, and replaces them in fields and in running text."""

    def __init__(self) -> None:
        host = socket.gethostname()
        self._words: dict[str, str] = {host: "host", host.partition(".")[0]: "host"}
        if (home := str(Path.home())) != "/":
            self._words[home] = "~"
        with suppress(KeyError, OSError):  # a uid without a name
            self._words |= {getpass.getuser(): "user"} if os.getuid() else {}
        if caller := os.environ.get("SUDO_USER"):  # root asks for somebody
            self._words |= {caller: "user"} if caller != "root" else {}
            with suppress(KeyError):
                self._words[pwd.getpwnam(caller).pw_dir] = "~"

    def word(self, kind: str, name: str) -> str:
        """The word that takes a name's place; of a namespace's id the first digits are enough."""
        name = name[:NAMESPACE_CHARACTERS] if kind == "namespace" else name
        if name not in self._words:
            taken = sum(word.startswith(f"{kind}-") for word in set(self._words.values()))
            self._words[name] = f"{kind}-{taken + 1}"
        return self._words[name]

    def value(self, value: Any, key: str = "") -> Any:
        """A copy of plain data in which every name is replaced."""
        if isinstance(value, Mapping):
            return {name: self.value(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, key) for item in value]
        if isinstance(value, str):
            return self.word(KINDS[key], value) if key in KINDS and value else self.text(value)
        return value

    def learn(self, kind: str, names: Iterable[str]) -> None:
        """Names that are known from elsewhere."""
        for name in names:
            self.word(kind, name)

    def text(self, text: str) -> str:
        """Running text: fields that hold names first, then every name that is known by now, the longest first."""
        text = FIELD.sub(self._field, text)
        names = sorted((name for name in self._words if len(name) >= LETTERS_MIN), key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names)
        return re.sub(pattern, lambda found: self._words[found[0]], text) if names else text

    def _field(self, found: re.Match[str]) -> str:
        key, between, quoted = found.groups()
        quote = quoted[0] if quoted[0] in "\"'" else ""
        name = quoted.strip(quote) if quote else quoted
        known = name in self._words.values() or NUMBERS.fullmatch(name) or not name
        return f"{key}{between}{quote}{name if known else self.word(KINDS[key], name)}{quote}"
