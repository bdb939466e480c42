"""What comes to nvme: everything, what was seen before, or what its policy wants, and prefix-closed whatever it is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.sim.clients import chain
from tierd.block import ROOT
from tierd.cli import USAGE, main
from tierd.core.admission import ADMISSIONS, LEARNED, SECOND_SIGHT
from tierd.core.index import Node
from tierd.core.purge import purge
from tierd.core.sightings import class_of
from tierd.replay.house import House

NVME = 1


def line(now: int, ids: list[int]) -> str:
    """A request of blocks of 16 tokens."""
    return json.dumps({"timestamp": now, "input_length": 16 * len(ids), "output_length": 1, "hash_ids": ids})


@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("cpu", ["lru", "chd"])
def test_nvme_is_prefix_closed_whatever_is_let_in(cpu: str, admission: str) -> None:
    """After every request, in a house that is much too small for its conversations."""
    dice = random.Random(5)
    house = House({"cpu": 40, "nvme": 150}, {"cpu": cpu, "nvme": "chd"}, admission)
    talks = [[number] for number in range(30)]
    for now in range(600):
        talk = dice.choice(talks[: 1 + dice.randrange(30)])
        talk += [dice.getrandbits(30) for _ in range(dice.randint(1, 6))]
        hashes = b"".join(chain(talk[-40:] if dice.random() < 0.1 else talk[:60]))
        assert house.request(hashes, now * 3000) <= len(hashes) // 32
        if now % 20 == 0:
            house.cache.check()
            assert all(is_closed(node) for node in house.index.nodes())
    assert sum(house.hits.values()) > 0 and house.written["nvme"] > 0


def is_closed(node: Node) -> bool:
    """Whether every block of a node in nvme has its parent there."""
    here = node.slots[NVME] >= 0
    above = node.parent
    assert above is not None
    first = above.parent is None or bool(above.slots[NVME, -1] >= 0)
    return bool((here <= np.concatenate([[first], here[:-1]])).all())


def test_what_is_never_read_again_is_never_written_on_second_sight() -> None:
    """One-shot prompts cost the disk nothing, and a conversation is there from its second turn on."""
    writes = {}
    for admission in ("everything", SECOND_SIGHT):
        house = House({"cpu": 30, "nvme": 400}, {}, admission)
        hits = 0
        for turn in range(20):
            hits = house.request(b"".join(chain([7, *range(100, 110)])), turn * 1000)
            for shot in range(5):
                house.request(b"".join(chain([1000 * turn + shot, 1, 2, 3, 4, 5, 6, 7])), turn * 1000 + shot)
        assert hits == 11
        writes[admission] = house.written["nvme"]
    assert writes[SECOND_SIGHT] == 11 and writes["everything"] > 400


@pytest.mark.parametrize(("admission", "written"), [("everything", 10), (SECOND_SIGHT, 0)])
def test_what_comes_by_way_of_cpu_is_chosen_too(admission: str, written: int) -> None:
    """A block of the gpu tier goes on to nvme from cpu, and only when it may."""
    house = House({"gpu": 50, "cpu": 50, "nvme": 50}, {}, admission)
    cache, hashes = house.cache, b"".join(chain(list(range(10))))
    cache.open_session(2, 1, cache.ladder.place("gpu"))
    cache.lookup(2, hashes, ROOT, 0)
    cache.commit(2, cache.store(2, hashes, ROOT, 0).lease, None, 0)
    house.write_back(0)
    assert (house.written["cpu"], house.written["nvme"]) == (10, written)
    cache.release(2, cache.lookup(2, hashes, ROOT, 1).lease)
    house.write_back(1)
    assert house.written["nvme"] == 10


def test_what_comes_by_way_of_a_cpu_tier_without_slots_is_chosen_too() -> None:
    """It goes on to nvme at once, and is asked about all the same."""
    house = House({"gpu": 50, "cpu": 1, "nvme": 50}, {}, SECOND_SIGHT)
    cache, hashes = house.cache, b"".join(chain(list(range(10))))
    cache.pools[cache.ladder.place("cpu")].close_segment(0)
    cache.open_session(2, 1, cache.ladder.place("gpu"))
    cache.commit(2, cache.store(2, hashes, ROOT, 0).lease, None, 0)
    house.write_back(0)
    assert house.written["nvme"] == 0


def test_what_is_read_in_gpu_alone_comes_to_nvme() -> None:
    """It was turned away at first sight, and cpu has forgotten it since."""
    house = House({"gpu": 100, "cpu": 10, "nvme": 200}, {}, SECOND_SIGHT)
    cache, hot = house.cache, b"".join(chain(list(range(5))))
    cache.open_session(2, 1, cache.ladder.place("gpu"))
    for now, text in enumerate([hot, *(b"".join(chain([100 + shot, 1, 2, 3])) for shot in range(6))]):
        cache.commit(2, cache.store(2, text, ROOT, now).lease, None, now)
        house.write_back(now)
    found = cache.lookup(2, hot, ROOT, 9)
    cache.release(2, found.lease)
    house.write_back(9)
    assert found.tiers["gpu"] == 5 and house.written["nvme"] == 5


def test_an_answer_does_not_bring_a_prompt_that_was_turned_away() -> None:
    """Answers to short prompts are read again: those to long ones would take all that is above them along."""
    house = House({"cpu": 60, "nvme": 600}, {}, LEARNED)
    before = 0
    for now in range(300):
        before = house.written["nvme"] if now == 100 else before
        old = 10_000 + max(0, now - 10)
        for text, length in (([10_000 + now, 1, 2, 7], 3), ([old, 1, 2, 7], 4), ([-1 - now, *range(30)], 30)):
            hashes = b"".join(chain(text))
            house.request(hashes[: length * 32], now * 1000)
            if length < len(text):
                house._store(hashes[length * 32 :], hashes[(length - 1) * 32 : length * 32], now * 1000)
                house.write_back(now * 1000)
    assert house.written["nvme"] - before < 200 * 4 + 300


def test_a_purge_teaches_nothing() -> None:
    """That nobody reads what is gone says nothing about prompts: what comes then is written."""
    house = House({"cpu": 400, "nvme": 4000}, {}, LEARNED)
    for now in range(200):
        house.request(b"".join(chain([now, *range(9)])), now)
    purge(house.cache)
    sightings = house.cache.write_back.admission.sightings
    assert sightings and not sightings.size
    sightings.asked(b"".join(chain([9999])), 0, 0)
    assert sightings.chance(class_of(10, 0)) == 1.0


def test_an_engine_that_has_the_head_itself_has_asked_for_the_whole() -> None:
    """It names what it has not got, behind a block of which others may know more: that is where it begins."""
    house = House({"cpu": 50, "nvme": 50}, {}, LEARNED)
    cache, sightings = house.cache, house.cache.write_back.admission.sightings
    assert sightings is not None
    hashes, other = b"".join(chain(list(range(20)))), b"".join(chain([*range(5), 99]))
    house.request(hashes, 0)
    cache.release(1, cache.lookup(1, hashes[10 * 32 :], hashes[9 * 32 : 10 * 32], 1).lease)
    assert sightings._again[()] == 1.0
    cache.lookup(1, other[5 * 32 :], other[4 * 32 : 5 * 32], 2)
    assert [run.kind for run, _ in sightings.stored(other[5 * 32 :], other[4 * 32 : 5 * 32])] == [class_of(1, 5)]


def mixed(admission: str, requests: int) -> tuple[House, list[bool]]:
    """Prompts of 3 blocks that are asked for again within 20 requests, and prompts of 30 that never are; also which of the
    latter came to nvme.
    """
    house, late = House({"cpu": 60, "nvme": 600}, {}, admission), []
    for now in range(requests):
        house.request(b"".join(chain([10_000 + now, 1, 2])), now * 1000)
        house.request(b"".join(chain([10_000 + max(0, now - 10), 1, 2])), now * 1000)
        before = house.written["nvme"]
        house.request(b"".join(chain([-1 - now, *range(29)])), now * 1000)
        late.append(house.written["nvme"] > before)
    return house, late


def test_what_is_learnt_to_be_read_again_is_written_at_first_sight() -> None:
    """Short prompts come again here and long ones do not: after a turn of the tier or two, the one kind alone is written."""
    everything, _ = mixed("everything", 300)
    learned, late = mixed(LEARNED, 300)
    assert all(late[:18]), "without evidence everything is written"
    assert sum(late[100:]) <= 10, "what is not known well enough any more is tried again"
    assert learned.hits == everything.hits
    assert learned.written["nvme"] < 0.4 * everything.written["nvme"]
    refused = learned.cache.counters["write_back_refused",]
    assert refused == everything.written["nvme"] - learned.written["nvme"]


def test_where_all_is_read_again_learned_admission_is_none() -> None:
    """Conversations that go on: block for block what write-through does."""
    houses = [House({"cpu": 40, "nvme": 300}, {}, admission) for admission in ("everything", LEARNED)]
    dice = random.Random(3)
    talks = [[number] for number in range(4)]
    for now in range(1500):
        talk = talks[dice.randrange(len(talks))]
        talk += [dice.getrandbits(30) for _ in range(dice.randint(1, 3))]
        if len(talk) > 50:
            talk[:] = [dice.getrandbits(30)]
        hits = {house.request(b"".join(chain(talk)), now * 1000) for house in houses}
        assert len(hits) == 1
    assert houses[0].written == houses[1].written


def test_two_tiers_are_replayed_for_programs_and_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What both tiers did, for each setting; hits of the tiers sum to all hits."""
    file = tmp_path / "two.jsonl"
    dice = random.Random(1)
    numbers = [[talk * 1000 + at for at in range(10 + dice.randrange(30))] for talk in range(40)]
    file.write_text("".join(line(now, dice.choice(numbers)[: 5 + now % 30]) + "\n" for now in range(300)))
    arguments = [
        "replay",
        str(file),
        "--tiers",
        "cpu=0.05,nvme=0.4",
        "--policy",
        "lru,chd/lru,lru/lru/second-sight,lru/lru/learned,chd/chd/policy",
    ]
    assert main([*arguments, "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["lru", "chd/lru", "lru/lru/second-sight", "lru/lru/learned", "chd/chd/policy", "opt"]
    for name, row in rows.items():
        assert 0 < row["block_hit"] <= rows["opt"]["block_hit"] + 1e-9
        if name != "opt":
            assert sum(tier["block_hit"] for tier in row["tiers"].values()) == pytest.approx(row["block_hit"])
            assert row["tier_writes"] == row["tiers"]["nvme"]["tier_writes"]
    assert rows["lru/lru/second-sight"]["tier_writes"] < rows["lru"]["tier_writes"]
    assert main(arguments) == 0
    assert "nvme written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tiers", "cpu=0.1"], "give a share for each of cpu and nvme"),
        (["--tiers", "cpu=0.1,nvme=2"], "'2' is impossible"),
        (["--tiers", "cpu=0.5,nvme=0.5", "--policy", "lru/lru/never"], "admission 'never' is unknown"),
        (["--tiers", "cpu=0.5,nvme=0.5", "--policy", "lru/lru/policy"], "only chd can turn blocks away"),
        (["--tiers", "cpu=0.5,nvme=0.5", "--policy", "lru/fifo"], "two of them as cpu/nvme"),
        (["--tiers", "cpu=0.5,nvme=0.5", "--plot", "a.png"], "leave --tiers out"),
        (["--policy", "lru/lru"], "'lru/lru' is unknown"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what is possible."""
    file = tmp_path / "two.jsonl"
    file.write_text("".join(line(now, [1, 2, 3, now + 9]) + "\n" for now in range(9)))
    assert main(["replay", str(file), *arguments]) == USAGE
    assert said in capsys.readouterr().err
