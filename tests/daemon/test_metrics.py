"""What `/metrics`, `/livez`, `/readyz` and `tierd status` say, held against what the daemon was made to do."""

from __future__ import annotations

import json
import re
import select
import shutil
import socket
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from threading import Event

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import LAYOUT, SEGMENT_BYTES, SLOTS, Daemon, hashes_of
from tests.results import Results
from tierd import __version__
from tierd.clock import monotonic_seconds
from tierd.series import SERIES

DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"


def total(samples: dict[str, float], name: str, **labels: str) -> float:
    """The sum of a series over all labels that are not given."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for sample, value in samples.items()
        if sample.partition("{")[0] == name and all(part in sample for part in wanted)
    )


def work(daemon: Daemon, seed: int = 1, turns: int = 12) -> int:
    """Stores and lookups by two sessions, more than the memory holds; returns how many blocks were asked for."""
    random = Random(seed)
    asked = 0
    with daemon.peer() as one, daemon.peer() as two:
        for _ in range(turns):
            wire = random.choice([one, two])
            chain = hashes_of(seed * 100 + random.randrange(12), random.randrange(20, 60))
            asked += len(chain) // 32
            wire.load(chain)
            wire.store(chain)
            daemon.ask("sync", deadline_ms=10_000)
    return asked


def test_lookups_by_tier_sum_to_the_blocks_asked_for(daemon: Daemon) -> None:
    """Each block of each lookup is counted once, in memory, in nvme or as a miss."""
    asked = work(daemon)
    samples = daemon.metrics()
    assert total(samples, "tierd_lookup_blocks_total") == asked
    for tier in ("cpu", "miss"):
        assert total(samples, "tierd_lookup_blocks_total", tier=tier) > 0
    assert sum(daemon.status()["lookup_blocks"].values()) == asked


def test_slots_by_state_sum_to_the_slots_that_the_bytes_used_make(daemon: Daemon) -> None:
    """Every slot of every segment is in exactly one state, and no tier is over its limit."""
    work(daemon)
    samples = daemon.metrics()
    for tier, segments in (("cpu", 4), ("nvme", 16)):
        used = total(samples, "tierd_tier_used_bytes", tier=tier)
        assert used <= total(samples, "tierd_tier_limit_bytes", tier=tier) == segments * SEGMENT_BYTES
        assert total(samples, "tierd_slots", tier=tier) == -(-used // SEGMENT_BYTES) * SLOTS
        assert total(samples, "tierd_slots", tier=tier, state="filling") == 0
        assert total(samples, "tierd_slots", tier=tier, state="retired") == 0


def test_bytes_moved_are_the_bytes_of_the_blocks_that_moved(daemon: Daemon) -> None:
    """Written back: all that was stored, once. Promoted: what was read while it was not in memory."""
    stored = [hashes_of(seed, 50) for seed in range(1, 9)]
    with daemon.peer() as wire:
        for chain in stored:
            wire.store(chain)
            daemon.ask("sync", deadline_ms=10_000)
        samples = daemon.metrics()
        written = total(samples, "tierd_transfer_bytes_total", reason="write_back", source="cpu", target="nvme")
        assert written == 8 * 50 * LAYOUT.block_bytes
        below = wire.lookup(stored[0])["tiers"]["nvme"]
        assert below > 0
        assert wire.load(stored[0]) == 50
        samples = daemon.metrics()
        promoted = total(samples, "tierd_transfer_bytes_total", reason="demand", source="nvme", target="cpu")
        assert promoted == below * LAYOUT.block_bytes
        assert total(samples, "tierd_transfer_bytes_total") == written + promoted
        assert total(samples, "tierd_transfer_failed_blocks_total") == 0
        evicted = total(samples, "tierd_evicted_blocks_total", tier="cpu", kind="clean")
        assert evicted >= 8 * 50 - 4 * SLOTS
        assert total(samples, "tierd_evicted_blocks_total", kind="drop") == 0


def test_leases_and_sessions_are_counted_while_they_are_held(daemon: Daemon) -> None:
    """Gauges follow what clients hold, and come back to zero."""
    with daemon.peer() as wire, daemon.peer():
        wire.store(hashes_of(1, 10))
        reading = wire.lookup(hashes_of(1, 10))["lease"]
        writing, _ = wire.place(hashes_of(2, 10))
        samples = daemon.metrics()
        assert total(samples, "tierd_sessions") == 2
        assert total(samples, "tierd_leases", kind="reading") == total(samples, "tierd_leases", kind="writing") == 1
        assert total(samples, "tierd_slots", state="filling", tier="cpu") == 10
        wire.ask("release", lease=reading)
        wire.ask("abort", lease=writing)
        assert total(daemon.metrics(), "tierd_leases") == 0
    samples = daemon.metrics()
    assert (total(samples, "tierd_sessions"), total(samples, "tierd_sessions_opened_total")) == (0, 2)
    assert total(samples, "tierd_index_blocks") == 10


def test_a_request_is_timed_under_its_verb(daemon: Daemon) -> None:
    """The histogram counts every request that was understood, the failed ones too."""
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 10))
        for _ in range(5):
            wire.load(hashes_of(1, 10))
    samples = daemon.metrics()
    for verb, count in (("hello", 1), ("store", 1), ("commit", 1), ("lookup", 5), ("release", 5), ("bye", 1)):
        assert samples[f'tierd_request_duration_seconds_count{{verb="{verb}"}}'] == count


def test_no_counter_ever_goes_down(start: Start) -> None:
    """Over sessions that end, segments that change hands and namespaces that lose all they had."""
    daemon = start(nvme_bytes=4 * SEGMENT_BYTES)
    highest: dict[str, float] = {}
    for turn in range(6):
        with daemon.peer(model=f"model {turn % 3}") as wire:
            for seed in range(3):
                wire.store(hashes_of(10 * turn + seed, 50))
            wire.load(hashes_of(10 * turn, 50))
            daemon.ask("sync", deadline_ms=10_000)
        counters = {name: value for name, value in daemon.metrics().items() if re.search("_(total|count|sum|bucket)", name)}
        assert all(counters[name] >= value for name, value in highest.items())
        highest = counters
    assert total(highest, "tierd_segment_handovers_total") > 0


def test_what_was_recovered_is_counted(daemon: Daemon) -> None:
    """After a restart the rows found are there by what became of them."""
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 50))
    daemon.stop()
    daemon.start()
    assert total(daemon.metrics(), "tierd_recovered_rows", outcome="kept") == 50
    assert total(daemon.metrics(), "tierd_recovered_rows") == 50


def test_health_says_ready_and_the_path_to_nvme(daemon: Daemon) -> None:
    """`/livez` for the process, `/readyz` for the service: which path bytes take is never silent."""
    assert daemon.get("/livez") == (200, "alive\n")
    status, text = daemon.get("/readyz")
    assert (status, text.splitlines()[0]) == (200, "ready")
    assert re.fullmatch(r"io posix (direct|buffered)", text.splitlines()[1])
    samples = daemon.metrics()
    assert samples[f'tierd_build_info{{version="{__version__}"}}'] == 1
    assert total(samples, "tierd_io_info", engine="posix") == 1


def test_tokens_saved_are_those_of_the_blocks_that_lookups_leased(daemon: Daemon) -> None:
    """A block saves as many tokens as it has, each time that it is found."""
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 40))
        wire.load(hashes_of(1, 40))
        wire.load(hashes_of(1, 25))
        wire.load(hashes_of(2, 40))
    assert total(daemon.metrics(), "tierd_saved_prefill_tokens_total") == (40 + 25) * LAYOUT.block_tokens


def test_io_seconds_are_counted_where_bytes_are(daemon: Daemon) -> None:
    """Both have the same labels, and no thread was busy on a way where nothing moved."""
    work(daemon)
    samples = daemon.metrics()
    ways = [name.partition("{")[2] for name in samples if name.startswith("tierd_transfer_bytes_total")]
    assert len(ways) == 3
    for way in ways:
        moved, seconds = (samples[f"tierd_transfer_{what}_total{{{way}"] for what in ("bytes", "thread_seconds"))
        assert (moved > 0) == (seconds > 0), way


def test_what_an_endless_cache_would_find_is_what_was_asked_for_before(start: Start) -> None:
    """The sample has about one block in 64; a prompt that comes again is seen, though its blocks have long been evicted."""
    daemon = start(nvme_bytes=0)
    prompts = [hashes_of(seed, 640) for seed in range(1, 9)]
    with daemon.peer() as wire:
        for _ in range(2):
            for prompt in prompts:
                wire.load(prompt)
                wire.store(prompt)
    samples = daemon.metrics()
    new, seen = (total(samples, "tierd_sampled_lookup_blocks_total", outcome=outcome) for outcome in ("new", "seen"))
    sampled = sum(prompt[at] & 63 == 0 for prompt in prompts for at in range(0, len(prompt), 32))
    assert (new, seen) == (sampled, sampled) and 40 < sampled < 130
    assert total(samples, "tierd_lookup_blocks_total", tier="cpu") == 0
    assert total(samples, "tierd_reuse_gap_seconds_count") == seen
    assert total(samples, "tierd_reuse_gap_seconds_bucket", le="60.0") == seen


def test_evicted_blocks_have_an_age_and_a_lifetime_each(start: Start) -> None:
    """Both are counted for all blocks that made room."""
    daemon = start(nvme_bytes=0)
    with daemon.peer() as wire:
        for seed in range(1, 30):
            wire.store(hashes_of(seed, 100))
    samples = daemon.metrics()
    evicted = total(samples, "tierd_evicted_blocks_total", tier="cpu")
    assert evicted > 2000
    assert total(samples, "tierd_eviction_idle_seconds_count", tier="cpu") == evicted
    assert total(samples, "tierd_block_lifetime_seconds_count", tier="cpu") == evicted
    for name in ("eviction_idle", "block_lifetime"):
        counts = [value for sample, value in samples.items() if sample.startswith(f"tierd_{name}_seconds_bucket")]
        assert counts == sorted(counts), "buckets are cumulative"
        assert total(samples, f"tierd_{name}_seconds_sum") < 60 * evicted


def test_namespaces_are_told_apart_only_where_that_is_wanted(start: Start) -> None:
    """With the option each has its lookups, tokens, bytes and sessions, which sum to the daemon's own; without it none has."""
    daemon = start(metrics_per_namespace="true")
    with daemon.peer(model="a") as one, daemon.peer(model="b") as two:
        one.store(hashes_of(1, 50))
        one.load(hashes_of(1, 50))
        two.load(hashes_of(1, 30))
        samples = daemon.metrics()
    names = {model: f"{found:.16}" for model in "ab" for found in [space_id(daemon, model)]}
    for model, sessions, tokens in (("a", 1, 50 * LAYOUT.block_tokens), ("b", 1, 0)):
        assert total(samples, "tierd_namespace_info", namespace=names[model], model=model) == 1
        assert total(samples, "tierd_namespace_sessions", namespace=names[model]) == sessions
        assert total(samples, "tierd_namespace_saved_prefill_tokens_total", namespace=names[model]) == tokens
    for tier in ("cpu", "miss"):
        mine, everybodys = (total(samples, f"tierd_{name}lookup_blocks_total", tier=tier) for name in ("namespace_", ""))
        assert mine == everybodys > 0
    assert total(samples, "tierd_namespace_sessions") == total(samples, "tierd_sessions") == 2
    assert total(samples, "tierd_namespace_info") == total(samples, "tierd_namespaces") == 2
    assert total(samples, "tierd_namespace_saved_prefill_tokens_total") <= total(samples, "tierd_saved_prefill_tokens_total")
    assert total(start(name="without").metrics(), "tierd_namespace_sessions") == 0


