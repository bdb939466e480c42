"""A client by hand, straight from `docs/protocol.md`: it can stop at any step, hold on to slots and be late."""

from __future__ import annotations

import array
import mmap
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.faults.house import LAYOUT
from tierd.block import ROOT
from tierd.errors import Closed
from tierd.layout import Layout
from tierd.wire.framing import FrameReader, decode, encode
from tierd.wire.messages import PROTOCOL_VERSION, error_of, pack_held, unpack_slots

SECONDS_MAX = 40.0


class RawClient:
    """One connection and, after `hello`, one session. Every error of the daemon is raised as it is."""

    def __init__(self, path: Path, model: str = "faults", layout: Layout = LAYOUT) -> None:
        self.path, self.model, self.layout = path, model, layout
        self.segments: dict[int, bytes] = {}
        """Segment ids by ordinal."""
        self.slots: dict[int, NDArray[np.uint8]] = {}
        """By ordinal: uint8 [slots, slot_bytes], shared with everybody."""
        self.pushed: list[dict[str, Any]] = []
        self.connect()

    def connect(self) -> None:
        """Open a new connection; mappings stay."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(SECONDS_MAX)
        self.socket.connect(str(self.path))
        self._reader = FrameReader(64 << 20)
        self._frames: list[dict[str, Any]] = []
        self._descriptors: list[int] = []
        self._last_id = 0

    def hello(self) -> dict[str, Any]:
        """Open a session."""
        self.welcome = self.ask("hello", version=PROTOCOL_VERSION, client="by hand", **self._identity())
        return self.welcome

    def resume(self, held: list[tuple[bytes, int, int]]) -> int:
        """Go on with the session on this connection; returns the lease on what is held."""
        old = {name: self.welcome[name] for name in ("session", "token", "namespace")}
        reply = self.ask("resume", version=PROTOCOL_VERSION, held=pack_held(held), client="by hand", **old, **self._identity())
        return int(reply["lease"])

    def lookup(self, hashes: bytes, parent: bytes = ROOT) -> tuple[int, int, list[int]]:
        """Lease a prefix: (lease, blocks, slots told)."""
        reply = self.ask("lookup", hashes=hashes, parent=parent)
        return reply["lease"], reply["blocks"], self.numbers(reply["slots"])

    def store(self, hashes: bytes, parent: bytes = ROOT) -> tuple[int, list[int]]:
        """Lease slots to write: (lease, slots or codes)."""
        reply = self.ask("store", hashes=hashes, parent=parent)
        return reply["lease"], self.numbers(reply["slots"])

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One request and its reply; raises what the daemon answers, and Closed when it is gone."""
        self._last_id += 1
        self.send({"id": self._last_id, "verb": verb, **arguments})
        while (reply := self.receive()).get("id") != self._last_id:
            if reply.get("ok") is False:
                raise error_of(reply)
        if not reply["ok"]:
            raise error_of(reply)
        return reply

    def send(self, message: dict[str, Any]) -> None:
        """One request, without waiting."""
        try:
            self.socket.sendall(encode(message))
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self) -> dict[str, Any]:
        """The next frame; attaches are obeyed on the way."""
        while not self._frames:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4 * 253))
            except OSError as error:
                raise Closed(str(error)) from error
            if not data:
                raise Closed("the daemon closed the connection")
            for _, _, rights in ancillary:
                self._descriptors += array.array("i", rights).tolist()
            while data:
                room = self._reader.buffer()
                part, data = data[: len(room)], data[len(room) :]
                room[: len(part)] = part
                self._reader.feed(len(part))
                self._frames += [decode(frame) for frame in self._reader]
        message = self._frames.pop(0)
        if message.get("push") == "attach":
            for entry in message["segments"]:
                self._attach(entry)
        elif "push" in message:
            self.pushed.append(message)
        return message

    @staticmethod
    def numbers(packed: bytes) -> list[int]:
        """Slot numbers of a reply."""
        return [int(number) for number in unpack_slots(packed)]

    def slot(self, number: int) -> NDArray[np.uint8]:
        """The payload bytes of a slot, as everybody sees them."""
        ordinal, index = divmod(number, self.welcome["slots_per_segment"])
        return self.slots[ordinal][index][: self.layout.block_bytes]

    def held(self, numbers: list[int], kind: int) -> list[tuple[bytes, int, int]]:
        """What `resume` says about slots that are still being copied."""
        pairs = [divmod(number, self.welcome["slots_per_segment"]) for number in numbers]
        return [(self.segments[ordinal], index, kind) for ordinal, index in pairs]

    def close(self) -> None:
        """Lose the connection, without a word."""
        self.socket.close()

    def _identity(self) -> dict[str, Any]:
        return {"model": self.model, "layout": self.layout.to_map(), "fingerprint": self.layout.fingerprint}

    def _attach(self, entry: dict[str, Any]) -> None:
        directory, slots = self._descriptors.pop(0), self._descriptors.pop(0)
        os.close(directory)
        if self.segments.get(entry["ordinal"]) != entry["segment"]:
            memory = np.frombuffer(mmap.mmap(slots, entry["slots_bytes"]), np.uint8)
            self.slots[entry["ordinal"]] = memory[: entry["slots"] * entry["slot_bytes"]].reshape(entry["slots"], -1)
            self.segments[entry["ordinal"]] = entry["segment"]
        os.close(slots)
