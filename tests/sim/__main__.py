"""`python -m tests.sim --seeds 10000`: as many lives as one has time for; `--seed N` plays one again."""

from __future__ import annotations

import argparse
import sys

from tests.sim.scenario import play


def main() -> None:
    """Play seeds one after another until one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--first", type=int, default=0, help="the first of many")
    parser.add_argument("--steps", type=int, default=300, help="steps of each")
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    for done, seed in enumerate(seeds, 1):
        play(seed, options.steps)
        if done % 100 == 0 or done == len(seeds):
            print(f"\r{done} seeds of {options.steps} steps are well", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
