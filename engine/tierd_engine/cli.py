"""`tierd-engine`: serve a model over HTTP, or measure what tierd is worth to it."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from tierd.errors import Invalid, TierdError


def main() -> int:
    """The console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tierd-engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model with an OpenAI-compatible API")
    serve.add_argument("model", type=Path, help="directory or .gguf file of a local model")
    serve.add_argument("--name", action="append", help="what clients call the model (default: its directory's name)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (%(default)s)")
    serve.add_argument("--tierd", type=Path, metavar="SOCKET", help="the daemon's socket (default: no daemon)")
    serve.add_argument("--pages", type=int, default=2048, help="KV pages (%(default)s)")
    serve.add_argument("--block-tokens", type=int, default=16, help="tokens of a page (%(default)s)")
    serve.add_argument("--chunk-tokens", type=int, default=512, help="prompt tokens of one step (%(default)s)")
    serve.add_argument("--running-max", type=int, default=64, help="sequences of one step (%(default)s)")
    serve.add_argument("--dtype", default="float32", help="float32 or bfloat16 (%(default)s)")
    serve.add_argument("--device", default="cpu", help="where to compute (%(default)s)")
    options = parser.parse_args()
    # torch's threads spin at barriers by default, which on cores that others use too costs ten times what waiting does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _serve(options)
    except TierdError as error:
        print(f"tierd-engine: {error}", file=sys.stderr)
        return 2 if isinstance(error, Invalid) else 1
    return 0


def _serve(options: argparse.Namespace) -> None:
    import uvicorn

    from tierd.client import Client
    from tierd_engine.llm import LLM
    from tierd_engine.server import Server

    llm = LLM(
        options.model,
        connect=partial(Client, options.tierd, name="tierd-engine") if options.tierd else None,
        pages=options.pages,
        dtype=options.dtype,
        device=options.device,
        block_tokens=options.block_tokens,
        chunk_tokens=options.chunk_tokens,
        running_max=options.running_max,
    )
    llm.tokenizer  # noqa: B018  a model without one is refused now
    server = Server(llm, options.name or [options.model.resolve().stem])
    uvicorn.run(server.app, host=options.host, port=options.port, log_level="info", access_log=False)
