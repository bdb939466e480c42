"""`tierd config`: what it says of a configuration is what a daemon makes of it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tierd.cli import OK, USAGE, main
from tierd.config import KEYS, Config
from tierd.units import shipped

SAMPLES: list[Any] = [
    *(
        "64MiB",
        "1 GiB",
        "0",
        "-1",
        "lots",
        "",
        "cpu",
        "cuda:0",
        "cuda:01",
        "auto",
        "posix",
        "kvikio",
        "json",
        "debug",
        "/run/x",
        "x",
    ),
    *(
        "0660",
        "0700",
        "0444",
        "9999",
        "127.0.0.1:80",
        "true",
        0,
        1,
        8,
        64,
        65,
        4096,
        1 << 20,
        1 << 40,
        -1,
        0.25,
        0.5,
        1.0,
        10.0,
    ),
    *(True, False, {}, {"1000": "team"}, {"1000": 7}, [], ["a"]),
]
TYPES = {"string": str, "boolean": bool, "object": dict}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema, as much of it as is used here."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind in ("integer", "number"):
        right = isinstance(value, int | float if kind == "number" else int) and not isinstance(value, bool)
        return right and schema["minimum"] <= value <= schema["maximum"]
    if not isinstance(value, TYPES[kind]):
        return False
    if kind == "object" and "properties" in schema:
        known = schema["properties"]
        return all(name in known and fits(item, known[name]) for name, item in value.items())
    if kind == "object":
        return all(fits(item, schema["additionalProperties"]) for item in value.values())
    return kind != "string" or bool(re.search(schema.get("pattern", ""), value))


def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `tierd config schema` prints."""
    assert main(["config", "schema"]) == OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_schema_has_every_key_with_the_words_of_the_example_file(capsys: pytest.CaptureFixture[str]) -> None:
    """And its default fits; the example file itself, uncommented, is valid."""
    found = schema(capsys)
    sections = found["properties"]
    assert {f"{section}.{name}" for section, table in sections.items() for name in table["properties"]} == set(KEYS)
    for dotted, key in KEYS.items():
        section, _, name = dotted.partition(".")
        entry = sections[section]["properties"][name]
        assert len(entry["description"]) > 15 and not entry["description"].startswith("#")
        assert key["default"] is None or fits(key["default"], entry), dotted
    example = re.sub(r"^#(?=\w+ = )", "", shipped("tierd.toml"), flags=re.MULTILINE)
    assert fits(tomllib.loads(example), found)


@pytest.mark.parametrize("dotted", KEYS)
def test_the_schema_refuses_nothing_that_a_daemon_takes_and_little_else(
    dotted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value by value against the parser: only what needs arithmetic on text, or a look at an address, may slip through."""
    section, _, name = dotted.partition(".")
    entry = schema(capsys)["properties"][section]["properties"][name]
    for value in SAMPLES:
        try:
            KEYS[dotted]["parse"](value)
            good = True
        except ValueError:
            good = False
        as_text = isinstance(value, str) and isinstance(KEYS[dotted]["default"], int | float | dict)
        if good and not as_text:  # numbers and truths as text are for the environment and flags
            assert fits(value, entry), f"{dotted} = {value!r} is good, and the schema refuses it"
        if fits(value, entry) and not good:
            assert "anyOf" in entry, f"{dotted} = {value!r} is refused, and the schema takes it"


def test_show_is_toml_that_gives_the_same_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the sources were; with --origin each line says which one."""
    file = tmp_path / "tierd.toml"
    file.write_text('[server]\nruntime_dir = "/run/elsewhere"\ndomains = { 1000 = "team a" }\n[nvme]\nwrite_back = false\n')
    flags = ["--config", str(file), "--state-dir", f"{tmp_path}/s", "--set", "limits.wait_seconds_max=2.5"]
    assert main(["config", "show", "--origin", *flags]) == OK
    shown = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(shown)
    first = Config.load({"--state-dir": f"{tmp_path}/s", "limits.wait_seconds_max": "2.5"}, {}, file)
    assert Config.load({}, {}, again).describe() == first.describe()
    origins = dict(re.findall(r"^(\w+) = .*# (.*)$", shown, flags=re.MULTILINE))
    assert origins["domains"] == origins["write_back"] == str(file)
    assert (origins["wait_seconds_max"], origins["state_dir"]) == ("flag --set", "flag --state-dir")
    assert main(["config", "show", "--json", *flags]) == OK
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert keys["nvme.write_back"] == {"value": False, "origin": str(file)}
    assert keys["cpu.bytes"] == {"value": "1GiB", "origin": "default"}


def test_check_says_what_a_start_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 with how many keys are set, or 2 with the source, key, value and remedy; nothing is made."""
    file = tmp_path / "tierd.toml"
    file.write_text('[cpu]\nbytes = "2GiB"\n')
    assert main(["config", "check", "--config", str(file), "--runtime-dir", f"{tmp_path}/r"]) == OK
    assert capsys.readouterr().out == f"{file}: good, 2 of {len(KEYS)} keys set\n"
    monkeypatch.setenv("TIERD_CPU_BYTES", "lots")
    assert main(["config", "check", "--config", str(file)]) == USAGE
    assert "environment variable TIERD_CPU_BYTES: cpu.bytes = 'lots' must be" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]
