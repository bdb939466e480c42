"""Which blocks may come to the prefix-closed tier: all, those that were asked for again or are likely to be, or those that its
policy wants.

On chat four of five blocks that are written at once are never read again. What is turned away may come later: a block that is
read while it is still in memory is offered again. The tier stays prefix-closed in every case, since only the head of a run
is let in, and no block is asked for more often than its parent.
"""

from __future__ import annotations

from collections.abc import Callable

from tierd.block import HASH_BYTES
from tierd.core.sightings import Sighting, Sightings

EVERYTHING, SECOND_SIGHT, LEARNED, POLICY = "everything", "second-sight", "learned", "policy"
ADMISSIONS = (EVERYTHING, SECOND_SIGHT, LEARNED, POLICY)
WRITE_PRICE = 3.0
"""One of so many blocks that are written has to be read again; to its policy a block has to be worth so many times what it
drives out. Every write wears the medium."""


class Admission:
    """Lets in the head of a run; `slots` says how many blocks the tier holds, `entered` how many have come in so far."""

    def __init__(self, kind: str, slots: Callable[[], int], entered: Callable[[], int]) -> None:
        assert kind in ADMISSIONS
        self.kind = kind
        self.sightings = Sightings(slots, entered) if kind in (SECOND_SIGHT, LEARNED) else None

    def asked(self, hashes: bytes, first: int, found: int) -> None:
        """A request wants these blocks; it named those from `first` on, and the first `found` are in some tier."""
        if self.sightings:
            self.sightings.asked(hashes, first, found)

    def offered(self, hashes: bytes, parent: bytes) -> int:
        """How many leading blocks of a run behind `parent` that was just stored or read may be written.

        What is let in takes along whatever is above it. So what was turned away is not followed at first sight: an answer that
        is likely to be read again would bring a prompt that is not.
        """
        if not self.sightings:
            return len(hashes) // HASH_BYTES
        above = self.sightings.above(parent)
        follows = above is None or above.again or (above.admitted if above.stored else self._wants(above))
        at = admitted = 0
        for run, blocks in self.sightings.stored(hashes, parent):
            at += blocks
            run.admitted = follows = run.again or (follows and self._wants(run))
            if follows:
                admitted = at
        return admitted

    def forget(self) -> None:
        """All blocks of the namespace were purged."""
        if self.sightings:
            self.sightings.forget()

    def _wants(self, run: Sighting) -> bool:
        """Whether a run is likely enough to be read again."""
        assert self.sightings is not None
        return self.kind == LEARNED and self.sightings.chance(run.kind) * WRITE_PRICE >= 1
