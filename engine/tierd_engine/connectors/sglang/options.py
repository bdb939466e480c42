"""What an operator sets under `tierd` in `--hicache-storage-backend-extra-config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tierd_engine.connectors.options import check_options

KEY = "tierd"
"""Of the extra configuration, this is ours."""


@dataclass(frozen=True)
class Options:
    """Raises ValueError for a key that does not exist or a value that it cannot have.

    `socket`: the daemon's ($TIERD_SOCKET, else that of `tierd serve`). `domain`: the trust domain, if not the default one.
    `model_id`: names the weights, for who knows better than a look at their files. `answer_seconds_max`: how long SGLang's
    storage threads wait for a daemon that does not answer, before they leave it alone for a while. `copy_threads`: threads that
    copy the pages of one call.
    """

    socket: str = ""
    domain: str = ""
    model_id: str = ""
    answer_seconds_max: float = 1.0
    copy_threads: int = 1

    @classmethod
    def read(cls, extra_config: dict[str, Any]) -> Options:
        """From the extra configuration."""
        given = extra_config.get(KEY, {})
        check_options(cls, given, KEY)
        return cls(**given)
