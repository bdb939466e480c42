"""Overview: is tierd helping?"""

from __future__ import annotations

from typing import Any

from dashboards.panels import by, graph, only, quantile, rate, stat, total
from dashboards.panels import dashboard as make

HIT = 'tier=~"gpu|cpu|nvme"'
LOOKUPS = "tierd_lookup_blocks_total"
SAMPLED = "tierd_sampled_lookup_blocks_total"
HIT_RATE = f"{total('', rate(LOOKUPS, HIT))} / {total('', rate(LOOKUPS))}"
POSSIBLE = total("", rate(SAMPLED, 'outcome="seen"')) + " / " + total("", rate(SAMPLED))


def dashboard() -> dict[str, Any]:
    """What a person looks at first."""
    now = (
        stat("Hit rate", "percentunit", "Share of the blocks asked for that were in a tier.", HIT_RATE),
        stat(
            "Prefill tokens saved",
            "short",
            "Tokens a second whose blocks lookups leased: engines need not compute them.",
            total("", rate("tierd_saved_prefill_tokens_total")),
        ),
        stat(
            "Lookup, 99th percentile",
            "s",
            "From a request's last byte to its answer.",
            quantile(0.99, "", "tierd_request_duration_seconds", 'verb="lookup"'),
        ),
        stat("Daemons up", "none", "How many of the chosen instances answer Prometheus.", total("", only("up"))),
    )
    helping = (
        graph(
            "Blocks asked for, by where they were",
            "short",
            "Blocks a second by the highest tier that has them. miss: an engine computes them; pending: another is storing "
            "them.",
            by("tier", rate(LOOKUPS)),
            stack=True,
        ),
        graph(
            "Hit rate, and the best possible",
            "percentunit",
            "Possible: what a cache that never forgets would have found, estimated from one block in 64. A gap between the two "
            "can be "
            "closed by larger tiers; a low line for both cannot.",
            (HIT_RATE, "hit"),
            (POSSIBLE, "possible"),
        ),
        graph(
            "Prefill tokens saved by instance",
            "short",
            "Tokens a second that engines need not compute.",
            by("instance", rate("tierd_saved_prefill_tokens_total")),
            stack=True,
        ),
    )
    cost = (
        graph(
            "Lookup latency",
            "s",
            "From a request's last byte to its answer; a hit in memory needs nothing else.",
            (quantile(0.5, "", "tierd_request_duration_seconds", 'verb="lookup"'), "median"),
            (quantile(0.99, "", "tierd_request_duration_seconds", 'verb="lookup"'), "99 %"),
        ),
        graph(
            "How full the tiers are",
            "percentunit",
            "Bytes of segments over the tier's limit. Full is normal: what is coldest makes room.",
            (f"{total('tier', only('tierd_tier_used_bytes'))} / {total('tier', only('tierd_tier_limit_bytes'))}", "{{tier}}"),
        ),
        graph(
            "NVMe traffic",
            "Bps",
            "Payload bytes read for hits below memory, and written back.",
            (total("", rate("tierd_transfer_bytes_total", 'source="nvme"')), "read"),
            (total("", rate("tierd_transfer_bytes_total", 'target="nvme"')), "written"),
        ),
    )
    rows = [("Now", now), ("Is it helping?", helping), ("What it costs", cost)]
    return make("tierd-overview", "tierd / Overview", "Is the KV cache helping, and what does it cost?", rows)
