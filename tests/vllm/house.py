"""vLLM's own scheduler with a worker whose KV is a function of the tokens, so that a wrong page is caught exactly.

Everything between scheduler and connector is vLLM's; only the model is not there. A position's KV is a number that follows
from all tokens up to it. Before it computes, the worker reads the KV of every position that the scheduler says is computed:
one that is another request's, was never loaded, or was overwritten meanwhile, ends the test. On emulated GPUs all of this
happens when the stream comes to it, which is as late as can be: when somebody waits for the step.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import KVEventBatch
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache

from tierd.clock import monotonic_seconds
from tierd_engine.connectors.vllm import TierdConnector

if TYPE_CHECKING:
    from tests.vllm.gpu import Gpu
    from tierd.client.pinned import Ticket

BLOCK = 32
LAYERS = ("first", "second")
WIDTH = 4
"""Numbers of a position in one layer."""
STEPS_SECONDS_MAX = 60.0


class House:
    """One engine: scheduler, workers (each with its part of every page), and the pages between them.

    layout: the order of layers, blocks, heads and tokens in memory. device: where pages are. gpus: the emulated ones that
    these pages, in main memory, are said to be on.
    """

    def __init__(
        self,
        model: Path,
        transfer: dict[str, Any],
        pages: int = 64,
        asynchronous: bool = False,
        workers: int = 1,
        events: bool = False,
        gpus: Sequence[Gpu] = (),
        layout: str = "LBHNC",
        device: str = "cpu",
        **arguments: Any,
    ) -> None:
        given = {"max_num_seqs": 8, "max_model_len": 2048, "max_num_batched_tokens": 512, **arguments}
        self.config = EngineArgs(
            str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=BLOCK,
            kv_transfer_config=transfer,
            async_scheduling=asynchronous,
            tensor_parallel_size=workers,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=events, publisher="null"),
            **given,
        ).create_engine_config()
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=WIDTH // 2, dtype=torch.float32)
        groups = [KVCacheGroupSpec(list(LAYERS), spec)]
        self.config.cache_config.kv_cache_layout = layout
        found = get_kv_cache_config_from_groups(self.config, groups, pages * len(LAYERS) * spec.page_size_bytes)
        self.kv_cache_config = replace(found, kv_cache_layout=layout, hash_block_size=BLOCK)
        self.config.cache_config.num_gpu_blocks = pages
        self._device = torch.device(device)
        self.caches = [self._make_pages() for _ in range(workers)]
        self.connectors = [
            TierdConnector(as_rank(self.config, rank), KVConnectorRole.WORKER, self.kv_cache_config) for rank in range(workers)
        ]
        for connector, caches in zip(self.connectors, self.caches, strict=True):
            connector.register_kv_caches(caches)
        assert len(gpus) in (0, workers)
        self._gpus = gpus
        for gpu, connector, caches in zip(gpus, self.connectors, self.caches, strict=False):
            connector.worker.use(gpu.pages(caches))
        self._together = KVOutputAggregator(workers)
        self.scheduler = self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.published: list[Any] = []
        """KV events in the order of their coming."""
        self.scheduler.kv_event_publisher.publish = self._publish
        hash_function = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK, hash_function)
        self._ahead = 2 if asynchronous else 1
        self._running: deque[tuple[SchedulerOutput, ModelRunnerOutput, list[Ticket]]] = deque()
        self.tokens: dict[str, list[int]] = {}
        self._pages: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        """Positions that were really computed, by request."""
        self.ended: dict[str, str] = {}
        """Why each request has ended."""
        self._wrong: dict[str, str] = {}
        self._ids = 0

    @property
    def connector(self) -> TierdConnector:
        """The first worker's."""
        return self.connectors[0]

    @property
    def side(self) -> Any:
        """The connector's side in the scheduler."""
        return self.scheduler.connector.scheduler

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 1,
        salt: str | None = None,
        lora: LoRARequest | None = None,
        image: MultiModalFeatureSpec | None = None,
        **tierd: Any,
    ) -> str:
        """A new request; returns its id. KV is a function of the tokens alone here: what else tells requests apart shows in
        what is computed.
        """
        self._ids += 1
        name = f"r{self._ids}"
        extra = {"kv_transfer_params": {"tierd": tierd}} if tierd else None
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        sampling.update_from_generation_config({}, None)
        told_apart = {"cache_salt": salt, "lora_request": lora, "mm_features": [image] if image else None}
        request = Request(name, prompt, sampling, None, **told_apart, block_hasher=self._hasher)  # type: ignore[arg-type]
        self.tokens[name], self.computed[name] = list(prompt), 0
        self.scheduler.add_request(request)
        return name

    def run(self, prompt: list[int], max_tokens: int = 1, **given: Any) -> int:
        """One request to its end; returns how many positions of it were computed."""
        name = self.add(prompt, max_tokens, **given)
        self.finish()
        assert len(self.tokens[name]) == len(prompt) + max_tokens
        assert self.tokens[name] == expected(prompt, max_tokens)
        return self.computed[name]

    def finish(self) -> None:
        """Step until there is nothing left to do, saves included."""
        deadline = monotonic_seconds() + STEPS_SECONDS_MAX
        while self.scheduler.has_requests() or self._running:
            assert monotonic_seconds() < deadline, f"requests {list(self.scheduler.requests)} do not end"
            self.step()

    def step(self, between: Callable[[], object] = lambda: None, behind: Callable[[], object] = lambda: None) -> None:
        """Schedule one step, execute it, and take the result of it or, when steps overlap, of the one before.

        `between` happens when the scheduler has decided and the worker has done nothing yet, `behind` when the worker has been
        given all of the step, and nobody has waited for anything.
        """
        output = self.scheduler.schedule()
        between()
        self._running.append((output, self._execute(output), self._tickets()))
        behind()
        while len(self._running) >= self._ahead or (self._running and not output.total_num_scheduled_tokens):
            scheduled, result, tickets = self._running.popleft()
            self._wait(tickets)
            assert not self._wrong, self._wrong
            for outputs in self.scheduler.update_from_output(scheduled, result).values():
                for each in outputs.outputs:
                    if each.finish_reason is not None:
                        self.ended[each.request_id] = str(each.finish_reason)

    def abort(self, name: str) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def check_empty(self) -> None:
        """Nothing is left of any request: no page, no run, no lease."""
        assert not self.scheduler.requests and not self.scheduler.running
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.kv_cache_config.num_blocks - 1, "pages are leaked"
        self.side.check_idle()

    def forget(self) -> None:
        """vLLM's own prefix cache is empty now, so that whatever is not computed comes from tierd."""
        assert self.scheduler.reset_prefix_cache()

    def _publish(self, batch: KVEventBatch) -> None:
        self.published += batch.events

    def close(self) -> None:
        """End both sessions."""
        self.scheduler.shutdown()
        for connector in self.connectors:
            connector.shutdown()

    # -- the worker ---------------------------------------------------------------------------------------------------

    def _make_pages(self) -> dict[str, torch.Tensor]:
        """By layer: int32 `[block, 1, token, WIDTH]`, where vLLM would have its numbers."""
        layout = KVCacheLayout[self.config.cache_config.kv_cache_layout]
        caches = allocate_kv_cache(self.kv_cache_config, self._device, layout, [BLOCK])
        return {name: cache.view(torch.int32).fill_(-1) for name, cache in caches.items()}

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self._take_pages(output)
        names, results = list(output.num_scheduled_tokens), []
        for rank, connector in enumerate(self.connectors):
            kv_transfer_state._KV_CONNECTOR_AGENT = connector
            with (
                set_forward_context(None, self.config),
                KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as said,
            ):
                for name in names:
                    self._compute(rank, name, self._at[name], output.num_scheduled_tokens[name])
            results.append(ModelRunnerOutput([], {}, kv_connector_output=said))
        said = (self._together.aggregate(results) if len(results) > 1 else results[0]).kv_connector_output
        sampled = [self._say(name, self._at[name], output.num_scheduled_tokens[name]) for name in names]
        if said.invalid_block_ids:
            self._wait(self._tickets())
        while self._wrong:  # a load within the step has failed, and vLLM throws the result away
            name, message = self._wrong.popitem()
            assert said.invalid_block_ids & set(self._pages[name]), message
            self.computed[name] -= output.num_scheduled_tokens[name]
            if sampled[names.index(name)]:
                self.tokens[name].pop()
        return ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled, kv_connector_output=said)

    def _take_pages(self, output: SchedulerOutput) -> None:
        """As vLLM's runner keeps its block tables."""
        self._at = {}
        for new in output.scheduled_new_reqs:
            self._pages[new.req_id], self._at[new.req_id] = list(new.block_ids[0]), new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, pages, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            self._at[name] = computed
            if name in cached.resumed_req_ids:
                self._pages[name] = list(pages[0])
            elif pages is not None:
                self._pages[name] += pages[0]

    def _compute(self, rank: int, name: str, first: int, count: int) -> None:
        """Read what is said to be computed, and write what is not."""
        tokens, pages = self.tokens[name], self._pages[name]
        numbers = torch.tensor(chain(tokens[: first + count]), dtype=torch.int32, device=self._device)
        assert len(numbers) == first + count, f"{name}: {first} + {count} positions of {len(tokens)} tokens"
        where = torch.tensor(pages)[torch.arange(first + count) // BLOCK], torch.arange(first + count) % BLOCK

        def kernel() -> None:
            for at, cache in enumerate(self.caches[rank].values(), rank * len(LAYERS)):
                read = cache[where[0], 0, where[1]][:first]
                wrong = (read != (numbers[:first, None] + at)).any(1).nonzero()
                if len(wrong):
                    self._wrong[name] = f"{name}: wrong KV at position {int(wrong[0])} of {first} computed ones"
                cache[where[0][first:], 0, where[1][first:]] = numbers[first:, None] + at

        self._gpus[rank].compute(kernel) if self._gpus else kernel()

    def _tickets(self) -> list[Ticket]:
        """What the workers' streams have been given until now."""
        return [gpu.ticket() for gpu in self._gpus]

    @staticmethod
    def _wait(tickets: Sequence[Ticket]) -> None:
        """Until all of it is computed."""
        for ticket in tickets:
            ticket.wait()

    def _say(self, name: str, first: int, count: int) -> list[int]:
        """The next token, where the prompt is complete."""
        tokens = self.tokens[name]
        self.computed[name] += count
        if first + count < len(tokens):
            return []
        tokens.append(spoken(chain(tokens)[-1]))
        return [tokens[-1]]


def as_rank(config: Any, rank: int) -> Any:
    """The configuration as the worker of that rank has it."""
    config, parallel = copy.copy(config), copy.copy(config.parallel_config)
    object.__setattr__(parallel, "rank", rank)
    object.__setattr__(config, "parallel_config", parallel)
    return config


def chain(tokens: list[int]) -> list[int]:
    """The number of every position: it follows from the tokens up to it."""
    numbers, number = [], 1
    for token in tokens:
        number = (number * 1_000_003 + token + 1) % 1_000_000_007
        numbers.append(number)
    return numbers


def spoken(number: int) -> int:
    """The token that follows a position."""
    return number % 500


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    """The prompt, and what is said to it."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(spoken(chain(tokens)[-1]))
    return tokens


class Flaky:
    """A client whose loads stop after some blocks and leave rubbish in the pages behind, and whose stores may stop, too.

    Everything else is the real one's.
    """

    def __init__(self, client: Any, good: int, stored: int | None = None) -> None:
        self._client, self.good, self.loads, self._stored = client, good, 0, stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def load(self, hashes: bytes, pool: Any, pages: Any, parent: bytes) -> int:
        """Some, and not the others."""
        self.loads += 1
        good = min(self.good, len(pages))
        arrived = self._client.load(hashes[: 32 * good], pool, pages[:good], parent)
        for parts in pool._parts:
            parts[torch.from_numpy(pages[good:])] = 0x0BAD_0BAD
        return int(arrived)

    def store(self, hashes: bytes, pool: Any, pages: Any, parent: bytes) -> Any:
        """As many as there is room for."""
        room = len(pages) if self._stored is None else self._stored
        return self._client.store(hashes[: 32 * room], pool, pages[:room], parent)
