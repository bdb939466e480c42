"""chd: without evidence it is lru, with evidence it keeps what comes back, and its books stay right and small."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.clients import chain
from tierd.block import ROOT
from tierd.core.policy.chd import Chd
from tierd.core.policy.survival import BINS, KINDS, Survival, age_bin
from tierd.errors import Invalid
from tierd.replay.house import House
from tierd.replay.shelf import CPU, Shelf
from tierd.replay.trace import block_hashes

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=60)


def policy_of(shelf: Shelf) -> Chd:
    """The shelf's policy, which is chd."""
    policy = shelf.index.orders[CPU]
    assert isinstance(policy, Chd)
    return policy


def held(shelf: Shelf) -> set[bytes]:
    """Every block in the tier."""
    return {node.hashes[at : at + 32] for node in shelf.index.nodes() for at in range(0, len(node.hashes), 32)}


@settings(max_examples=150, deadline=None)
@given(prompts=PROMPTS, slots=st.integers(1, 30), gap=st.integers(0, 5000), quantum=st.integers(1, 8))
def test_without_evidence_it_is_lru_block_for_block(prompts: list[list[int]], slots: int, gap: int, quantum: int) -> None:
    """Whatever comes, and however often: after each request the same blocks are there."""
    shelves = [Shelf(slots, name, quantum) for name in ("lru", "chd")]
    for number, prompt in enumerate(prompts):
        hits = [shelf.request(b"".join(chain(prompt)), number * gap) for shelf in shelves]
        assert hits[0] == hits[1]
        assert held(shelves[0]) == held(shelves[1])
        shelves[1].index.check()


def test_what_was_learnt_can_be_forgotten() -> None:
    """After a reset, the first to go is the one that lru would let go."""
    shelf = Shelf(200, "chd")
    for now, hashes in conversations(400, 7):
        shelf.request(hashes, now)
    policy = policy_of(shelf)
    assert policy.survival.worth is not None
    policy.survival.reset()
    orders = [policy._runs[node].order for node in policy.coldest()]
    leaves = [node for node in shelf.index.nodes() if not node.children]
    assert orders[0] == min(policy._runs[node].order for node in leaves)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 20), slots=st.integers(4, 120))
