"""Values of settings: each parser takes what TOML, an environment variable or a flag gave and returns the value.

A parser raises ValueError with what the value must be; the caller adds where it came from. SCHEMAS says the same as JSON
Schema for editors, as far as that can say it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from re import fullmatch
from typing import Any, TypeVar

from tierd.devices import DEVICES, split_devices

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNITS = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1, "": 1}
Parser = Callable[[Any], Any]
P = TypeVar("P", bound=Parser)
SCHEMAS: dict[Parser, dict[str, Any]] = {}
"""By parser: what a value in a file may be."""


def described(**schema: Any) -> Callable[[P], P]:
    """Enter a parser's schema."""

    def enter(parse: P) -> P:
        SCHEMAS[parse] = schema
        return parse

    return enter


def size(low: int, high: int, step: int = 1, zero: bool = False) -> Callable[[Any], int]:
    """Bytes: an integer, or a string such as "512MiB"."""
    number_of_bytes = {"type": "integer", "minimum": 0 if zero else low, "maximum": high}
    text_with_unit = {"type": "string", "pattern": "^[0-9]{1,20} ?([KMGT]iB|B|)$"}

    @described(anyOf=[number_of_bytes, text_with_unit])
    def parse(value: Any) -> int:
        match = fullmatch(r"([0-9]{1,20}) ?([KMGT]iB|B|)", str(value))
        if isinstance(value, bool) or not match:
            raise ValueError("must be a number of bytes, or a string with a unit (KiB, MiB, GiB, TiB) such as '512MiB'")
        number = int(match[1]) * UNITS[match[2]]
        if not (low <= number <= high or (zero and number == 0)) or number % step:
            grain = f" in steps of {size_text(step)}" if step > 1 else ""
            raise ValueError(f"must be {'0, or ' if zero else ''}from {size_text(low)} to {size_text(high)}{grain}")
        return number

    return parse


def size_text(number: int) -> str:
    """Bytes with the largest unit that divides them: "64MiB"."""
    unit = next(unit for unit, scale in UNITS.items() if number % scale == 0 and number >= scale) if number else ""
    return f"{number // UNITS[unit]}{unit}" if unit != "B" else str(number)


def rounded_size(number: int) -> str:
    """Bytes with a unit, for people: "1.5 GiB"."""
    unit = next((unit for unit, scale in UNITS.items() if number >= scale), "B")
    return f"{number:,} B" if unit in ("B", "") else f"{number / UNITS[unit]:.1f} {unit}"


def count(low: int, high: int) -> Callable[[Any], int]:
    @described(type="integer", minimum=low, maximum=high)
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not fullmatch(r"[0-9]{1,12}", str(value)) or not low <= int(value) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(value)

    return parse


def decimal(low: float, high: float) -> Callable[[Any], float]:
    @described(type="number", minimum=low, maximum=high)
    def parse(value: Any) -> float:
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not low <= number <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return number

    return parse


def one_of(*choices: str) -> Callable[[Any], str]:
    @described(enum=list(choices))
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be {' or '.join(repr(choice) for choice in choices)}")
        return str(value)

    return parse


@described(type="string", pattern=f"^({'|'.join(DEVICES)})$")
def devices(value: Any) -> str:
    split_devices(str(value))
    return str(value)


@described(type="boolean")
def boolean(value: Any) -> bool:
    text = str(value).lower() if isinstance(value, bool | str) else ""
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


@described(type="string", pattern="^/")
def path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not os.path.isabs(value) or "\0" in str(value):
        raise ValueError("must be an absolute path")
    return Path(value)


@described(type="string", pattern="^0?[67][0-7][0-7]$")
def file_mode(value: Any) -> int:
    if not isinstance(value, str) or not fullmatch("0?[67][0-7][0-7]", value):
        raise ValueError("must be a string of octal digits that lets the owner read and write, such as '0660'")
    return int(value, 8)


@described(type="string", pattern=r"^$|^(localhost|127(\.[0-9]{1,3}){3}|\[?[0-9a-fA-F:]+\]?):[0-9]{1,5}$")
def loopback(value: Any) -> str:
    """`host:port` on this machine only: the metrics are not protected by anything else."""
    host, _, port = str(value).rpartition(":")
    try:
        local = host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        local = False
    if value != "" and not (local and fullmatch("[0-9]{1,5}", port) and int(port) < 1 << 16):
        raise ValueError("must be host:port on loopback such as '127.0.0.1:9475', or '' for none")
    return str(value)


@described(type="object", additionalProperties={"type": "string", "minLength": 1})
def domains(value: Any) -> dict[str, str]:
    """uid -> domain, as a TOML table or as text `1000=team-a,1001=team-a`."""
    if isinstance(value, str):
        value = dict(pair.partition("=")[::2] for pair in value.split(",") if pair)
    table = value if isinstance(value, dict) else {"": ""}
    for uid, domain in table.items():
        named = isinstance(domain, str) and 1 <= len(domain.encode()) <= 1024 and not domain.startswith("uid:")
        if not fullmatch("0|[1-9][0-9]{0,9}", uid) or not named:
            raise ValueError("must map user ids to names that do not begin with 'uid:', such as {1000 = 'team-a'}")
    return dict(table)