def space_id(daemon: Daemon, model: str) -> str:
    """The id of the one namespace of a model."""
    (found,) = (space["id"] for space in daemon.status()["namespaces"] if space["model"] == model)
    return str(found)


def test_the_unix_socket_answers_as_the_port_does(daemon: Daemon) -> None:
    """Metrics and health, for who may connect to the data socket and nobody else; it goes with the daemon."""
    path = daemon.runtime / "metrics.sock"
    assert path.stat().st_mode & 0o777 == 0o660
    status, text = unix_get(path, "/metrics")
    assert status == 200
    families = re.compile(r"^# TYPE .*$", flags=re.MULTILINE)
    assert families.findall(text) == families.findall(daemon.get("/metrics")[1])
    assert unix_get(path, "/livez") == (200, "alive\n")
    daemon.stop()
    assert not path.exists()


def unix_get(path: Path, what: str) -> tuple[int, str]:
    """Status and body of an HTTP request to a Unix socket."""
    connection = HTTPConnection("tierd", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", what)
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


def test_a_scrape_of_a_busy_daemon_costs_little_and_stops_nothing(start: Start) -> None:
    """Under 5 ms of processor time while two clients work without a pause; with twenty scrapes a second they do as much as
    without, but for a third that neighbours on the machine may take.
    """
    daemon = start(metrics_per_namespace="true")
    stop, done, seconds = Event(), Counter[str](), [0.0]
    lookups, lasted = [0, 0], [0.0, 0.0]
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(look_up, daemon, seed, stop, done) for seed in (1, 2)]
        try:
            for turn in range(20):  # in turns, so that what neighbours do falls on both
                before, started, is_scraped = done.total(), monotonic_seconds(), turn % 2
                for _ in range(5):
                    if is_scraped:
                        seconds.append(daemon.metrics()["tierd_scrape_cpu_seconds_total"])
                    select.select([], [], [], 0.05)
                lookups[is_scraped] += done.total() - before
                lasted[is_scraped] += monotonic_seconds() - started
        finally:
            stop.set()
        for worker in workers:
            worker.result()
    assert len(seconds) == 51 and lookups[0] > 500
    assert median(later - sooner for sooner, later in pairwise(seconds[1:])) < 0.005
    assert lookups[1] / lasted[1] > lookups[0] / lasted[0] * 2 / 3


