"""The texts of docs/cli.md and of a man page for each command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from argparse_manpage.manpage import Manpage

from tierd import __version__
from tierd.cli import COMMANDS, EXIT_CODES, parser_of

WIDTH = 100
HEAD = """\
# Commands

<!-- Made by `make manual` from the commands' own parsers; edit these instead. -->

`tierd COMMAND --help` says the same. The commands that ask a running daemon use its admin socket, so they are for root and the
daemon's own user; all of them find it by the configuration (`--config`, `--runtime-dir`). What destroys asks for `--yes`.

| exit code | meaning |
|---|---|
"""
FILES = """\
.SH FILES
.TP
/etc/tierd/tierd.toml
the configuration, with every key and its default as comments
.TP
/run/tierd, /var/lib/tierd
sockets, and what survives a restart
.SH SEE ALSO
"""


def files() -> dict[str, str]:
    """Every file by its name in the repository."""
    pages = {f"manual/man1/tierd-{name}.1": man_page(name) for name in COMMANDS}
    return {"docs/cli.md": document(), "manual/man1/tierd.1": overview(), **pages}


def document() -> str:
    """All commands on one page."""
    codes = "".join(f"| {code} | {text} |\n" for code, text in EXIT_CODES.items())
    return HEAD + codes + "".join("\n" + "\n".join(section(name)) + "\n" for name in COMMANDS)


def section(name: str) -> Iterator[str]:
    """One command: what it does, how it is called, and its arguments."""
    parser = parser_of(name)
    parser.formatter_class = partial(argparse.HelpFormatter, width=WIDTH)
    yield f"## tierd {name}\n"
    yield (parser.description or "").strip() + "\n"
    yield from ("    " + line[len("usage: ") :] for line in parser.format_usage().splitlines())
    yield "\n| argument | meaning |\n|---|---|"
    for action in parser._actions:
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = action.metavar if action.option_strings and action.nargs != 0 else None
        choices = f"one of {', '.join(f'`{choice}`' for choice in action.choices)}" if action.choices else ""
        said = (action.help or "") if action.dest != "help" else "print this"
        yield f"| {names}{f' `{value}`' if value else ''} | {'; '.join(filter(None, (said, choices)))} |"


def man_page(name: str) -> str:
    """A command's man page, in section 1."""
    parser = parser_of(name)
    parser.formatter_class = partial(argparse.HelpFormatter, width=WIDTH)
    return rendered(parser, f"tierd-{name}", COMMANDS[name]) + exit_status() + FILES + ".BR tierd (1)\n"


def overview() -> str:
    """The page of `tierd` itself, which leads to the others."""
    parser = argparse.ArgumentParser(
        "tierd", usage="tierd COMMAND [ARGUMENTS]", description="Commands: see below.", add_help=False
    )
    commands = "".join(f".TP\n.BR tierd-{name} (1)\n{text}\n" for name, text in COMMANDS.items())
    others = ",\n".join(f".BR tierd-{name} (1)" for name in COMMANDS)
    page = rendered(parser, "tierd", "a tiered KV-cache storage daemon for LLM inference")
    return f"{page}.SH COMMANDS\n{commands}{exit_status()}{FILES}{others}\n"


def rendered(parser: argparse.ArgumentParser, name: str, about: str) -> str:
    page = Manpage(parser, {"project_name": "tierd", "version": __version__, "manual_title": "tierd", "description": about})
    page.prog, page.date = name, ""
    return str(page).rstrip() + "\n"


def exit_status() -> str:
    return ".SH EXIT STATUS\n" + "".join(f".TP\n{code}\n{text}\n" for code, text in EXIT_CODES.items())
