"""tierd for vLLM: `--kv-transfer-config` with this module, `TierdConnector`, and `kv_load_failure_policy: recompute`.

vLLM makes one connector for its scheduler and one for each worker; each is one of the two sides here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tierd.client import Client
from tierd_engine.connectors.vllm import api, namespace
from tierd_engine.connectors.vllm.events import KVEvents
from tierd_engine.connectors.vllm.messages import Done, Work
from tierd_engine.connectors.vllm.options import Options
from tierd_engine.connectors.vllm.pages import pages_of
from tierd_engine.connectors.vllm.scheduler import SchedulerSide
from tierd_engine.connectors.vllm.shards import Shards
from tierd_engine.connectors.vllm.stats import TierdMetrics, TierdStats
from tierd_engine.connectors.vllm.worker import WorkerSide

__all__ = ["TierdConnector"]

log = api.init_logger(f"vllm.{__name__}")


class TierdConnector(api.KVConnectorBase_V1, api.SupportsHMA):
    """vLLM's KV connector, version 1. Raises ValueError for a configuration that it cannot serve, with the remedy."""

    def __init__(self, vllm_config: api.VllmConfig, role: api.KVConnectorRole, kv_cache_config: api.KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if api.VERSION not in api.TESTED:
            log.warning("TierdConnector was tested with vLLM %s, this is %s", ", ".join(api.TESTED), api.VERSION)
        transfer = self._kv_transfer_config
        self._options = options = Options.read(transfer.kv_connector_extra_config)
        namespace.check_supported(vllm_config, kv_cache_config, options.load)
        self._layout = namespace.layout_of(kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        parallel = vllm_config.parallel_config
        if role == api.KVConnectorRole.SCHEDULER:
            wants_events, seconds = api.publishes_events(vllm_config), options.lookup_seconds_max
            ranks = range(parallel.world_size)
            shards = Shards([self._client(rank, "scheduler", seconds, removals=wants_events) for rank in ranks])
            self._scheduler = SchedulerSide(
                shards,
                self._layout.block_tokens,
                events=KVEvents(shards, self._layout.block_tokens) if wants_events else None,
                asynchronous=options.load == "async",
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer,
                saving_max=max(1, int(kv_cache_config.num_blocks * options.saving_share)),
            )
            log.info("%r, blocks of %d bytes", self._scheduler.shards, self._layout.block_bytes * parallel.world_size)
        else:
            self._worker = WorkerSide(self._client(parallel.rank, "worker", options.transfer_seconds_max), options)
            log.info("%r, worker %d, blocks of %d bytes", self._worker.client.session, parallel.rank, self._layout.block_bytes)

    def _client(self, rank: int, name: str, deadline_seconds: float, removals: bool = False) -> Client:
        """A session for what the worker of that rank has of every block."""
        return Client(
            self._options.socket or None,
            model=namespace.model_name(self._vllm_config, self._kv_cache_config, self._options.model_id, rank),
            layout=self._layout,
            domain=self._options.domain or None,
            deadline_seconds=deadline_seconds,
            name=f"vllm-{name}",
            removals=removals,
        )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: api.VllmConfig) -> str | None:
        """On a GPU all layers of a block in one run, which is one copy of a copy engine; a wish: others are copied, too."""
        return "BLHNC" if api.on_gpu() else None

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not saved is a miss later."""
        return False

    # -- the scheduler's side -----------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> SchedulerSide:
        """Where this connector is the scheduler's."""
        assert self._scheduler is not None
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's pages, whose users are counted there."""
        self.scheduler.pages = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to be had from tierd behind those computed, and whether they come between steps."""
        tokens = self.scheduler.match(request, num_computed_tokens)
        return tokens, bool(tokens) and self.scheduler.asynchronous

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Pages are there for what was matched."""
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[api.CacheHitSource, int]:
        """Memory or disk."""
        return self.scheduler.sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Work:
        """What the workers do with this step."""
        return self.scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers did."""
        if connector_output.kv_connector_worker_meta is not None:
            self.scheduler.done(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Never keeps a request's pages: those that are being saved have a user of their own."""
        self.scheduler.finished(request, block_ids)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """The same, of the one group that there is."""
        return self.request_finished(request, block_ids[0])

    def take_events(self) -> list[api.KVCacheEvent]:
        """What came to tierd and what left it since the last call, where vLLM publishes KV events."""
        return self.scheduler.events.take() if self.scheduler.events else []

    def has_pending_push_work(self) -> bool:
        """Whether steps are needed for saves alone."""
        return self.scheduler.busy

    def reset_cache(self) -> bool:
        """vLLM asks for this when weights have changed, and tierd cannot tell old blocks from new ones: it says no."""
        log.error("tierd keeps its blocks: after a change of weights restart the engine with another model_id")
        return False

    # -- the workers' side --------------------------------------------------------------------------------------------

    @property
    def worker(self) -> WorkerSide:
        """Where this connector is a worker's."""
        assert self._worker is not None
        return self._worker

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """vLLM's pages."""
        config = self._kv_cache_config
        [group] = config.kv_cache_groups
        page_bytes = self._layout.block_bytes // self._layout.layers
        self.worker.use(pages_of(kv_caches, group.layer_names, config.num_blocks, page_bytes))
        log.info("%r", self.worker.pool)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin loads; synchronous ones are done when this returns."""
        self.worker.load(self._work())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        """The step has been computed: begin saves; synchronous ones are done when this returns."""
        self.worker.save(self._work())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended, well or not. What else there is to tell about them is told in the same step."""
        return None, self.worker.take().loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not filled."""
        return self.worker.outcome.bad_pages

    def build_connector_worker_meta(self) -> Done | None:
        """Runs that have ended."""
        done = self.worker.outcome.done
        return done if done.loads or done.saves else None

    def _work(self) -> Work:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        return work

    # -- both ---------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> TierdStats | None:
        """What was counted since the last call."""
        if self._worker is not None:
            stats = self._worker.outcome.stats
        else:
            stats, self.scheduler.stats = self.scheduler.stats, TierdStats()
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """End the session with the daemon."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TierdStats:
        """Stats from what crossed a process."""
        return TierdStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> TierdMetrics:
        """The series on `/metrics`."""
        return TierdMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
