"""What an engine calls. Misuse raises Invalid; everything else that goes wrong is a miss, counted in `statistics`."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.client.connection import NoAnswer
from tierd.client.lookup import Lookup
from tierd.client.session import Session
from tierd.client.store import Stored, Storing
from tierd.client.transfer import Copier, as_pages, as_rows
from tierd.errors import Invalid, TierdError
from tierd.layout import Layout
from tierd.wire.messages import PROTOCOL_VERSION

COPY_THREADS_MAX = 64
log = logging.getLogger("tierd.client")


class Client:
    """Loads and stores blocks of one model and layout. Threads may share it; a forked child needs one of its own.

    Connects when first used and again whenever it must; until then every call is a miss at once. `deadline_seconds`
    bounds each wait for the daemon; the time to copy is on top. `copy_threads` copy the blocks of one call. `name` is
    what the daemon calls this client.
    """

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        model: str,
        layout: Layout,
        domain: str | None = None,
        deadline_seconds: float = 1.0,
        copy_threads: int = 1,
        name: str = "",
    ) -> None:
        if not 0 < deadline_seconds <= 600:
            raise Invalid(f"deadline_seconds must be over 0 and at most 600, not {deadline_seconds}")
        if not 1 <= copy_threads <= COPY_THREADS_MAX:
            raise Invalid(f"copy_threads must be from 1 to {COPY_THREADS_MAX}, not {copy_threads}")
        self.layout = layout
        self.deadline_seconds = deadline_seconds
        hello = {
            "version": PROTOCOL_VERSION,
            "model": model,
            "layout": layout.to_map(),
            "fingerprint": layout.fingerprint,
            "client": name,
            **({"domain": domain} if domain else {}),
        }
        self.session = Session(Path(socket) if socket else default_socket(), hello, layout, deadline_seconds)
        self.copier = Copier(layout.block_bytes, copy_threads)
        self._pid = os.getpid()
        self._lock = Lock()
        self._counters: Counter[str] = Counter()
        self._tiers: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._logged: set[str] = set()

    def __repr__(self) -> str:
        return f"<Client of {self.session.path}: {self.statistics}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, hashes: bytes, pool: NDArray[np.generic], pages: ArrayLike, parent: bytes = ROOT) -> int:
        """Copy the longest prefix that tierd has into `pool[pages[i]]`; returns its length in blocks, 0 for a miss.

        hashes: 32 bytes a block, head first, behind `parent`. pool: C-contiguous `[pages, ...]` with one block a page.
        pages: one page number a block. Pages behind the prefix may have been written to.
        """
        self.check_process()
        blocks = check_hashes(hashes, parent)
        rows = as_rows(pool, self.layout.block_bytes, writable=True)
        targets = as_pages(pages, rows)
        check_length(blocks, len(targets))
        done = 0
        while done < blocks:
            asked = min(blocks - done, self.session.blocks_max)
            with self._lookup(hashes[done * HASH_BYTES : (done + asked) * HASH_BYTES], parent) as found:
                copied = found.copy_into(rows, targets[done : done + found.blocks])
            done += copied
            if copied < asked:
                break
            parent = hashes[(done - 1) * HASH_BYTES : done * HASH_BYTES]
        return done

    def store(self, hashes: bytes, pool: NDArray[np.generic], pages: ArrayLike, parent: bytes = ROOT) -> Stored:
        """Copy `pool[pages[i]]` into tierd where it does not have the block already; arguments as for `load`.

        Returns counts that sum to the blocks asked. Returns once what was written can be found by others.
        """
        self.check_process()
        blocks = check_hashes(hashes, parent)
        rows = as_rows(pool, self.layout.block_bytes, writable=False)
        sources = as_pages(pages, rows)
        check_length(blocks, len(sources))
        if not blocks:
            return Stored()
        self.count(requests=1)
        stored = Stored(refused=blocks)
        with self.missing("store"):
            connection = self.session.connection()
            stored = Storing(self, hashes, parent, rows, sources).run(connection)
        return stored

    def lookup(self, hashes: bytes, parent: bytes = ROOT) -> Lookup:
        """Lease the longest prefix that tierd has (of as many blocks as a request may name); release it when done."""
        self.check_process()
        check_hashes(hashes, parent)
        return self._lookup(hashes, parent)

    def prefetch(self, hashes: bytes, parent: bytes = ROOT) -> int:
        """Ask for the head of a prefix to be brought to memory; returns how many blocks are or will be there."""
        self.check_process()
        if not check_hashes(hashes, parent):
            return 0
        self.count(requests=1)
        blocks = 0
        with self.missing("prefetch"):
            connection = self.session.connection()
            arguments = {"hashes": hashes[: self.session.blocks_max * HASH_BYTES], "parent": parent}
            reply = connection.request("prefetch", arguments, self.deadline_seconds)
            self.session.answered()
            blocks = int(reply["blocks"])
        return blocks

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts since the start, among them `failures` by kind and `tiers`: blocks looked up by where they were."""
        with self._lock:
            names = ("requests", "blocks_loaded", "bytes_loaded", "blocks_stored", "bytes_stored", "blocks_changed")
            return {
                **{name: self._counters[name] for name in names},
                "reconnects": max(0, self.session.connects - 1),
                "failures": dict(self._failures),
                "tiers": dict(self._tiers),
            }

    def close(self) -> None:
        """Give everything back and disconnect; copies of other threads are waited for, at most the deadline."""
        if os.getpid() != self._pid:
            return  # the parent's connection, mappings and threads are none of this child's business
        self.session.close()
        self.copier.close()

    def _lookup(self, hashes: bytes, parent: bytes) -> Lookup:
        asked = min(len(hashes) // HASH_BYTES, self.session.blocks_max)
        found = Lookup(self, asked)
        if not asked:
            return found
        self.count(requests=1)
        with self.missing("lookup"):
            connection = self.session.connection()
            arguments = {"hashes": hashes[: asked * HASH_BYTES], "parent": parent}
            reply = connection.request("lookup", arguments, self.deadline_seconds, undo="release")
            self.session.answered()
            found = Lookup(self, asked, connection, reply)
        with self._lock:
            self._tiers.update(found.tiers)
        return found

    # What its parts share.

    def check_process(self) -> None:
        """Raise Invalid in a forked child: socket and mappings are its parent's."""
        if os.getpid() != self._pid:
            raise Invalid(f"this client belongs to process {self._pid}: make a new Client in process {os.getpid()}")

    def count(self, **amounts: int) -> None:
        """Add to the statistics."""
        with self._lock:
            self._counters.update(amounts)

    @contextmanager
    def missing(self, verb: str) -> Iterator[None]:
        """Turn every failure inside into a miss."""
        try:
            yield
        except Exception as error:
            self.failed(verb, error)

    def failed(self, verb: str, error: Exception) -> None:
        """Count a failure by kind; say once what an operator can do something about."""
        kind = error.code if isinstance(error, TierdError) else "internal"
        if isinstance(error, NoAnswer):
            kind = "late"
            self.session.failed()
        with self._lock:
            self._failures[kind] += 1
            first = kind not in self._logged
            self._logged.add(kind)
        if first and kind in ("invalid", "internal"):
            log.warning("tierd %s failed and counts as a miss: %s", verb, error, exc_info=kind == "internal")


def default_socket() -> Path:
    """Where the daemon of this user, or for root the system's, listens; $TIERD_SOCKET overrides it."""
    if given := os.environ.get("TIERD_SOCKET"):
        return Path(given)
    if os.getuid() == 0:
        return Path("/run/tierd/tierd.sock")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "tierd/tierd.sock")
    return Path(f"/tmp/tierd-{os.getuid()}/tierd.sock")


def check_hashes(hashes: bytes, parent: bytes) -> int:
    """The number of blocks in `hashes`; raises Invalid when it or `parent` cannot be what it should."""
    if not isinstance(hashes, bytes) or len(hashes) % HASH_BYTES:
        what = f"{len(hashes)} bytes" if isinstance(hashes, bytes) else type(hashes).__name__
        raise Invalid(f"hashes must be bytes in multiples of {HASH_BYTES}, not {what}")
    if not isinstance(parent, bytes) or len(parent) != HASH_BYTES:
        raise Invalid(f"parent must be {HASH_BYTES} bytes (ROOT for the start of a chain), not {parent!r:.80}")
    return len(hashes) // HASH_BYTES


def check_length(blocks: int, pages: int) -> None:
    if blocks != pages:
        raise Invalid(f"{blocks} hashes and {pages} pages: one page a block")
