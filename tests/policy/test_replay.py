"""`tierd replay`: what it computes is right by hand, what it prints is promised, what is wrong is refused with its place."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierd.cli import USAGE, main
from tierd.core.policies import POLICIES
from tierd.core.policy.opt import best, next_uses
from tierd.replay.shelf import Shelf
from tierd.replay.trace import read_trace

ROW = {"policy", "capacity_share", "block_hit", "token_hit", "tier_writes", "block_ops_per_second"}


def line(now: float, ids: list[int], tokens: int | None = None, **more: Any) -> str:
    """A request of blocks of 16 tokens."""
    length = 16 * len(ids) + 3 if tokens is None else tokens
    return json.dumps({"timestamp": now, "input_length": length, "output_length": 1, "hash_ids": ids, **more})


def written(folder: Path, *lines: str, name: str = "small.jsonl") -> Path:
    """A trace in a file."""
    file = folder / name
    text = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return file


def forest(seed: int, requests: int) -> list[list[int]]:
    """Random prompts over a tree: every id has one parent."""
    dice = random.Random(seed)
    names: dict[tuple[int, ...], int] = {}
    prompts = []
    for _ in range(requests):
        tokens = [dice.randrange(2) for _ in range(dice.randint(1, 5))]
        prompts.append([names.setdefault(tuple(tokens[:end]), len(names)) for end in range(1, len(tokens) + 1)])
    return prompts


def test_a_program_gets_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure under the name it is promised under, for each policy and capacity, opt among them."""
    file = written(tmp_path, *(line(at, ids, stop="end_turn") for at, ids in enumerate(forest(1, 80))), name="a.jsonl.gz")
    assert main(["replay", str(file), "--policy", ",".join(POLICIES), "--capacity", "0.2,0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["trace"] == "a" and printed["unique_blocks"] == read_trace(file).unique_blocks
    assert [(row["policy"], row["capacity_share"]) for row in printed["rows"]] == [
        (policy, share) for share, policy in product((0.2, 0.5), (*POLICIES, "opt"))
    ]
    for row in printed["rows"]:
        assert row.keys() >= ROW
        assert row["block_ops_per_second"] > 0 and 0 < row["token_hit"] <= row["block_hit"] <= 1


def test_hits_and_writes_are_those_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four slots: the second prompt finds two blocks; the third drives the oldest out, which the fourth then misses."""
    prompts = [[0, 1, 2], [0, 1, 3], [4, 5], [0, 1, 2]]
    file = written(tmp_path, *(line(at, ids, 16 * len(ids)) for at, ids in enumerate(prompts)))
    assert main(["replay", str(file), "--policy", "lru", "--capacity", "0.67", "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["lru"]["capacity_blocks"] == 4
    assert rows["lru"]["block_hit"] == pytest.approx((2 + 2) / 11)
    assert rows["lru"]["tier_writes"] == 3 + 1 + 2 + 1
    assert rows["opt"]["block_hit"] == pytest.approx((2 + 3) / 11)
    assert rows["opt"]["tier_writes"] == 3


def test_a_person_gets_a_table(tmp_path: Path) -> None:
    """With a heading, hits in percent and the optimum, and no bar where nobody watches."""
    file = written(tmp_path, *(line(at, ids) for at, ids in enumerate(forest(2, 50))))
    command = [sys.executable, "-m", "tierd", "replay", str(file), "--capacity", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "block hits" in done.stdout and "opt" in done.stdout and done.stderr == ""


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    """--plot writes a PNG file."""
    file = written(tmp_path, *(line(at, ids) for at, ids in enumerate(forest(3, 50))))
    assert main(["replay", str(file), "--capacity", "0.2,0.4", "--plot", str(tmp_path / "hits.png")]) == 0
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", range(30))
def test_the_best_possible_is_that_of_exhaustive_search(seed: int) -> None:
    """No choice of what to keep, however clever, has more hits on a small tree."""
    prompts = forest(seed, 9)
    slots = 1 + seed % 4
    reachable = {frozenset[int](): 0}
    for prompt in prompts:
        following: dict[frozenset[int], int] = {}
        for kept, hits in reachable.items():
            hit = next((at for at, block in enumerate(prompt) if block not in kept), len(prompt))
            pool = sorted(kept | set(prompt))
            for choice in subsets(pool, slots):
                following[choice] = max(following.get(choice, 0), hits + hit)
        reachable = following
    uses = next_uses([np.array(prompt, np.int32) for prompt in prompts], 1000)
    assert best(uses, slots).hits.sum() == max(reachable.values())


def subsets(pool: list[int], most: int) -> list[frozenset[int]]:
    """All sets of at most so many of these."""
    found = [frozenset[int]()]
    for block in pool:
        found += [some | {block} for some in found if len(some) < most]
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quantum", [1, 5])
def test_no_policy_breaks_the_tree_or_beats_the_best(policy: str, quantum: int) -> None:
    """Whatever a policy does, the index stays right, and it has no more hits than are possible."""
    for seed in range(6):
        prompts = forest(seed, 300)
        names = {block: bytes([*block.to_bytes(8, "little")] * 4) for prompt in prompts for block in prompt}
        names = {block: (block + 1).to_bytes(8, "little") * 4 for block in names}
        shelf, hits = Shelf(5 + seed, policy, quantum), 0
        for now, prompt in enumerate(prompts):
            hits += shelf.request(b"".join(names[block] for block in prompt), now * 700)
            shelf.index.check()
        uses = next_uses([np.array(prompt, np.int32) for prompt in prompts], 1000)
        assert 0 < hits <= best(uses, 5 + seed).hits.sum()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: '[1]' is not a JSON object"),
        (json.dumps({"timestamp": 1, "input_length": 20}), "line 2: field hash_ids is missing"),
        (json.dumps({"input_length": 20, "hash_ids": []}), "line 2: field timestamp is missing"),
        (line(1, [5]).replace("19", '"x"'), "line 2: field input_length is 'x'"),
        (line(-1, [5]), "line 2: field timestamp is '-1'"),
        (line(float("nan"), [5]), "line 2: field timestamp is 'nan'"),
        (line(1, [5], stop=3), "line 2: field stop is 3"),
        (line(1, [1, -2]), "line 2: field hash_ids has '-2' at 1"),
        (line(1, [5, 1]), "line 2: field hash_ids has block 1 at 1 behind another block"),
        (line(1, [7, 7]), "line 2: field hash_ids has block 7 at 1 behind another block"),
        (line(1, [1, 2, 3], 2), "line 2: field hash_ids has 3 blocks for input_length 2"),
        (line(0, [1]), "line 2: field timestamp goes back"),
    ],
)
def test_a_bad_line_is_named(second: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File, line and field, before anything is replayed."""
    file = written(tmp_path, line(0.0 if "back" not in said else 9, [1, 2]), second)
    assert main(["replay", str(file)]) == USAGE
    told = capsys.readouterr().err
    assert str(file) in told and said in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "lru,fifo"], "'fifo' is unknown: give some of lru, lfu, chd"),
        (["--policy", ","], "names none"),
        (["--capacity", "0"], "'0' is impossible: give shares over 0 and up to 1"),
        (["--capacity", "0.1,1.5"], "'1.5' is impossible"),
        (["--capacity", "nan"], "'nan' is impossible"),
        (["--capacity", "lots"], "'lots' is impossible"),
        (["--capacity", "0.001"], "is not one block: give at least"),
        (["--plot", "hits.svg"], "only .png"),
        (["--plot", "nowhere/hits.png"], "not a directory"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown policy, an impossible capacity, a picture that cannot be written."""
    file = written(tmp_path, line(0, [1, 2]), line(1, [1, 3]))
    assert main(["replay", str(file), *arguments]) == USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("lines", "said"), [([], "it has no lines"), ([line(0, [], 3)], "its 1 requests have no blocks")])
def test_an_empty_trace_is_refused(lines: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to learn from it, and it says what a trace is."""
    assert main(["replay", str(written(tmp_path, *lines))]) == USAGE
    assert said in capsys.readouterr().err


def test_a_file_that_is_not_there_or_cut_off_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that does not exist, and half of a gzip file."""
    assert main(["replay", str(tmp_path / "none.jsonl")]) == USAGE
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    file = written(tmp_path, *(line(at, ids) for at, ids in enumerate(forest(2, 500))), name="cut.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-40])
    assert main(["replay", str(file)]) == USAGE
    assert "not a whole gzip file" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 16, 100, 512])
@pytest.mark.parametrize("partial", [False, True])
def test_any_block_size_is_recognised(size: int, partial: bool, tmp_path: Path) -> None:
    """Whether a prompt's last block, which may be part of one, has an id or not."""
    dice = random.Random(size)
    lines = []
    for at in range(200):
        tokens = dice.randint(1, 40 * size)
        blocks = -(-tokens // size) if partial else tokens // size
        lines.append(line(at, [at * 100 + number for number in range(blocks)], tokens))
    lines.append(line(200, [10**6 + number for number in range(3)], 3 * size))
    assert read_trace(written(tmp_path, *lines)).block_tokens == size
