"""docs/metrics.md: every series of `tierd.series`, and what is said around them."""

from __future__ import annotations

from collections.abc import Iterator

from tierd.series import SECTIONS, Series

HEAD = """\
<!-- Made by `make dashboards` from tierd/series.py and dashboards/metrics_page.py; edit these instead. -->
# Metrics and health

`tierd serve` answers HTTP on loopback, by default on `127.0.0.1:9475` (`metrics.listen`; `''` for none), and on the Unix socket
`metrics.sock` beside its other ones (`metrics.socket`), which those can reach who may connect to `server.socket`:

| path | answer |
|---|---|
| `/metrics` | every series below, in Prometheus' text format |
| `/livez` | 200 `alive` while the process serves HTTP |
| `/readyz` | 200 `ready`, the path to NVMe (`io posix direct`), the way to a GPU (`gpu none`); 503 `starting` or `draining` |

    curl --unix-socket /run/tierd/metrics.sock http://tierd/metrics

Where the default address is taken, the daemon warns and serves on the Unix socket only; an address that was configured must be
had, or it does not start. A scrape reads counters that are kept anyway, in a thread of its own, and takes no lock of the data
path. [Dashboards and alerts](dashboards.md) use these series and no other.

All counters start at 0 with the daemon. Bytes are payload bytes unless the name says otherwise.
"""
NOTES = {
    "Namespaces": "Only with `metrics.per_namespace = true`. There are at most `limits.namespaces_max` namespaces; one that "
    "comes again after it was forgotten begins at 0.",
}
EVENTS = {
    "lookup_busy": "a lookup offered less than is resident, because no slot was free for what is only in other tiers",
    "load_busy": "a load was answered busy: all memory was held",
    "store_short": "a store got fewer slots than it has new blocks: the rest of the memory is held",
    "reserve_short": "a reserve got fewer pages than it asked for: the rest of the gpu tier is held",
    "commit_orphans": "committed blocks that were not entered, because their parent had gone meanwhile",
    "commit_misplaced": "committed blocks that were not entered, because the tree has them elsewhere or their segment is being "
    "given up",
    "written": "blocks that have come to NVMe",
    "write_back_dropped": "blocks that were given up unwritten, because the tier below cannot keep up",
    "write_back_orphans": "blocks that were not written, because an ancestor is neither in memory nor on NVMe",
    "pin_displaced": "pins with a term that ended before it, for one that is worth more",
    "pin_refused": "pins that would have held more segments of a tier than pins may, or been more than 256",
    "purged": "blocks that were forgotten because an operator had their namespace purged",
    "write_back_refused": "blocks that were not written, because admission to the tier below turned them away",
    "write_back_short": "blocks that found no room in the tier below: all of it is in use",
}
TAIL = """\
## Examples

Share of blocks found, by tier:

    sum by (tier) (rate(tierd_lookup_blocks_total[5m])) / ignoring(tier) group_left sum(rate(tierd_lookup_blocks_total[5m]))

Share of blocks that a cache without limits would have found:

    sum(rate(tierd_sampled_lookup_blocks_total{outcome="seen"}[1h])) / sum(rate(tierd_sampled_lookup_blocks_total[1h]))

99th percentile of a lookup:

    histogram_quantile(0.99, sum by (le) (rate(tierd_request_duration_seconds_bucket{verb="lookup"}[5m])))

Bytes read from NVMe a second:

    sum(rate(tierd_transfer_bytes_total{source="nvme"}[5m]))
"""


def page() -> str:
    """The document."""
    return "\n".join(lines()) + "\n" + TAIL


def lines() -> Iterator[str]:
    """All but the examples."""
    yield HEAD
    for title, group in SECTIONS.items():
        yield f"## {title}\n"
        if title in NOTES:
            yield f"{NOTES[title]}\n"
        yield "| series | type | unit | labels | meaning | what holds |\n|---|---|---|---|---|---|"
        yield from map(row, group)
        yield ""
    yield "## Events\n"
    yield "Names of `tierd_events_total`; one that never happened has no sample.\n"
    yield "| event | meaning |\n|---|---|"
    yield from (f"| `{name}` | {text} |" for name, text in EVENTS.items())
    yield ""


def row(series: Series) -> str:
    """One line of a table."""
    labels = ", ".join(f"`{label}`" for label in series.labels)
    kind = {"info": "gauge"}.get(series.type, series.type)
    return f"| `{series.exported}` | {kind} | {series.unit} | {labels} | {series.text} | {series.holds} |"
