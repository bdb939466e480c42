"""Time to first token of a long prompt: cold, from memory, after `kill -9` of the daemon, from NVMe after a restart."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tierd.errors import TierdError
from tierd_engine.demo.processes import Daemon, run_python
from tierd_engine.demo.report import Run, problems, table

CHECKOUT = Path(__file__).resolve().parents[3]
MODEL = CHECKOUT / ".build/models/SmolLM2-135M-Instruct"
STEPS = 9
EXPLANATION = (
    "Time to first token counts from a request's arrival at a loaded engine, tokenising and tierd included; loading "
    "the model and a tiny unrelated warm-up are not counted. Each run is a new engine process."
)


def main() -> int:
    """Run the demonstration; returns 0 when every promise held, else 1."""
    options = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped, as on Ctrl-C
    notes = Console(stderr=True)
    try:
        with ExitStack() as stack:
            stack.callback(notes.show_cursor)
            runs = _demonstrate(options, notes, stack)
    except TierdError as error:
        notes.print(f"[bold red]The demo could not run:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        notes.print("Interrupted; the daemon and the engines are stopped.")
        return 130
    found = problems(runs)
    if options.json:
        print(json.dumps({"runs": [run.to_map() for run in runs], "problems": found}))
    else:
        _show(runs, found)
    return 1 if found else 0


def _demonstrate(options: argparse.Namespace, notes: Console, stack: ExitStack) -> list[Run]:
    """The story. Everything that it starts or writes is undone when `stack` is closed."""
    options.state_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=options.state_dir)).resolve()
    sockets = Path(tempfile.mkdtemp(prefix="tierd-demo-"))  # a Unix socket's path must be short
    stack.callback(shutil.rmtree, sockets, ignore_errors=True)
    if options.keep:
        stack.callback(notes.print, f"Kept: {work}", highlight=False)
    else:
        stack.callback(shutil.rmtree, work, ignore_errors=True)

    step = _steps(notes, stack)
    step("Preparing the model and a prompt from this repository's documents")
    run_python("tierd_engine.demo.prepare", options.model.resolve(), CHECKOUT, work, log=work / "prepare.log")

    def engine(name: str, source: str | None, *arguments: object) -> Run:
        log = work / f"{name.replace(' ', '-')}.log"
        return Run(name, source, json.loads(run_python("tierd_engine.demo.one_run", work, *arguments, log=log)))

    step("Engine 1: without tierd")
    runs = [engine("no tierd", None)]
    daemon = Daemon(sockets, work / "state", work / "daemon.log")
    stack.callback(daemon.stop)
    step("Starting the daemon")
    daemon.start()
    step("Engine 2: cold")
    runs.append(engine("cold", "miss", daemon.socket))
    step("Engine 3: the same prompt again")
    runs.append(engine("2nd engine", "cpu", daemon.socket))
    step("kill -9 of the daemon under its holder, then engine 4")
    daemon.kill()
    runs.append(engine("kill -9", "cpu", daemon.socket))
    step("tierd sync, then everything is stopped")
    daemon.sync()
    daemon.stop()
    step("Starting the daemon again")
    daemon.start()
    step("Engine 5: from NVMe")
    runs.append(engine("restart", "nvme", daemon.socket))
    return runs


def _steps(notes: Console, stack: ExitStack) -> Callable[[str], None]:
    """A function that announces the next step: a progress bar on a terminal, plain lines elsewhere."""
    if not notes.is_terminal:
        return lambda text: notes.print(text, highlight=False)
    columns = (SpinnerColumn(), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = stack.enter_context(Progress(*columns, console=notes, transient=True))
    task = progress.add_task("", total=STEPS, completed=-1)
    return lambda text: progress.update(task, advance=1, description=text)


def _show(runs: list[Run], found: list[str]) -> None:
    out = Console()
    out.print(table(runs))
    out.print(EXPLANATION, style="dim")
    out.print(f"\nThe answer, the same in every run:\n  {runs[0].result['text'].strip()}\n" if not found else "")
    for problem in found:
        out.print(f"[bold red]FAILED[/] {problem}", highlight=False)
    if not found:
        out.print("[bold green]OK[/] tokens equal in all runs, every hit complete and from where it should come.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tierd_engine.demo", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="directory or .gguf file of a local model (%(default)s)")
    parser.add_argument("--state-dir", type=Path, default=Path(".demo"), help="where to work (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep model, prompt, logs and NVMe segments afterwards")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