def test_its_books_add_up_whatever_it_learnt(seed: int, slots: int) -> None:
    """Each node is entered once, comes before its ancestors, and every run counts the blocks of its node."""
    shelf = Shelf(slots, "chd")
    policy = policy_of(shelf)
    for number, (now, hashes) in enumerate(conversations(250, seed)):
        shelf.request(hashes, now)
        if number % 3 == 0:
            shelf.turn_ended(hashes, ("tool_use", "end_turn", "other")[number % 9 // 3])
        if number % 25 == 0:
            shelf.index.check()
            assert all(policy._runs[node].blocks == len(node) for node in shelf.index.nodes())
            assert policy.ghosts.blocks == sum(run.blocks for run in policy.ghosts._runs.values())
            assert min(min(ring or [0.0]) for ring in policy.survival._open) > -1e-3


def test_what_comes_back_is_kept_and_what_never_does_is_not() -> None:
    """One-shot prompts flood the tier: under lru no conversation survives them, under chd most do."""
    hits = {}
    for name in ("lru", "chd"):
        shelf = Shelf(400, name)
        dice = random.Random(3)
        hits[name] = 0
        for turn in range(300):
            for conversation in range(10):
                prompt = [conversation, *range(1000, 1000 + 20)]
                hits[name] += shelf.request(b"".join(chain(prompt)), turn * 10_000 + conversation)
            for _ in range(20):
                shelf.request(b"".join(chain([dice.getrandbits(40) for _ in range(30)])), turn * 10_000 + 5000)
    assert hits["lru"] == 0
    assert hits["chd"] > 0.7 * 300 * 10 * 21


def test_a_block_that_is_tracked_costs_at_most_sixty_bytes() -> None:
    """Beyond the index, in the tier or a ghost, when turns have some 20 blocks; and ghosts are bounded."""
    prompts = list(conversations(5000, 5, new_blocks_max=40))
    gc.collect()
    sizes = {}
    for name in ("lru", "chd"):
        tracemalloc.start()
        shelf = Shelf(4000, name)
        for now, hashes in prompts:
            shelf.request(hashes, now)
        gc.collect()
        sizes[name] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    policy = policy_of(shelf)
    assert policy.ghosts.blocks <= 50_000
    tracked = policy.ghosts.blocks + shelf.index.blocks
    assert tracked > 30_000
    assert (sizes["chd"] - sizes["lru"]) / tracked <= 60


def test_spells_that_have_not_ended_count() -> None:
    """Most blocks are never read again: whoever looked at those alone that were would value new ones too highly."""
    seen, unseen = Survival(), Survival()
    for spell in range(200):
        for survival in (seen, unseen):
            survival.begin(0, spell * 1000, 1.0)
            if spell % 10 == 0:
                survival.end(0, spell * 1000, 1.0, spell * 1000 + 3000)
            elif survival is seen:
                survival.lose(0, spell * 1000, 1.0, spell * 1000)
    for survival in (seen, unseen):
        survival.learn(400_000)
    assert seen.worth is not None and unseen.worth is not None
    assert unseen.worth[0][0] < 0.5 * seen.worth[0][0]


def test_nothing_is_learnt_from_too_little() -> None:
    """A few spells that ended are no evidence."""
    survival = Survival()
    for spell in range(3):
        survival.begin(1, spell, 1.0)
        survival.end(1, spell, 1.0, 1000)
    survival.learn(2000)
    assert survival.worth is None


@pytest.mark.parametrize("days", [1, 400])
def test_old_spells_fade_and_numbers_stay_finite(days: int) -> None:
    """Weights double every half-life; after a year they are still numbers."""
    survival = Survival()
    for hour in range(0, days * 24, 2):
        for spell in range(5):
            survival.begin(spell % KINDS, hour * 3_600_000, 1.0)
            survival.end(spell % KINDS, hour * 3_600_000, 1.0, hour * 3_600_000 + 5000)
    survival.learn(days * 86_400_000)
    assert survival.worth is None or all(0 <= worth < 1e6 for row in survival.worth for worth in row)
    assert max(map(max, survival._ended)) < 1e40


def test_bins_of_age_rise() -> None:
    """Longer ages never have smaller bins, up to the last."""
    bins = [age_bin(age) for age in (0, 1, 62, 63, 100, 1000, 10_000, 3_600_000, 10**9, 10**15)]
    assert bins == sorted(bins) and bins[0] == 0 and bins[-1] == BINS - 1


def conversations(requests: int, seed: int, new_blocks_max: int = 20) -> Iterator[tuple[int, bytes]]:
    """Some conversations that grow, some that fork, and many that end at once: times (ms) and packed hashes."""
    dice = random.Random(seed)
    names = block_hashes(requests * (new_blocks_max + 4))
    fresh = iter(range(len(names)))
    alive: list[list[int]] = [[]]
    now = 0
    for _ in range(requests):
        now += dice.randrange(4000)
        base = dice.choice(alive) if dice.random() < 0.6 else alive[0][:3]
        prompt = base[: len(base) - dice.randrange(3)] + [next(fresh) for _ in range(dice.randint(1, new_blocks_max))]
        alive = [*alive[-12:], prompt]
        yield now, names[prompt].tobytes()


@pytest.mark.parametrize("seed", range(10))
def test_hashes_that_no_chain_has_cost_their_client_hits_only(seed: int) -> None:
    """Blocks that come twice in one request, and others whose hashes begin alike: the account of ghosts stays exact."""
    dice = random.Random(seed)
    house = House({"cpu": 12, "nvme": 20}, {"cpu": "chd", "nvme": "chd"})
    for now in range(150):
        names = [bytes([dice.randint(1, 5)]) * 8 + bytes([dice.randint(0, 2)]) * 24 for _ in range(dice.randint(1, 6))]
        if lease := house.cache.lookup(1, b"".join(names), ROOT, now).lease:
            house.cache.release(1, lease)
        with suppress(Invalid):  # a block that has a place already
            house.request(b"".join(dict.fromkeys(names)), now)
        for order in house.index.orders:
            assert isinstance(order, Chd)
            assert order.ghosts.blocks == sum(run.blocks for run in order.ghosts._runs.values())
    house.cache.check()
