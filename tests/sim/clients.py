"""Engine processes as the world plays them: what they believe to hold, and that they copy when they like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache as memoized

from tests.sim.directories import Segment
from tierd.block import ROOT, block_hash

Place = tuple[Segment, int]
"""A slot as clients know it: it outlives the numbers of one life of the daemon."""


@memoized
def _hash(parent: bytes, token: int) -> bytes:
    return block_hash(parent, [token])


def chain(tokens: Iterable[int], parent: bytes = ROOT) -> list[bytes]:
    """The hashes of a chain of blocks, each named by one number."""
    run = []
    for token in tokens:
        parent = _hash(parent, token)
        run.append(parent)
    return run


@dataclass(eq=False)
class Claim:
    """What a client believes about one of its leases: the blocks, and the places that it was told, by position."""

    hashes: list[bytes]
    writing: bool
    places: dict[int, Place] = field(default_factory=dict)


@dataclass
class Page:
    """What a client believes about a page: how often it holds it, and the block that it is or is to become.

    One that is not `named` is reserved: the client writes into it until it asks for it to be `block`.
    """

    times: int = 1
    block: bytes = b""
    named: bool = False


@dataclass(eq=False)
class Client:
    """One engine process. It copies whenever it likes from and to the places of its claims (by lease), and computes in its
    pages.
    """

    id: int
    bit: int
    tier: int
    claims: dict[int, Claim] = field(default_factory=dict)
    pages: dict[Place, Page] = field(default_factory=dict)
    attached: bool = True

    def leases(self, writing: bool) -> list[int]:
        """Its leases of one kind."""
        return [lease for lease, claim in self.claims.items() if claim.writing == writing and lease > 0]

    def places(self, writing: bool) -> Iterator[tuple[Place, bytes]]:
        """The places that it reads from or writes to, with the hash that belongs there."""
        for claim in self.claims.values():
            if claim.writing == writing:
                yield from ((place, claim.hashes[at]) for at, place in claim.places.items())
        for place, page in self.pages.items():
            if writing == (not page.block):
                yield place, page.block or b"computed by %d" % self.id

    def write(self) -> None:
        """Copy into every place that it may write to."""
        for (segment, at), block in self.places(writing=True):
            segment.content[at] = block
