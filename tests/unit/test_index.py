"""The prefix tree of runs: splitting, merging, entering in the middle, giving up tails."""

from __future__ import annotations

import random

import numpy as np

from tests.sim.clients import chain
from tierd.block import HASH_BYTES, ROOT
from tierd.core.index import Index, Node


def grow(index: Index, hashes: list[bytes], now: int, tiers: tuple[int, ...] = (0,)) -> None:
    """Enter what is new of a chain from the root; a block's slot is what the test wants it to be: here always 1."""
    packed = b"".join(hashes)
    pieces = index.touch(index.match(packed) or [], now)
    known = sum(piece.blocks for piece in pieces)
    if known < len(hashes):
        rows = np.full((index.tiers, len(hashes) - known), -1, np.int32)
        rows[list(tiers)] = 1
        node = pieces[-1].node if pieces else index.root
        index.extend(node, packed[known * HASH_BYTES :], rows, now)


def nodes(index: Index) -> list[int]:
    """Lengths of all runs, longest first."""
    return sorted((len(node) for node in index.nodes()), reverse=True)


def matched(index: Index, hashes: list[bytes], parent: bytes = ROOT) -> int | None:
    """How many blocks of a chain are known; None: the parent is not."""
    pieces = index.match(b"".join(hashes), parent)
    return None if pieces is None else sum(piece.blocks for piece in pieces)


def test_a_prompt_is_one_node() -> None:
    """A chain that is stored part by part at one time grows in place."""
    index, hashes = Index(2), chain(range(64))
    for end in range(8, 65, 8):
        grow(index, hashes[:end], 1)
    assert nodes(index) == [64] and matched(index, hashes) == 64
    index.check()


def test_a_partial_touch_splits_and_a_full_touch_merges() -> None:
    """Blocks of a node were last used together: what is used apart is kept apart, until it is used together again."""
    index, hashes = Index(1), chain(range(10))
    grow(index, hashes, 1)
    index.touch(index.match(b"".join(hashes[:4])) or [], 2)
    assert nodes(index) == [6, 4]
    index.check()
    pieces = index.touch(index.match(b"".join(hashes)) or [], 3)
    assert nodes(index) == [10]
    assert [(piece.start, piece.blocks) for piece in pieces] == [(0, 10)]
    index.check()


def test_a_touch_from_the_middle_names_the_blocks_it_was_asked_for() -> None:
    """Merging moves the pieces of a chain that was entered at a parent."""
    index, hashes = Index(1), chain(range(12))
    grow(index, hashes, 1)
    for end in (3, 6, 9):
        index.touch(index.match(b"".join(hashes[:end])) or [], 20 - end)
    pieces = index.touch(index.match(b"".join(hashes[4:11]), hashes[3]) or [], 30)
    ((node, start, blocks),) = pieces
    assert node.hashes[start * HASH_BYTES : (start + blocks) * HASH_BYTES] == b"".join(hashes[4:11])
    assert nodes(index) == [11, 1]
    index.check()


def test_nodes_split_where_chains_diverge() -> None:
    """A new branch leaves the common part whole, and both ends are found."""
    index = Index(1)
    one, other = chain([1, 2, 3, 4, 5]), chain([1, 2, 3, 9, 9, 9])
    grow(index, one, 1)
    grow(index, other, 2)
    assert nodes(index) == [3, 3, 2]
    assert matched(index, one) == 5 and matched(index, other) == 6
    assert matched(index, chain([1, 2, 3, 7])) == 3
    index.check()


def test_a_chain_is_entered_at_any_block() -> None:
    """`parent` may be the last of a node, one in its middle, or unknown."""
    index, hashes = Index(1), chain(range(9))
    grow(index, hashes, 1)
    grow(index, hashes[:5], 2)
    for at in range(8):
        assert matched(index, hashes[at + 1 :], hashes[at]) == 8 - at
    assert matched(index, hashes[3:], hashes[1]) == 0
    assert matched(index, hashes, chain([77])[0]) is None


def test_runs_step_over_what_is_not_there() -> None:
    """Known blocks are found on both sides of unknown ones."""
    index, hashes = Index(1), chain(range(6))
    grow(index, hashes, 1)
    strangers = chain([50, 51])
    found = index.runs(b"".join([*hashes[1:3], *strangers, *hashes[4:]]))
    assert [(at, piece.start, piece.blocks) for at, piece in found] == [(0, 1, 2), (4, 4, 2)]


def test_known_blocks_are_counted_wherever_they_are() -> None:
    """count_new stops at a block that has a place already, behind whatever parent."""
    index = Index(1)
    grow(index, chain(range(4)), 1)
    fresh = chain([80, 81, 82])
    assert index.count_new(b"".join(fresh)) == 3
    assert index.count_new(b"".join([*fresh, chain(range(4))[2]])) == 3
    assert index.count_new(chain(range(4))[0]) == 0
    assert index.count_new(b"") == 0


def test_trimming_removes_what_lives_nowhere_up_to_what_lives() -> None:
    """Tails without a copy go, and childless ancestors with them; a gap inside stays as a skeleton."""
    index, hashes = Index(2), chain(range(6))
    grow(index, hashes, 1)
    grow(index, hashes[:4], 2)
    (tail,) = [node for node in index.nodes() if len(node) == 2]
    (head,) = [node for node in index.nodes() if len(node) == 4]
    index.clear(0, head, np.array([1, 3]))
    index.trim([head])
    assert index.blocks == 6
    index.clear(0, tail, np.arange(2))
    index.trim([tail])
    assert index.blocks == 3 and matched(index, hashes) == 3
    index.check()


def test_the_coldest_of_a_tier_has_nothing_below_it() -> None:
    """Every order starts with a leaf, also when a tier was filled later than another."""
    index, hashes = Index(2), chain(range(9))
    grow(index, hashes, 1)
    for end in (6, 3):
        grow(index, hashes[:end], 10 - end)
    for length in (3, 6, 9):  # the lower tier is filled from the head
        for piece in index.match(b"".join(hashes[:length])) or []:
            index.assign(1, piece, np.full(piece.blocks, 2, np.int32))
    index.check()
    for order in index.orders:
        assert [len(node) for node in order.coldest()] == [3, 3, 3]
        coldest: Node = next(order.coldest())
        assert not coldest.children


def test_random_growth_and_decay_agree_with_a_set() -> None:
    """Prompts that share prefixes of random length, touched in part and evicted in part: all that lives is found."""
    dice = random.Random(5)
    index, alive = Index(1), set()
    prompts: list[list[int]] = [[0]]
    for now in range(1, 400):
        prompt = dice.choice(prompts)
        prompt = prompt[: dice.randint(0, len(prompt))] + [dice.randint(0, 2) for _ in range(dice.randint(1, 30))]
        prompts = [*prompts[-20:], prompt]
        hashes = chain(prompt)
        grow(index, hashes, now)
        alive |= set(hashes)
        for node in list(index.orders[0].coldest())[: dice.randint(0, 3)]:
            keep = dice.randrange(len(node))
            gone = np.flatnonzero(node.slots[0] >= 0)
            gone = gone[gone >= keep]
            if len(gone) and not node.children:
                alive -= {node.hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES] for at in gone.tolist()}
                index.clear(0, node, gone)
                index.trim([node])
        if now % 20 == 0:
            index.check()
            assert index.blocks == len(alive)
            assert all(index.find(block) for block in alive)
