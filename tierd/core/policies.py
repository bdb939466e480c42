"""The policies by name, and which tier has which."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tierd.core.ladder import Ladder
from tierd.core.policy import Policy
from tierd.core.policy.arc import Arc
from tierd.core.policy.chd import Chd
from tierd.core.policy.lfu import Lfu
from tierd.core.policy.lru import Lru
from tierd.core.policy.s3fifo import S3Fifo

POLICIES: dict[str, Callable[[Callable[[], int]], Policy]] = {
    "lru": lambda slots: Lru(),
    "lfu": lambda slots: Lfu(),
    "chd": Chd,
    "arc": Arc,
    "s3fifo": S3Fifo,
}
SERVING = ("lru", "lfu", "chd")
"""Those that a daemon may use; the others are measures."""
DEFAULTS = {"gpu": "lru", "cpu": "lru", "nvme": "lru"}
"""By kind of tier; docs/policies.md has the measurements behind them."""


def make_policy(name: str, slots: Callable[[], int]) -> Policy:
    """An empty order for a tier of `slots()` slots."""
    return POLICIES[name](slots)


def make_orders(ladder: Ladder, names: Mapping[str, str]) -> list[Policy]:
    """An empty order for each tier of a ladder, by the kinds of tiers; those that are not named have the default."""
    return [
        make_policy(names.get(kind, DEFAULTS[kind]), lambda pool=pool: pool.slots)  # type: ignore[misc]
        for kind, pool in zip(ladder.kinds, ladder.pools, strict=True)
    ]
