"""What a cached block costs in memory, and how many blocks a second enter the index while as many leave it.

Two kinds of prompts, in a young index and after ten times its capacity has passed through; `churn` says what is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tierd.bench.churn import LENGTH
from tierd.bench.prompts import KINDS
from tierd.bench.report import Column, Result, Row, Task, at_least, at_most
from tierd.errors import Closed

BLOCKS, BLOCKS_QUICK = 1_000_000, 30_000
TURNOVERS = [1, 10]
BYTES_PER_BLOCK_MAX = 100
BLOCKS_PER_SECOND_MIN = 1_000_000
SEED = 1
CHILD_SECONDS_MAX = 600
PIPE_BYTES = 1 << 20


def run(task: Task) -> Result:
    """Both kinds of prompts; speeds one after the other, then traced memory side by side."""
    blocks = BLOCKS_QUICK if task.quick else BLOCKS
    rows = []
    for kind in KINDS:
        task.say(f"index: {kind} prompts through the tree")
        tree = in_child(kind, "tree", blocks)
        task.say(f"index: {kind} prompts as requests")
        rows += [joined(kind, *pair) for pair in zip(tree, in_child(kind, "requests", blocks), strict=True)]
    task.say("index: traced memory")
    with ThreadPoolExecutor() as pool:
        traced = list(pool.map(lambda kind: in_child(kind, "requests", blocks, traced=True), KINDS))
    for row, (other,) in zip((row for row in rows if row["turnover"] == TURNOVERS[0]), traced, strict=True):
        row["traced_bytes_per_block"] = other["bytes_per_block"]
    verdicts = []
    for row in rows:
        where = f"{row['prompts']}, {row['turnover']}x the capacity"
        verdicts.append(at_most(f"{where}: bytes per block", row["bytes_per_block"], BYTES_PER_BLOCK_MAX))
        verdicts.append(at_least(f"{where}: blocks/s", row["insert_blocks_per_second"], BLOCKS_PER_SECOND_MIN))
    notes = [
        "insert: new blocks a second into the tree and its table, with slots of both tiers, as many evicted from both",
        "core: the same prompts as store and commit requests, and the decisions to write them back",
        "bytes: growth of the process (RSS) with the whole core; traced: the same as Python and numpy count it",
    ]
    return Result("index", rows, COLUMNS, verdicts, notes)


def joined(kind: str, tree: Row, requests: Row) -> Row:
    """One row: the tree's speed, the whole core's memory."""
    return {
        "blocks": requests["blocks"],
        "tiers": 2,
        "prompts": kind,
        "turnover": tree["turnover"],
        "bytes_per_block": requests["bytes_per_block"],
        "insert_blocks_per_second": tree["blocks_per_second"],
        "core_blocks_per_second": requests["blocks_per_second"],
        "tree_bytes_per_block": tree["bytes_per_block"],
        "pool_bytes_per_block": requests["pool_bytes_per_block"],
        "nodes": requests["nodes"],
    }


def in_child(kind: str, way: str, blocks: int, traced: bool = False) -> list[Row]:
    """A row for each of TURNOVERS (the first only when traced), from a process that is sent its prompts."""
    turnovers = TURNOVERS[:1] if traced else TURNOVERS
    asked = json.dumps({"way": way, "blocks": blocks, "turnovers": turnovers, "traced": traced})
    command = [sys.executable, "-m", "tierd.bench.churn", asked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=PIPE_BYTES) as child:
        assert child.stdin and child.stdout
        with suppress(BrokenPipeError):  # it has read enough
            for prompt in KINDS[kind](SEED):
                child.stdin.write(LENGTH.pack(len(prompt)) + prompt)
        with suppress(BrokenPipeError):
            child.stdin.close()
        answer = child.stdout.read()
        if child.wait(CHILD_SECONDS_MAX):
            raise Closed(f"the measuring process ended with {child.returncode}: see what it printed above")
    rows: list[Row] = json.loads(answer)
    return rows


COLUMNS = (
    Column("blocks", lambda row: f"{row['blocks']:,}"),
    Column("prompts", lambda row: str(row["prompts"])),
    Column("stored", lambda row: f"{row['turnover']}x"),
    Column("bytes/block", lambda row: f"{row['bytes_per_block']:.0f}"),
    Column("traced", lambda row: f"{row['traced_bytes_per_block']:.0f}" if "traced_bytes_per_block" in row else ""),
    Column("tree", lambda row: f"{row['tree_bytes_per_block']:.0f}"),
    Column("pools", lambda row: f"{row['pool_bytes_per_block']:.0f}"),
    Column("insert blocks/s", lambda row: f"{row['insert_blocks_per_second']:,.0f}"),
    Column("core blocks/s", lambda row: f"{row['core_blocks_per_second']:,.0f}"),
)