def look_up(daemon: Daemon, seed: int, stop: Event, done: Counter[str]) -> None:
    """Ask for the same prompt until told to stop."""
    with daemon.peer() as wire:
        wire.store(hashes_of(seed, 40))
        while not stop.is_set():
            wire.load(hashes_of(seed, 40))
            done[f"{seed}"] += 1


def test_the_document_lists_exactly_what_is_exported(start: Start) -> None:
    """docs/metrics.md has every series of `/metrics` with its type, unit, labels and meaning, and no other."""
    daemon = start(metrics_per_namespace="true")
    work(daemon, turns=3)
    text = daemon.get("/metrics")[1]
    exported = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, flags=re.MULTILINE))
    rows = re.findall(r"^\| `(tierd_\w+)` \| (\w+) \| ([^|]+) \|([^|]*)\| ([^|]+) \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert {name: kind for name, kind, *_ in rows} == exported
    assert [series.name for series in SERIES if not series.holds.endswith(".")] == [], "they do not say what always holds"
    labels = {name: set(re.findall(r"`(\w+)`", column)) for name, _, _, column, _ in rows}
    for sample in daemon.metrics():
        name, _, braces = sample.partition("{")
        name = re.sub(r"_(bucket|count|sum)$", "", name) if name not in exported else name
        assert set(re.findall(r'(\w+)="', braces)) - {"le"} <= labels[name], sample


def test_every_event_is_documented(daemon: Daemon) -> None:
    """Each name that the core counts under is explained."""
    core = Path(__file__).parents[2] / "tierd/core"
    source = "".join(path.read_text() for path in core.rglob("*.py"))
    events = set(re.findall(r'counters\["(\w+)",\]', source))
    assert events
    assert events == set(re.findall(r"^\| `(\w+)` \| [^|`]+ \|$", DOCUMENT.read_text(), flags=re.MULTILINE))


def test_promtool_finds_nothing_to_complain_about(daemon: Daemon, results: Results) -> None:
    """Prometheus' own linter passes over everything that is exported after some work."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    work(daemon, turns=4)
    text = daemon.get("/metrics")[1]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    results.quote("curl -s http://127.0.0.1:9475/metrics | promtool check metrics", done.stdout + done.stderr)
    results.note("check metrics", lines=len(text.splitlines()))


def test_status_shows_a_person_what_matters(daemon: Daemon) -> None:
    """Version, uptime, io path, tiers with slots by state, hit shares, evictions and sessions by namespace."""
    with daemon.peer(client="engine-7") as wire, daemon.peer(model="llama", client="other"):
        wire.store(hashes_of(1, 50))
        wire.load(hashes_of(1, 50))
        wire.lookup(hashes_of(2, 50))
        text = daemon.run("status").stdout
    lines = text.splitlines()
    assert re.fullmatch(rf"tierd {__version__}, pid \d+, up \d+ s, nvme by posix, (direct|buffered)", lines[0])
    assert f"http://{daemon.status()['metrics']}/metrics" in text
    assert re.search(r"^tier +used +limit +free +filling +ready +retired +quarantined$", text, flags=re.MULTILINE)
    assert re.search(r"^cpu +[\d.]+ KiB +1\.0 MiB +\d+% +\d+ +0 +50 +0 +0$", text, flags=re.MULTILINE)
    assert "lookups  100 blocks asked: cpu 50.0%, miss 50.0%" in text
    assert "evicted  nothing yet" in text
    assert re.search(r"^[0-9a-f]{16} +uid:\d+ +model +4\.0 KiB +50 +1 +engine-7 \(\d+\)$", text, flags=re.MULTILINE)
    assert re.search(r"^[0-9a-f]{16} +uid:\d+ +llama +4\.0 KiB +0 +1 +other \(\d+\)$", text, flags=re.MULTILINE)


def test_status_as_json_is_the_admin_reply(daemon: Daemon) -> None:
    """A program gets every value as it is."""
    with daemon.peer() as wire:
        wire.store(hashes_of(1, 50))
        printed = json.loads(daemon.run("status", "--json").stdout)
        reply = daemon.status()
    assert printed.keys() == reply.keys() - {"id", "ok"}
    volatile = {"uptime_seconds", "unwritten_runs", "tiers", "namespaces"}
    assert {key: printed[key] for key in printed.keys() - volatile} == {key: reply[key] for key in printed.keys() - volatile}
    assert printed["tiers"]["cpu"]["slots"]["ready"] == 50
    assert printed["namespaces"][0]["blocks"] == 50
