"""One small file in the state directory says how the life before this one ended. It is for people: recovery never reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import aiofiles
import aiofiles.os

from tierd.log import get_logger

log = get_logger("history")
FILE = "life.json"
FILE_BYTES_MAX = 4096


async def begin(state_dir: Path, now_ms: int) -> str:
    """Note a start (Unix milliseconds); returns how the last life ended: "first", "clean", "killed" or "unknown"."""
    path = state_dir / FILE
    try:
        async with aiofiles.open(path, encoding="utf-8") as file:
            last = json.loads(await file.read(FILE_BYTES_MAX))
        ended = "clean" if last["ended_ms"] else "killed"
    except FileNotFoundError:
        ended = "first"
    except (OSError, ValueError, KeyError, TypeError):
        ended = "unknown"
    await _write(path, {"pid": os.getpid(), "started_ms": now_ms, "ended_ms": 0})
    return ended


async def end(state_dir: Path, now_ms: int) -> None:
    """Note a clean end (Unix milliseconds)."""
    await _write(state_dir / FILE, {"pid": os.getpid(), "started_ms": 0, "ended_ms": now_ms})


async def _write(path: Path, values: dict[str, Any]) -> None:
    """Replace the file whole; failing to is worth a warning and nothing more."""
    fresh = path.with_suffix(".new")
    try:
        async with aiofiles.open(fresh, "w", encoding="utf-8") as file:
            await file.write(json.dumps(values) + "\n")
        await aiofiles.os.replace(fresh, path)
    except OSError as error:
        log.warning("history not written", path=path, reason=error)
