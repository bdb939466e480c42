"""What an operator sets in `kv_connector_extra_config`, and what a client asks for in `kv_transfer_params`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tierd.client import KEEP_PRIORITY_MAX, KEEP_SECONDS_MAX, KEEP_SECONDS_MIN
from tierd_engine.connectors.options import check_options
from tierd_engine.connectors.vllm.api import init_logger

log = init_logger(f"vllm.{__name__}")

PARAMS_KEY = "tierd"
"""Of a request's `kv_transfer_params`, this is ours."""


@dataclass(frozen=True)
class Options:
    """`kv_connector_extra_config`. Raises ValueError for a key that does not exist or a value that it cannot have.

    `socket`: the daemon's ($TIERD_SOCKET, else that of `tierd serve`). `domain`: the trust domain, if not the default one.
    `model_id`: names the weights, for who knows better than a look at their files. `load`, `save`: "async" or "sync".
    `lookup_seconds_max`: how long the scheduler waits for a daemon that does not answer, before it leaves it alone for a while.
    `transfer_seconds_max`: the same for workers' threads. `load_threads`: loads at a time. `saving_share`: pages that may be
    on their way to tierd at a time, as a share of all.
    """

    socket: str = ""
    domain: str = ""
    model_id: str = ""
    load: str = "async"
    save: str = "async"
    lookup_seconds_max: float = 0.05
    transfer_seconds_max: float = 1.0
    load_threads: int = 2
    saving_share: float = 0.25

    @classmethod
    def read(cls, given: dict[str, Any]) -> Options:
        """From the configuration."""
        check_options(cls, given, "kv_connector_extra_config")
        options = cls(**given)
        for name in ("load", "save"):
            if getattr(options, name) not in ("async", "sync"):
                raise ValueError(f'kv_connector_extra_config: {name} must be "async" or "sync", not {getattr(options, name)!r}')
        if not 1 <= options.load_threads <= 64 or not 0 < options.saving_share <= 1:
            raise ValueError("kv_connector_extra_config: load_threads is from 1 to 64, saving_share over 0 and at most 1")
        return options


@dataclass(frozen=True)
class Wishes:
    """`kv_transfer_params["tierd"]` of one request: whether to look its prefix up, whether to store its blocks, and for how
    long they are not to be evicted (`ttl_seconds`, 0: no longer than others; `priority` against others that are kept).
    """

    load: bool = True
    store: bool = True
    ttl_seconds: float = 0.0
    priority: int = 0

    @classmethod
    def read(cls, params: Any) -> Wishes:
        """From a request. What cannot be understood is not worth an error to a user: it is logged and left out."""
        given = params.get(PARAMS_KEY) if isinstance(params, dict) else None
        if given is None:
            return cls()
        if not isinstance(given, dict):
            log.warning_once("kv_transfer_params[%r] must be a map, not %s: ignored", PARAMS_KEY, type(given).__name__)
            return cls()
        known = {name: value for name, value in given.items() if name in _MAY_BE and _MAY_BE[name](value)}
        if len(known) < len(given):
            what = "load and store, true or false, ttl_seconds up to a week and priority from 0 to 100"
            log.warning_once("kv_transfer_params[%r]: only %s mean something", PARAMS_KEY, what)
        return cls(**known)


def _is_bool(value: Any) -> bool:
    return type(value) is bool


_MAY_BE: dict[str, Callable[[Any], bool]] = {
    "load": _is_bool,
    "store": _is_bool,
    "ttl_seconds": lambda value: type(value) in (int, float) and (value == 0 or KEEP_SECONDS_MIN <= value <= KEEP_SECONDS_MAX),
    "priority": lambda value: type(value) is int and 0 <= value <= KEEP_PRIORITY_MAX,
}
