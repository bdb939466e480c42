"""How long blocks wait to be read again, learnt by class, and what keeping one is worth at each age.

A spell is the time from one read of a run of blocks to the next. Spells that ended are counted by class and age; those that
have not are counted too, or short waits would seem to be all there are: this is the estimator of Kaplan and Meier (JASA
1958). Estimates of a class lean on those of its group, these on all, and all on a prior under which the longer a block has
not been read the less it will be. From them comes the Gittins index (Gittins, JRSS B 1979): the most hits per second of
residence that can be expected over any horizon.

Ages are seconds in quarter octaves; old spells count less, with a half-life.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KINDS, GROUP_KINDS = 32, 4
"""Classes of runs: 16 of one session each (a group of four turns for each reason why a turn ended), 16 shared ones."""
OWN_KINDS = 16
BINS, BINS_PER_OCTAVE, FIRST_MS = 88, 4, 62.5
EPOCH_MS, EPOCHS = 2000, 4096
HALF_LIFE_MS = 2 * 3600 * 1000
RESCALE_HALF_LIVES = 64
PRIOR_RATE = 0.3
"""Expected reads per second of a block that was read `a` seconds ago, times (a + 1), as long as nothing is known."""
TRUST = 16.0
"""Weight of spells that counts as much as what a class leans on."""
SMOOTHING = np.array([1, 2, 3, 4, 3, 2, 1]) / 16
"""Over an octave of age to either side."""
EVENTS_MIN = 16.0
"""Weight of ended spells below which nothing was learnt."""

_EDGES = np.concatenate([[0.0], FIRST_MS / 1000 * 2 ** (np.arange(1, BINS + 1) / BINS_PER_OCTAVE)])
_WIDTHS = np.diff(_EDGES)
_PRIOR = 1 - ((1 + _EDGES[:-1]) / (1 + _EDGES[1:])) ** PRIOR_RATE


def age_bin(age_ms: float) -> int:
    """The bin of an age."""
    ratio = int(age_ms / FIRST_MS)
    if ratio >= len(_COARSE):
        return min(BINS - 1, int(np.log2(age_ms / FIRST_MS) * BINS_PER_OCTAVE))
    return _COARSE[ratio]


_COARSE = [0, *(int(np.log2(ratio) * BINS_PER_OCTAVE) for ratio in range(1, 1 << 15))]
_EPOCH_BINS = np.array([age_bin((epoch + 0.5) * EPOCH_MS) for epoch in range(EPOCHS)])


class Survival:
    """Spells by class: `worth[kind][bin]` is None until enough was learnt, else hits per second of keeping a block."""

    def __init__(self) -> None:
        self.worth: list[list[float]] | None = None
        self._ended = [[0.0] * BINS for _ in range(KINDS)]
        self._unseen = [[0.0] * BINS for _ in range(KINDS)]
        """Spells whose end nobody will see, by the age at which they were lost sight of."""
        self._open: list[array[float] | None] = [None] * KINDS
        """Weight of the spells that began in each epoch, as a ring."""
        self._ancient = [0.0] * KINDS
        """Of those that began before the ring."""
        self._epoch = 0
        self._base = 0

    def begin(self, kind: int, last: int, weight: float) -> None:
        """Blocks were read at `last` (ms)."""
        epoch = last // EPOCH_MS
        if epoch > self._epoch:
            self._advance(epoch, last)
        self._add(kind, epoch, weight * 2.0 ** ((last - self._base) / HALF_LIFE_MS))

    def end(self, kind: int, last: int, weight: float, now: int) -> None:
        """Blocks that were read at `last` are read again."""
        scaled = weight * 2.0 ** ((last - self._base) / HALF_LIFE_MS)
        ring, epoch = self._open[kind], last // EPOCH_MS
        if ring is not None and epoch > self._epoch - EPOCHS:
            ring[epoch % EPOCHS] -= scaled
        else:
            self._add(kind, epoch, -scaled)
        self._ended[kind][age_bin(now - last)] += scaled

    def lose(self, kind: int, last: int, weight: float, now: int) -> None:
        """Blocks that were read at `last` are not looked at any more."""
        scaled = weight * 2.0 ** ((last - self._base) / HALF_LIFE_MS)
        self._add(kind, last // EPOCH_MS, -scaled)
        self._unseen[kind][age_bin(now - last)] += scaled

    def change(self, kind: int, other: int, last: int, weight: float, new_weight: float) -> None:
        """Blocks that were read at `last` are of another class, as if they always had been."""
        scale = 2.0 ** ((last - self._base) / HALF_LIFE_MS)
        epoch = last // EPOCH_MS
        self._add(kind, epoch, -weight * scale)
        self._add(other, epoch, new_weight * scale)

    def _add(self, kind: int, epoch: int, scaled: float) -> None:
        if epoch <= self._epoch - EPOCHS:
            self._ancient[kind] += scaled
            return
        ring = self._open[kind]
        if ring is None:
            ring = self._open[kind] = array("f", bytes(4 * EPOCHS))
        ring[epoch % EPOCHS] += scaled

    def _advance(self, epoch: int, now: int) -> None:
        """Time goes on: the oldest epochs leave the ring."""
        for passed in range(max(self._epoch + 1, epoch - EPOCHS + 1), epoch + 1):
            at = passed % EPOCHS
            for kind, ring in enumerate(self._open):
                if ring is not None:
                    self._ancient[kind] += ring[at]
                    ring[at] = 0.0
        self._epoch = epoch
        if now - self._base > RESCALE_HALF_LIVES * HALF_LIFE_MS:
            self._rescale(2.0 ** ((self._base - now) / HALF_LIFE_MS))
            self._base = now

    def _rescale(self, factor: float) -> None:
        for counts in (*self._ended, *self._unseen, self._ancient, *self._open):
            for at in range(len(counts or ())):
                counts[at] *= factor  # type: ignore[index]

    # -- learning -----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was learnt, but not which spells are open."""
        self.worth = None
        self._ended = [[0.0] * BINS for _ in range(KINDS)]
        self._unseen = [[0.0] * BINS for _ in range(KINDS)]

    def learn(self, now: int) -> None:
        """Make `worth` of what is known at `now` (ms)."""
        scale = 2.0 ** ((self._base - now) / HALF_LIFE_MS)
        ended = np.array(self._ended) * scale
        if ended.sum() < EVENTS_MIN:
            self.worth = None
            return
        cut = (np.array(self._unseen) + self._censored()) * scale
        self.worth = gittins(hazards(ended, cut)).tolist()

    def _censored(self) -> Floats:
        """Open spells by age (float64[KINDS, BINS])."""
        found = np.zeros((KINDS, BINS))
        found[:, _EPOCH_BINS[-1]] = self._ancient
        at = (self._epoch - np.arange(EPOCHS)) % EPOCHS
        for kind, ring in enumerate(self._open):
            if ring is not None:
                found[kind] += np.bincount(_EPOCH_BINS, np.frombuffer(ring, np.float32)[at], BINS)
        return np.maximum(found, 0.0)


