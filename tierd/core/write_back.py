"""What still has to go to NVMe: runs of committed blocks, oldest first, head first.

A block may enter NVMe only when its parent is there, so that the tier can survive alone: a run whose parent is being
written waits for that transfer, and a run whose parents were never written takes them along, if they are still in memory.
"""

from __future__ import annotations

from collections import deque

from tierd.block import HASH_BYTES

Run = tuple[bytes, bytes]
"""(parent, packed hashes)"""


class WriteBack:
    """Queue of runs, and the hashes that are being written right now."""

    def __init__(self) -> None:
        self.queue: deque[Run] = deque()
        self.blocks = 0
        self.writing: dict[bytes, int] = {}
        """Block hash -> id of the transfer that writes it."""

    def push(self, parent: bytes, hashes: bytes) -> None:
        """Queue a run at the end."""
        self.queue.append((parent, hashes))
        self.blocks += len(hashes) // HASH_BYTES

    def unpop(self, parent: bytes, hashes: bytes) -> None:
        """Put a run back to the front."""
        self.queue.appendleft((parent, hashes))
        self.blocks += len(hashes) // HASH_BYTES

    def pop(self) -> Run | None:
        """Take the oldest run."""
        if not self.queue:
            return None
        parent, hashes = self.queue.popleft()
        self.blocks -= len(hashes) // HASH_BYTES
        return parent, hashes

    def begin(self, transfer: int, hashes: list[bytes]) -> None:
        """Note what a transfer writes."""
        self.writing.update(dict.fromkeys(hashes, transfer))

    def end(self, hashes: list[bytes]) -> None:
        """Forget what a transfer wrote."""
        for block in hashes:
            self.writing.pop(block, None)
