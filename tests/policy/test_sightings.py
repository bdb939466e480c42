"""What is remembered of requests for admission: the same as a list of all blocks would say, in bounded memory."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from tests.sim.clients import chain
from tierd.block import ROOT
from tierd.core.admission import LEARNED, SECOND_SIGHT, Admission
from tierd.core.sightings import ANSWER, ANSWER_WEIGHT, MEMORY_MIN, RUN_BLOCKS, TRUST, Class, Sightings, class_of

SLOTS = 1 << 30


def never() -> int:
    """No block has been let in."""
    return 0


def packed(*names: int) -> bytes:
    """The chain of these blocks."""
    return b"".join(chain(list(names)))


def test_second_sight_lets_in_what_was_asked_for_after_it_was_stored() -> None:
    """A run is remembered, and the next time its known head may come in."""
    admission = Admission(SECOND_SIGHT, lambda: SLOTS, never)
    first, other = packed(*range(20)), packed(*range(10), *range(100, 120))
    admission.asked(first, 0, 0)
    assert admission.offered(first, ROOT) == 0
    admission.asked(other, 0, 0)
    assert admission.offered(other, ROOT) == 10
    assert admission.offered(first, ROOT) == 20, "somebody computed it again"


def test_a_request_that_asks_until_it_has_room_has_been_seen_once() -> None:
    """Engines look up what waits in every step."""
    admission = Admission(SECOND_SIGHT, lambda: SLOTS, never)
    text = packed(*range(20))
    for _ in range(5):
        admission.asked(text, 0, 0)
    assert admission.offered(text, ROOT) == 0


@pytest.mark.parametrize("kind", [SECOND_SIGHT, LEARNED])
def test_what_another_life_stored_was_read_again(kind: str) -> None:
    """It is there, and nobody remembers why."""
    admission = Admission(kind, lambda: SLOTS, never)
    text = packed(*range(20))
    admission.asked(text, 0, 12)
    assert admission.offered(text[: 12 * 32], ROOT) == 12
    assert admission.offered(text[12 * 32 :], text[11 * 32 : 12 * 32]) == (0 if kind == SECOND_SIGHT else 8)


@dataclass
class Known:
    """A block, as if each had its own line."""

    kind: Class
    weight: float
    stored: bool = False
    again: bool = False


class Ledger:
    """The same with a line for each block, never forgetting."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Known] = {}
        self.again: dict[tuple[int, ...], float] = {}

    def read(self, block: Known) -> None:
        """It was asked for, or computed, again."""
        if block.stored and not block.again:
            block.again = True
            for key in block.kind:
                self.again[key] = self.again.get(key, 0.0) + block.weight

    def asked(self, names: list[bytes]) -> None:
        """All are known up to the first that is not."""
        known = next((at for at, name in enumerate(names) if name not in self.blocks), len(names))
        for name in names[:known]:
            self.read(self.blocks[name])
        new = len(names) - known
        for name in names[known:]:
            self.blocks[name] = Known(class_of(new, known), 1 / new)

    def stored(self, names: list[bytes]) -> list[bool]:
        """Which of them were read again."""
        for name in names:
            block = self.blocks.setdefault(name, Known(ANSWER, ANSWER_WEIGHT))
            self.read(block)
            block.stored = True
        return [self.blocks[name].again for name in names]


@pytest.mark.parametrize("seed", range(20))
def test_it_knows_what_a_list_of_all_blocks_would(seed: int) -> None:
    """Whatever is shared, in whichever pieces it is stored, and whoever asks in between."""
    dice, ledger, sightings = random.Random(seed), Ledger(), Sightings(lambda: SLOTS, never)
    talks: list[list[int]] = [[0]]
    for _ in range(300):
        talk = dice.choice(talks)[: dice.randint(1, 60)] if dice.random() < 0.9 else []
        talk = talk + [dice.getrandbits(30) for _ in range(dice.randint(0, 20))]
        if not talk:
            continue
        talks.append(talk)
        names = chain(talk)
        ledger.asked(names)
        sightings.asked(b"".join(names), 0, 0)
        if dice.random() < 0.2:
            continue
        if dice.random() < 0.3:
            names = names + chain([*talk, *range(dice.randint(1, 5))])[len(names) :]
        at = 0
        while at < len(names):
            piece = names[at : at + dice.choice([1, 7, 32, 100])]
            runs = sightings.stored(b"".join(piece), names[at - 1] if at else ROOT)
            assert [run.again for run, blocks in runs for _ in range(blocks)] == ledger.stored(piece)
            assert sum(blocks for _, blocks in runs) == len(piece)
            at += len(piece)
    assert sightings._again == pytest.approx(ledger.again)
    assert sightings._runs.blocks == len(ledger.blocks)