def hazards(ended: Floats, cut: Floats) -> Floats:
    """The chance to be read again in each bin of age, if not before (float64[KINDS, BINS]), from the weights of spells
    that ended there and of those that were cut off there.
    """
    both = (ended + cut)[:, ::-1].cumsum(1)[:, ::-1]
    ended, risk = _smooth(ended), _smooth(both - cut / 2)
    everything = _lean(ended.sum(0), risk.sum(0), _PRIOR)
    groups = np.arange(KINDS) // GROUP_KINDS
    groups[OWN_KINDS:] = groups[OWN_KINDS]
    chances = np.empty_like(ended)
    for group in range(groups[-1] + 1):
        mine = groups == group
        chances[mine] = _lean(ended[mine], risk[mine], _lean(ended[mine].sum(0), risk[mine].sum(0), everything))
    return np.clip(chances, 1e-9, 0.999)


def _lean(ended: Floats, risk: Floats, on: Floats) -> Floats:
    chances: Floats = (ended + TRUST * on) / (risk + TRUST)
    return chances


def _smooth(counts: Floats) -> Floats:
    """Weights that are spread over neighbouring ages. Counts, not chances: where few spells end, chances are zeros and ones."""
    reach = len(SMOOTHING) // 2
    padded = np.pad(counts, ((0, 0), (reach, reach)), "edge")
    spread: Floats = np.sum([weight * padded[:, at : at + BINS] for at, weight in enumerate(SMOOTHING)], axis=0)
    return spread


def gittins(chances: Floats) -> Floats:
    """The most hits per second over any horizon, from each age on (float64[KINDS, BINS])."""
    worth = np.zeros_like(chances)
    alive = np.ones_like(chances)
    hits, cost = np.zeros_like(chances), np.zeros_like(chances)
    for ahead in range(BINS):
        end = BINS - ahead
        step = alive[:, :end] * chances[:, ahead:]
        hits[:, :end] += step
        cost[:, :end] += _WIDTHS[ahead:] * (alive[:, :end] - step / 2)
        alive[:, :end] -= step
        np.maximum(worth[:, :end], hits[:, :end] / cost[:, :end], out=worth[:, :end])
    return worth
