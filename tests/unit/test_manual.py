"""docs/cli.md, man pages and completions are what the commands' own parsers say, and real tools take them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from manual.build import files
from tierd.cli import COMMANDS, EXIT_CODES, OK, main, parser_of

ROOT = Path(__file__).parents[2]
BASH = """
source "$1"
COMP_WORDS=(tierd "${@:2}"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
$(complete -p tierd | sed 's/.*-F \\([^ ]*\\).*/\\1/') tierd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
echo "${COMPREPLY[@]}"
"""


def test_the_manual_is_up_to_date() -> None:
    """`make manual` would change nothing, and no page is left of a command that is gone."""
    stale = [name for name, text in files().items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    assert stale == [], "run `make manual`"
    assert {f"manual/man1/{path.name}" for path in (ROOT / "manual/man1").iterdir()} == files().keys() - {"docs/cli.md"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_every_argument(name: str) -> None:
    """On its man page and in docs/cli.md: all options, and the exit codes."""
    made = files()
    page = made[f"manual/man1/tierd-{name}.1"].replace("\\-", "-").replace("\\", "")
    text = made["docs/cli.md"].partition(f"## tierd {name}\n")[2].partition("\n## ")[0]
    for action in parser_of(name)._actions:
        for option in action.option_strings if action.dest != "help" else ():
            assert option in page and f"`{option}`" in text
        assert action.help or action.choices, f"tierd {name}: {action.dest} has no help"
    assert all(f"\n{code}\n" in page for code in EXIT_CODES)


def test_what_a_program_can_read_is_offered_by_every_command_that_says_something() -> None:
    """`--json`, wherever there is an answer; not where a process runs on, or a text for a shell is printed."""
    without = {"serve", "hold", "top", "completion"}
    assert {name for name in COMMANDS if not any("--json" in one.option_strings for one in parser_of(name)._actions)} == without


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", ["tierd", "tierd-purge", "tierd-hold"])
def test_groff_reads_the_man_pages_without_a_warning(name: str) -> None:
    """As `man` does."""
    command = ["groff", "-man", "-Tutf8", "-ww", str(ROOT / f"manual/man1/{name}.1")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "EXIT STATUS" in re.sub(".\x08", "", done.stdout), "nothing was typeset"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["pur"], {"purge"}),
        (["scrub", ""], {"start", "pause", "status"}),
        (["purge", "--sh"], {"--shred"}),
        (["config", "--or"], {"--origin"}),
    ],
)
def test_bash_completes_commands_options_and_choices(
    line: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed script, in a real bash."""
    assert main(["completion", "bash"]) == OK
    script = tmp_path / "tierd"
    script.write_text(capsys.readouterr().out)
    command = ["bash", "--norc", "-c", BASH, "bash", str(script), *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert offered <= set(done.stdout.split()), done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_of_their_own(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows every command; where the shell is installed it reads it without a complaint."""
    assert main(["completion", shell]) == OK
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
