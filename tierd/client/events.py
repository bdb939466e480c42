"""The event channel: gives segments back when the daemon asks, hears what is gone, and notices its end while nobody calls."""

from __future__ import annotations

from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from tierd.client.connection import Connection
from tierd.errors import TierdError

if TYPE_CHECKING:
    from tierd.client.session import Session

LISTEN_SECONDS = 60.0
PAUSE_SECONDS = 0.2


class Events(Thread):
    """A thread with a connection of its own, through which an idle client too resumes and gives back."""

    def __init__(self, session: Session) -> None:
        super().__init__(name="tierd-events", daemon=True)
        self._session = session
        self._stopping = Event()
        self._lock = Lock()
        self._channel: Connection | None = None

    def run(self) -> None:
        """Keep session and channel alive until `stop`, whatever is lacking for a while: descriptors, memory, the daemon."""
        while not self._stopping.is_set():
            with suppress(TierdError, OSError):
                self._session.connection()
                self._serve()
            with suppress(TierdError, OSError):
                self._session.look()
            self._stopping.wait(max(PAUSE_SECONDS, self._session.absence.pause_seconds_left()))

    def reconnect(self) -> None:
        """The session has a new connection: the old channel is of no use."""
        with self._lock:
            if self._channel is not None:
                self._channel.close("the session was resumed")

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self.reconnect()
        self.join()

    def _serve(self) -> None:
        connects = self._session.connects
        channel = self._session.open_events()
        with self._lock:
            self._channel = channel
            if connects != self._session.connects:
                channel.close("the session was resumed")
        self._session.look()  # the next life has answered, perhaps, and the last one's sockets do not all end at once
        while not self._stopping.is_set():
            channel.listen(LISTEN_SECONDS)
        channel.close()
