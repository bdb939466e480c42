"""The four ways a request ends badly. There is one class per thing a caller does differently."""

from __future__ import annotations


class TierdError(Exception):
    """Base of all errors that tierd raises on purpose. `code` is its name on the wire."""

    code = "error"


class Invalid(TierdError):
    """Fix the request; nothing was done."""

    code = "invalid"


class Denied(Invalid):
    """The request is not for this peer's user. A client does the same as for Invalid; the daemon's audit log has it."""


class Busy(TierdError):
    """Go on without tierd for this request; later may work."""

    code = "busy"


class Gone(TierdError):
    """What was named is not here (any more): a miss."""

    code = "gone"


class Closed(TierdError):
    """The daemon is stopping or away: run without it."""

    code = "closed"


ERRORS: dict[str, type[TierdError]] = {cls.code: cls for cls in (Invalid, Busy, Gone, Closed)}
