"""What a mode costs or saves against none, round by round: a slow minute hits both of a pair alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any

from tierd_engine.bench.measure import Measured

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Ratios to the mode "off" over rounds: of CPU seconds a request (median), of seconds (median, and no more than that
    with `CONFIDENCE`; None: too few rounds to say), and how many times earlier the first token came (median of p50s).
    """

    workload: str
    mode: str
    rounds: int
    cpu_ratio: float
    seconds_ratio: float
    seconds_ratio_most: float | None
    first_token_times_earlier: float

    def to_map(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def paired(workload: str, mode: str, ours: list[Measured], off: list[Measured]) -> Paired:
    """Compare rounds of a mode with those of "off", in the order in which they were measured."""
    pairs = list(zip(ours, off, strict=True))
    seconds = [one.seconds / other.seconds for one, other in pairs]
    return Paired(
        workload=workload,
        mode=mode,
        rounds=len(pairs),
        cpu_ratio=median(one.cpu_seconds_per_request / other.cpu_seconds_per_request for one, other in pairs),
        seconds_ratio=median(seconds),
        seconds_ratio_most=median_most(seconds),
        first_token_times_earlier=median(other.first_token_p50_seconds / one.first_token_p50_seconds for one, other in pairs),
    )


def median_most(samples: list[float], confidence: float = CONFIDENCE) -> float | None:
    """The upper end of the one-sided confidence interval of the median, whatever the distribution; None: too few samples.

    The k-th largest of n samples is below the median with the probability that less than k of n coins show heads (order
    statistics: Conover, Practical Nonparametric Statistics, 3.2).
    """
    count, below, most = len(samples), 0.0, None
    for rank, sample in enumerate(sorted(samples, reverse=True)):
        below += comb(count, rank) / 2**count
        if below > 1 - confidence:
            break
        most = sample
    return most
