"""The scheduler's side: what tierd has of a prompt, and what of a request is to be stored. It moves no bytes.

It runs on the thread that everybody waits for, so it asks the daemon at most one thing per new prompt, with a short deadline.
What a look-up found stays leased by this process until the workers have copied it: they look it up again by its hashes, since
names can be trusted across a restart of the daemon where numbers of leases could mean something else.

Pages that are on their way to tierd have one more user in vLLM's block pool until the copy has ended, so neither the end of a
request nor a preemption waits for it, and nobody overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from tierd.block import ROOT
from tierd_engine.connectors.vllm.api import CacheHitSource, block_ids
from tierd_engine.connectors.vllm.events import KVEvents
from tierd_engine.connectors.vllm.messages import Done, Run, Work
from tierd_engine.connectors.vllm.options import Wishes
from tierd_engine.connectors.vllm.shards import Found, Shards
from tierd_engine.connectors.vllm.stats import TierdStats

AGAIN_SECONDS = 1.0
"""When tierd did not take a request's blocks, they are offered again with its next full block, but no sooner."""


@dataclass
class Tracked:
    """A request. `stored` blocks of it are in tierd or on their way; `offered` were found behind the `local` ones."""

    request: Any
    wishes: Wishes
    stored: int = 0
    again: float = 0.0
    found: Found | None = None
    local: int = 0
    offered: int = 0
    in_memory: int = 0
    loading: bool = False
    lost: bool = False
    """A load has failed: nothing is offered any more, or vLLM would ask and we would fail for ever."""


@dataclass
class Saving:
    """A run on its way to tierd, the pages that it is copied from, and how many blocks are before it."""

    request: Any
    first: int
    pages: list[Any]


@dataclass
class Keeping:
    """A request that has ended, whose first `stored` blocks are to be kept once its saves, so many, have ended."""

    request: Any
    wishes: Wishes
    stored: int
    saves: int


