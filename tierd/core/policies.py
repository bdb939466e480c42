"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

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


def make_policy(name: str, slots: Callable[[], int]) -> Policy:
    """An empty order for a tier of `slots()` slots."""
    return POLICIES[name](slots)
