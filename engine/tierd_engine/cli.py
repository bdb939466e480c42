"""`tierd-engine`: serve a model over HTTP, or measure what tierd is worth to it.

What is heavy is imported when it is needed: after the environment that torch reads when it is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from tierd.errors import Invalid, TierdError


def main() -> int:
    """The console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tierd-engine", description="Serve a model, or measure what tierd is worth to it.")
    commands = parser.add_subparsers(dest="command", required=True)
    _serve_arguments(commands.add_parser("serve", help="serve a model with an OpenAI-compatible API"))
    _bench_arguments(commands.add_parser("bench", help="measure what tierd is worth to this engine on this machine"))
    options = parser.parse_args()
    # torch's threads spin at barriers by default, which on cores that others use too costs ten times what waiting does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _serve(options) if options.command == "serve" else _bench(options)
    except TierdError as error:
        print(f"tierd-engine: {error}", file=sys.stderr)
        return 2 if isinstance(error, Invalid) else 1
    except KeyboardInterrupt:
        return 130


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="directory or .gguf file of a local model")
    parser.add_argument("--name", action="append", help="what clients call the model (default: its directory's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--tierd", type=Path, metavar="SOCKET", help="the daemon's socket (default: no daemon)")
    how = "how tierd is used: copy blocks, or compute in the slots of its gpu tier (%(default)s)"
    parser.add_argument("--memory", choices=("copy", "tier"), default="copy", help=how)
    parser.add_argument("--pages", type=int, default=2048, help="KV pages of the engine's own (%(default)s)")
    parser.add_argument("--block-tokens", type=int, default=16, help="tokens of a page (%(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="prompt tokens of one step (%(default)s)")
    parser.add_argument("--running-max", type=int, default=64, help="sequences of one step (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda or cuda:N (%(default)s)")


def _serve(options: argparse.Namespace) -> int:
    import uvicorn

    from tierd.client import Client
    from tierd.client.pages import PageClient
    from tierd_engine.llm import LLM
    from tierd_engine.server import Server
    from tierd_engine.tier import TierMemory

    client = PageClient if options.memory == "tier" else Client
    llm = LLM(
        options.model,
        connect=partial(client, options.tierd, name="tierd-engine") if options.tierd else None,
        memory=options.memory,
        pages=options.pages,
        dtype=options.dtype,
        device=options.device,
        block_tokens=options.block_tokens,
        chunk_tokens=options.chunk_tokens,
        running_max=options.running_max,
    )
    llm.tokenizer  # noqa: B018  a model without one is refused now
    if isinstance(llm.memory, TierMemory) and not llm.memory.client.alive:
        print(f"tierd-engine: no slots from tierd until it answers: {llm.memory.client.trouble}", file=sys.stderr)
    server = Server(llm, options.name or [options.model.resolve().stem])
    uvicorn.run(server.app, host=options.host, port=options.port, log_level="info", access_log=False)
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="directory or .gguf file of a local model")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind, interleaved (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the talks to hold (%(default)s)")
    parser.add_argument("--modes", default="off,cpu,cpu+nvme,all", help="comma-separated (%(default)s)")
    parser.add_argument("--only", help="one workload, and no sweep over block sizes")
    parser.add_argument("--pool-tokens", type=int, default=12_288, help="tokens that the KV pages hold (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path(".demo"), help="where the nvme tier lies (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--html", type=Path, help="write a report with a plot to this file")


def _bench(options: argparse.Namespace) -> int:
    from tierd_engine.bench.run import run

    return run(options)
