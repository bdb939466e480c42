"""What fetching hot children ahead would bring: the benchmark behind docs/policies.md, on requests that a person can follow."""

from __future__ import annotations

import pytest

from benchmarks.ahead import RULES, Foresight
from tests.sim.clients import chain
from tierd.core.ahead import PREFETCHED, USEFUL, WASTED


def ask(house: Foresight, *prompts: list[int]) -> None:
    """One prompt after the other, a second apart."""
    for number, tokens in enumerate(prompts):
        house.request(b"".join(chain(tokens)), 1000 * number)


@pytest.mark.parametrize("rule", RULES)
def test_a_child_comes_up_into_free_room_and_is_useful(rule: str) -> None:
    """After a restart, whoever reads a prefix has what followed on it in cpu already."""
    house = Foresight({"cpu": 64, "nvme": 64}, rule)
    ask(house, [1, 2, 3, 4], [1, 2, 5, 6])
    house.restart()
    house.hits.clear()
    ask(house, [1, 2, 7], [1, 2, 3, 4])
    assert house.hits["nvme"] == 2 and house.hits["cpu"] == 4
    assert house.cache.counters[PREFETCHED, USEFUL] == 2 and house.cache.pools[0].ahead.unused == 2
    house.cache.check()


def test_without_a_rule_nothing_comes_up_by_itself() -> None:
    """The same requests find on nvme what they want."""
    house = Foresight({"cpu": 64, "nvme": 64}, None)
    ask(house, [1, 2, 3, 4], [1, 2, 5, 6])
    house.restart()
    house.hits.clear()
    ask(house, [1, 2, 7], [1, 2, 3, 4])
    assert house.hits["nvme"] == 4 and house.hits["cpu"] == 2


def test_what_is_brought_in_place_of_something_else_can_be_wasted() -> None:
    """A full tier: only the rule that drives out anything fetches, and nobody asks for it."""
    for rule in ("free", "anything"):
        house = Foresight({"cpu": 8, "nvme": 64}, rule)
        ask(house, [1, 2, 3, 4], [1, 2, 5, 6], list(range(20, 28)), [1, 2], list(range(30, 38)), list(range(40, 48)))
        assert bool(house.cache.counters[PREFETCHED, WASTED]) == (rule == "anything")
        house.cache.check()
