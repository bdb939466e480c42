"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

from tierd.core.policy import Policy
from tierd.core.policy.chd import Chd
from tierd.core.policy.lru import Lru

POLICIES: dict[str, Callable[[Callable[[], int]], Policy]] = {"lru": lambda slots: Lru(), "chd": Chd}


def make_policy(name: str, slots: Callable[[], int]) -> Policy:
    """An empty order for a tier of `slots()` slots."""
    return POLICIES[name](slots)
