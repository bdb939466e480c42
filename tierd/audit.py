"""The audit log: what operators asked for and what peers were denied, a line each under the logger `audit`.

Every line has `uid` and `pid` of the peer, as the kernel says, and an `outcome`: "done", the code of the error, "late" when
nobody waited for the answer any more, or "denied". What only reads is logged at `debug`: dashboards ask for it every second.
"""

from __future__ import annotations

from typing import Any

from tierd.errors import TierdError
from tierd.log import get_logger
from tierd.wire.messages import Answering, Reply, Request, only_reads
from tierd.wire.peer import Peer

log = get_logger("audit")


def asked(peer: Peer, request: Request, outcome: str, **found: Any) -> None:
    """An operator's request has ended; its arguments are fields, and so is what came of it."""
    write = log.debug if only_reads(request) else log.info
    fields = {name: value for name, value in request.items() if value is not None} | found
    write("admin", verb=request.verb, uid=peer.uid, pid=peer.pid, outcome=outcome, **fields)


async def followed(peer: Peer, request: Request, answering: Answering) -> Reply:
    """The answer to an operator's request that takes a while, noted when it is there."""
    outcome, reason = "late", {}
    try:
        reply = await answering()
        outcome = "done"
        return reply
    except TierdError as error:
        outcome, reason = error.code, {"reason": str(error)}
        raise
    finally:
        asked(peer, request, outcome, **reason)


def denied(peer: Peer, reason: object) -> None:
    """A peer asked for what its user may not have."""
    log.warning("denied", uid=peer.uid, pid=peer.pid, outcome="denied", reason=reason)