def test_a_chance_is_the_share_that_was_read_again_before_the_tier_had_turned_over() -> None:
    """And leans on less and less as more is known; old counts fade."""
    entered = [0]
    sightings = Sightings(lambda: 1000, lambda: entered[0])
    kind = class_of(10, 0)
    assert sightings.chance(kind) == 1.0
    for number in range(400):
        text = packed(number, *range(9))
        sightings.asked(text, 0, 0)
        sightings.stored(text, ROOT)
        if number % 4 == 0:
            sightings.asked(text, 0, 10)
        entered[0] += 10
    assert sightings.chance(kind) == pytest.approx(0.25, abs=0.05)
    assert sightings.chance(class_of(1000, 0)) == pytest.approx(sightings.chance(((99,), ())))
    before = sightings._seen[()]
    entered[0] += 1000
    sightings.asked(packed(1, 2), 0, 0)
    assert TRUST < sightings._seen[()] < 0.7 * (before + 100)


def test_memory_is_bounded_where_nothing_is_let_in() -> None:
    """Answers come block by block, and each is a run: the oldest are forgotten."""
    sightings = Sightings(lambda: 1000, never)
    for number in range(9_000):
        text = packed(number)
        sightings.asked(text, 0, 0)
        sightings.stored(text, ROOT)
    assert sightings.size <= MEMORY_MIN + RUN_BLOCKS + 1
    assert not sightings.stored(packed(1), ROOT)[0][0].again
    assert sightings.stored(packed(8_990), ROOT)[0][0].again


def test_a_client_that_makes_hashes_up_breaks_nothing() -> None:
    """Chains that come to a mark twice: what is remembered adds up after each."""
    for seed in range(200):
        dice, entered = random.Random(seed), [0]
        sightings = Sightings(lambda: 20, lambda entered=entered: entered[0])  # type: ignore[misc]
        names = [bytes([mark]) * 8 + bytes([dice.randrange(2)]) * 24 for mark in range(4)]
        for _ in range(60):
            hashes = b"".join(dice.choices(names, k=dice.randint(0, 8)))
            if dice.random() < 0.5:
                sightings.asked(hashes, 0, dice.randint(0, len(hashes) // 32))
            elif hashes:
                sightings.stored(hashes, dice.choice([ROOT, *names]))
            entered[0] += dice.randrange(3)
            runs = sightings._runs._runs
            assert sightings._runs.blocks == sum(run.blocks for run in runs.values())
            assert all(mark == run.marks[:8] and len(run.marks) == 8 * run.blocks for mark, run in runs.items())


def test_an_answer_that_is_stored_block_by_block_is_one_run() -> None:
    """As long as nobody asks for it: memory is that of its blocks."""
    sightings = Sightings(lambda: SLOTS, never)
    text = packed(*range(100))
    sightings.asked(text[: 32 * 10], 0, 0)
    sightings.stored(text[: 32 * 10], ROOT)
    for at in range(10, 100):
        sightings.stored(text[32 * at : 32 * (at + 1)], text[32 * (at - 1) : 32 * at])
    assert sightings.size == 100 + 2 * RUN_BLOCKS


def test_what_is_stored_behind_what_was_found_is_known() -> None:
    """Also where more was remembered to follow than is in any tier: it was computed again."""
    sightings, text = Sightings(lambda: SLOTS, never), packed(*range(20))
    sightings.asked(text, 0, 0)
    sightings.stored(text, ROOT)
    sightings.asked(text, 0, 12)
    [(run, blocks)] = sightings.stored(text[32 * 12 :], text[32 * 11 : 32 * 12])
    assert run.again and blocks == 8 and sightings._runs.blocks == 20


def test_runs_that_were_read_again_together_are_one() -> None:
    """A long conversation is one look in a dictionary, however it was stored."""
    sightings, text = Sightings(lambda: SLOTS, never), packed(*range(64))
    for at in range(64):
        sightings.asked(text[: 32 * (at + 1)], 0, at)
        sightings.stored(text[32 * at : 32 * (at + 1)], text[32 * (at - 1) : 32 * at] if at else ROOT)
    sightings.asked(text, 0, 64)
    assert sightings.size == 64 + RUN_BLOCKS
