"""The table of hash fragments against a multiset: collisions, full buckets, growth, owners that change."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from tierd.core.table import CELLS, Table


def pairs(table: Table) -> Counter[tuple[int, int]]:
    """All (fragment, owner) pairs of a table, however many cells each has."""
    cells = [(cell & 0xFFFFFFFF, cell >> 32) for cell in table._cells.tolist() if cell]
    return Counter(cells + [(key, owner) for key, owners in table.spilled.items() for owner in owners])


@pytest.mark.parametrize("fragments", [3, 40, 100_000])
def test_the_table_is_a_multiset(fragments: int) -> None:
    """Any mix of adding, dropping and reassigning leaves exactly what was not dropped, also with equal keys."""
    dice = random.Random(fragments)
    table, model = Table(), Counter()
    for step in range(300):
        owner = dice.randint(1, 6)
        if dice.random() < 0.5 or not model:
            keys = [dice.randrange(fragments) for _ in range(dice.randint(0, 40))]
            table.add(np.array(keys, np.uint32), np.full(len(keys), owner, np.int32))
            model.update((key, owner) for key in keys)
        elif dice.random() < 0.6:
            gone = dice.sample(sorted(model.elements()), dice.randint(0, min(30, model.total())))
            table.drop(np.array([key for key, _ in gone], np.uint32), np.array([owner for _, owner in gone], np.int32))
            model.subtract(gone)
            model += Counter()
        else:
            mine = [key for key, held_by in model.elements() if held_by == owner]
            moved = dice.sample(mine, dice.randint(0, len(mine)))
            table.reassign(np.array(moved, np.uint32), owner, 9)
            model.subtract((key, owner) for key in moved)
            model.update((key, 9) for key in moved)
            model += Counter()
        if step % 10 == 0:
            table.check()
            assert pairs(table) == model
    assert table.size == model.total()


def test_equal_keys_of_one_owner_are_moved_one_by_one() -> None:
    """Two blocks of one node may share a fragment: each half of a split keeps an entry."""
    table = Table()
    table.add(np.array([7, 7], np.uint32), np.array([1, 1], np.int32))
    table.reassign(np.array([7], np.uint32), 1, 2)
    assert pairs(table) == {(7, 1): 1, (7, 2): 1}
    table.drop(np.array([7, 7], np.uint32), np.array([2, 1], np.int32))
    assert table.size == 0
    table.check()


def test_keys_without_a_cell_are_still_found() -> None:
    """More equal keys than two buckets hold spill, and come back from there."""
    table = Table()
    count = 5 * CELLS
    keys = np.full(count, 11, np.uint32)
    table.add(keys, np.arange(1, count + 1, dtype=np.int32))
    assert table.spilled and pairs(table) == {(11, owner): 1 for owner in range(1, count + 1)}
    table.check()
    table.drop(keys, np.arange(1, count + 1, dtype=np.int32))
    assert not table.spilled and table.size == 0


def test_a_turn_over_costs_no_growth() -> None:
    """Removed cells are used again: ten times the capacity may pass through."""
    dice = np.random.default_rng(3)
    table = Table()
    window = dice.integers(1 << 32, size=4_000, dtype=np.uint32)
    table.add(window, np.ones(4_000, np.int32))
    size = table.nbytes
    for _ in range(10):
        fresh = dice.integers(1 << 32, size=4_000, dtype=np.uint32)
        for at in range(0, 4_000, 400):
            table.drop(window[at : at + 400], np.ones(400, np.int32))
            table.add(fresh[at : at + 400], np.ones(400, np.int32))
        window = fresh
    assert table.nbytes == size and table.size == 4_000
    table.check()


def test_contains_knows_every_key() -> None:
    """No key that is there is missed, whichever bucket it is in, also those that spilled."""
    table = Table()
    keys = np.array([5] * 30 + list(range(100, 300)), np.uint32)
    table.add(keys, np.arange(1, len(keys) + 1, dtype=np.int32))
    assert table.contains(keys).all()
    assert not table.contains(np.arange(1_000, 1_050, dtype=np.uint32)).any()


def test_one_hash_and_many_have_the_same_fragment() -> None:
    """The key of a single block is the one that was entered with its run, and depends on the seed."""
    hashes = np.random.default_rng(1).bytes(32 * 50)
    table, other = Table(seed=1), Table(seed=2)
    table.add(table.fragments(hashes), np.arange(1, 51, dtype=np.int32))
    assert all(at + 1 in table.candidates(hashes[32 * at : 32 * at + 32]) for at in range(50))
    assert (table.fragments(hashes) != other.fragments(hashes)).any()