@dataclass
class SchedulerSide:
    """Used by the scheduler's thread only. `pages` is vLLM's pool of blocks, bound after construction."""

    shards: Shards
    block_tokens: int
    asynchronous: bool
    loads: bool
    saves: bool
    saving_max: int
    events: KVEvents | None = None
    pages: Any = None
    stats: TierdStats = field(default_factory=TierdStats)
    _requests: dict[str, Tracked] = field(default_factory=dict)
    _loading: dict[int, tuple[Tracked, int]] = field(default_factory=dict)
    _heard: Done = field(default_factory=Done)
    """What some workers have said, and others not yet."""
    _saving: dict[int, Saving] = field(default_factory=dict)
    _saving_pages: int = 0
    _keeping: dict[int, Keeping] = field(default_factory=dict)
    """By the `id` of their requests, which they hold: names of requests may come again."""
    _work: Work = field(default_factory=Work)
    _numbers: int = 0
    _failures: int = 0

    # -- loads --------------------------------------------------------------------------------------------------------

    def match(self, request: Any, computed_tokens: int) -> int:
        """How many tokens tierd has behind those that vLLM has itself; at least one is left to compute, as in vLLM's cache."""
        tracked = self._track(request)
        if not self.loads or not tracked.wishes.load or tracked.lost or request.skip_reading_prefix_cache:
            return 0
        most = (request.num_tokens - 1) // self.block_tokens
        tracked.local = computed_tokens // self.block_tokens
        if tracked.found is None and tracked.local < most:
            self._look_up(tracked, request.block_hashes[:most])
        found = tracked.found.blocks if tracked.found else 0
        tracked.offered = max(0, min(found, most) - tracked.local)
        if not tracked.offered:
            self._let_go(tracked)
        return tracked.offered * self.block_tokens

    def allocated(self, request: Any, blocks: Any, tokens: int) -> None:
        """vLLM has pages for `tokens` of what was offered, or does without."""
        tracked = self._track(request)
        count = tokens // self.block_tokens
        if count:
            first = tracked.local
            assert tracked.found is not None and count <= tracked.offered, f"{count} blocks of {tracked.offered} offered"
            run = self._run(request, first, first + count, blocks.get_block_ids()[0])
            tracked.loading = True
            self._loading[run.number] = tracked, count
            self._work.loads.append(run)
        elif not tracked.loading:
            self._let_go(tracked)

    def sources(self, request: Any, tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens of a hit come from."""
        tracked = self._requests[request.request_id]
        in_memory = min(tokens, max(0, tracked.in_memory - tracked.local) * self.block_tokens)
        both = {CacheHitSource.HOST: in_memory, CacheHitSource.DISK: tokens - in_memory}
        return {source: count for source, count in both.items() if count}

    # -- saves --------------------------------------------------------------------------------------------------------

    def plan(self, scheduler_output: Any) -> Work:
        """This step's loads, and the saves of blocks that are full when it has run."""
        if self.saves:
            for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
                tracked = self._requests.get(request_id)
                if tracked is not None:
                    full = (tracked.request.num_computed_tokens + tokens) // self.block_tokens
                    if full > tracked.stored:
                        self._save(tracked, full, lambda: block_ids(scheduler_output, request_id))  # noqa: B023
        work, self._work = self._work, Work()
        work.failures = self._failures
        return work

    def finished(self, request: Any, pages: Sequence[int]) -> None:
        """A request has ended: what is full and not stored yet goes with the next step, after the computation under way."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return
        full = request.num_computed_tokens // self.block_tokens
        if not tracked.loading:
            self._let_go(tracked)
            if self.saves:
                self._save(tracked, full, lambda: pages)
        if tracked.wishes.ttl_seconds:
            saves = sum(saving.request is request for saving in self._saving.values())
            self._keep(Keeping(request, tracked.wishes, tracked.stored, saves))

    @property
    def busy(self) -> bool:
        """Whether steps are needed although no request is there: to send saves, and to hear that they have ended."""
        return bool(self._saving)

    # -- what the workers say -----------------------------------------------------------------------------------------

    def done(self, done: Done) -> None:
        """Runs have ended, at some workers or at all; a run has ended when it has at all."""
        workers = len(self.shards.clients)
        self._heard = self._heard.aggregate(done)
        for number in [number for number, (_, said) in self._heard.loads.items() if said == workers]:
            arrived, _ = self._heard.loads.pop(number)
            tracked, count = self._loading.pop(number)
            tracked.loading = False
            self._let_go(tracked)
            if self.events:
                self.events.ended(number, tracked.request, tracked.local, arrived)
            if arrived < count:
                self._failures += 1
                tracked.lost = True
                tracked.stored = min(tracked.stored, tracked.local + arrived)
        for number in [number for number, (_, said) in self._heard.saves.items() if said == workers]:
            kept, _ = self._heard.saves.pop(number)
            saving = self._saving.pop(number)
            self._saving_pages -= len(saving.pages)
            self.pages.free_blocks(reversed(saving.pages))
            if self.events:
                self.events.ended(number, saving.request, saving.first, kept)
            whole = kept == len(saving.pages)
            if keeping := self._keeping.pop(id(saving.request), None):
                if not whole:
                    keeping.stored = min(keeping.stored, saving.first + kept)
                keeping.saves -= 1
                self._keep(keeping)
            owner = self._requests.get(saving.request.request_id)
            if owner is not None and owner.request is saving.request and not whole:
                owner.stored = min(owner.stored, saving.first + kept)
                owner.again = monotonic() + AGAIN_SECONDS

    def close(self) -> None:
        """Give back every lease."""
        for tracked in [*self._requests.values(), *(tracked for tracked, _ in self._loading.values())]:
            self._let_go(tracked)
        self.shards.close()

    def check_idle(self) -> None:
        """Raise AssertionError if anything is held although all requests have ended."""
        assert not self._requests, f"requests {list(self._requests)} are still known"
        assert not self._loading and not self._saving and not self._saving_pages, "runs have not ended"
        assert not self._keeping, "what is to be kept waits for saves that have ended"

    def _track(self, request: Any) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = Tracked(request, Wishes.read(request.kv_transfer_params))
        return tracked

    def _look_up(self, tracked: Tracked, hashes: Sequence[bytes]) -> None:
        """Lease what tierd has of the whole chain: the head, too, since what is there need not be stored."""
        began = perf_counter()
        found = self.shards.lookup(b"".join(hashes))
        self.stats.count("lookups")
        self.stats.count("lookup_seconds", perf_counter() - began)
        self.stats.count("lookup_blocks", found.blocks, "hit")
        self.stats.count("lookup_blocks", len(hashes) - found.blocks, "miss")
        tracked.found, tracked.in_memory = found, found.told
        tracked.stored = max(tracked.stored, found.blocks)

    def _let_go(self, tracked: Tracked) -> None:
        if tracked.found is not None:
            tracked.found.release()
            tracked.found = None

    def _save(self, tracked: Tracked, full: int, pages_of: Any) -> None:
        """Put blocks up to `full` on their way, as far as they have hashes and there is room among pages under way."""
        request, first = tracked.request, tracked.stored
        full = min(full, len(request.block_hashes))
        if full <= first or not tracked.wishes.store or (tracked.again and monotonic() < tracked.again):
            return
        full_now = min(full, first + self.saving_max - self._saving_pages)
        self.stats.count("save_blocks", full - max(full_now, first), "skipped")
        if full_now <= first:
            return
        run = self._run(request, first, full_now, pages_of())
        pages = [self.pages.blocks[page] for page in run.pages.tolist()]
        self.pages.touch(pages)
        self._saving[run.number] = Saving(request, first, pages)
        self._saving_pages += len(pages)
        tracked.stored = full_now
        self._work.saves.append(run)

    def _keep(self, keeping: Keeping) -> None:
        """Have what a request has in tierd kept, or do so when the last of its saves has ended."""
        if keeping.saves:
            self._keeping[id(keeping.request)] = keeping
        elif keeping.stored:
            last = bytes(keeping.request.block_hashes[keeping.stored - 1])
            self.shards.keep(last, keeping.wishes.ttl_seconds, keeping.wishes.priority)

    def _run(self, request: Any, first: int, last: int, pages: Sequence[int]) -> Run:
        self._numbers += 1
        hashes = request.block_hashes
        if self.events:
            self.events.begins(self._numbers, hashes[first:last])
        return Run(
            self._numbers,
            request.request_id,
            bytes(hashes[first - 1]) if first else ROOT,
            b"".join(hashes[first:last]),
            np.array(pages[first:last], np.int64),
        )
