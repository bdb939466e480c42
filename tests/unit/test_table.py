"""The table of hash fragments against a multiset: collisions, full buckets, growth, owners that change."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from tierd.core.table import CELLS, Table


class Narrow(Table):
    """A table whose fragments are a hash's first 32 bits, so that a test can make them collide."""

    def fragments(self, hashes: bytes) -> np.ndarray:
        """The first word of each hash."""
        return np.frombuffer(hashes, np.uint32)[::8].copy()


def hashes_of(fragments: list[int]) -> bytes:
    """Hashes with these fragments."""
    return b"".join(fragment.to_bytes(4, "little") + bytes(28) for fragment in fragments)


def pairs(table: Table) -> Counter[tuple[int, int]]:
    """All (fragment, owner) pairs of a table, however many cells each has."""
    cells = [(cell & 0xFFFFFFFF, cell >> 32) for cell in table._cells.tolist() if cell]
    return Counter(cells + [(key, owner) for key, owners in table.spilled.items() for owner in owners])


class Owned:
    """Keys of one owner, as a node keeps them."""

    def __init__(self, table: Table, owner: int, keys: list[int]) -> None:
        self.table, self.owner, self.keys = table, owner, keys
        self.places = table.add(table.fragments(hashes_of(keys)), np.int32(owner))

    def part(self, start: int) -> tuple[np.ndarray, bytes]:
        """Places and hashes of the keys from `start` on, which are not this owner's any more."""
        places, keys = self.places[start:], self.keys[start:]
        self.places, self.keys = self.places[:start], self.keys[:start]
        return places, hashes_of(keys)


@pytest.mark.parametrize("fragments", [1, 3, 40, 100_000])
def test_the_table_is_a_multiset(fragments: int) -> None:
    """Any mix of adding, dropping and giving away leaves exactly what was not dropped, also with equal keys."""
    dice = random.Random(fragments)
    table, owned = Narrow(), []
    table.enlarge(9_000)
    for step in range(400):
        start = dice.random()
        if dice.random() < 0.5 or not owned:
            owned.append(Owned(table, dice.randint(1, 6), [dice.randrange(fragments) for _ in range(dice.randint(0, 40))]))
        elif dice.random() < 0.6:
            some = [dice.choice(owned) for _ in range(2)]
            table.drop([(*one.part(int(start * len(one.keys))), one.owner) for one in some])
        else:
            one = dice.choice(owned)
            at = int(start * len(one.keys))
            given = Owned(table, 9, [])
            given.keys, (given.places, hashes) = one.keys[at:], one.part(at)
            table.reassign(given.places, hashes, one.owner, 9)
            owned.append(given)
        if step % 10 == 0:
            table.check()
            for one in owned:
                table.check_entry(one.places, hashes_of(one.keys), one.owner)
            assert pairs(table) == Counter((key, one.owner) for one in owned for key in one.keys)


def test_keys_without_a_cell_are_still_found() -> None:
    """More equal keys than two buckets hold spill, change owners, and are removed from there."""
    table, count = Narrow(), 5 * CELLS
    table.enlarge(count)
    owned = Owned(table, 1, [11] * count)
    assert table.spilled and (owned.places == -1).sum() >= count - 2 * CELLS
    assert pairs(table) == {(11, 1): count}
    table.reassign(owned.places, hashes_of(owned.keys), 1, 2)
    assert pairs(table) == {(11, 2): count}
    table.check()
    table.drop([(owned.places, hashes_of(owned.keys), 2)])
    assert not table.spilled and table.size == 0


def test_a_turn_over_costs_no_growth() -> None:
    """Removed cells are used again: ten times the capacity may pass through."""
    dice, table = np.random.default_rng(3), Table()
    table.enlarge(4_000)
    size = table.nbytes
    runs = [dice.bytes(400 * 32) for _ in range(10)]
    places = [table.add(table.fragments(run), np.int32(1)) for run in runs]
    for _ in range(100):
        table.drop([(places.pop(0), runs.pop(0), 1)])
        assert table.has_room(400)
        runs.append(dice.bytes(400 * 32))
        places.append(table.add(table.fragments(runs[-1]), np.int32(1)))
    assert table.nbytes == size and table.size == 4_000
    table.check()


def test_a_full_table_says_so() -> None:
    """It takes no key for which it has no room, and an enlarged one takes all that there were and the new ones."""
    dice, table = np.random.default_rng(4), Table()
    while table.has_room(100):
        table.add(table.fragments(dice.bytes(3_200)), np.int32(1))
    size = table.size
    with pytest.raises(AssertionError, match="enlarge"):
        table.add(table.fragments(dice.bytes(3_200)), np.int32(1))
    table.enlarge(100)
    assert table.size == 0 and table.has_room(size + 100)


def test_contains_knows_every_key() -> None:
    """No key that is there is missed, whichever bucket it is in, also those that spilled."""
    table = Narrow()
    table.enlarge(400)
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
