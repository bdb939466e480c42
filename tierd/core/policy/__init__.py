"""Orders of eviction, one file each, and what the index and the room ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class Policy:
    """The nodes of one tier, in the order in which their blocks are to go.

    A node is entered while any block of it is in the tier. In every order it comes before its ancestors, so that what goes
    first has nothing below it in the tier. Nodes are seen through `hashes`, `parent`, `children` and `last_use`.
    """

    def __contains__(self, node: Any) -> bool:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def add(self, node: Any) -> None:
        """Enter a node as the most recently used."""
        raise NotImplementedError

    def touch(self, nodes: Sequence[Any]) -> None:
        """Make nodes the most recently used, the last one most; those that are not entered are left out."""
        raise NotImplementedError

    def remove(self, node: Any) -> None:
        """Take a node out."""
        raise NotImplementedError

    def coldest(self, new: bytes = b"", price: float = 1.0) -> Iterator[Any]:
        """Nodes from the first to go on; do not change the order while iterating.

        With the hashes of blocks that want their place, it ends before a node that times `price` is worth more than they are.
        """
        raise NotImplementedError

    # What an order may learn from; one that remembers nothing but its nodes has no use for it.

    def asked(self, path: Sequence[Any], rest: bytes, now: int) -> None:
        """A request reads the nodes of `path` (deepest first), and wants the blocks behind it (packed hashes) too."""
        self.touch(path)

    def hinted(self, path: Sequence[Any], rest: bytes, turn: str | None) -> None:
        """Why a turn ended, whose blocks are those of `path` and, not in the tree, those behind it."""

    def split(self, node: Any, head: Any, is_entered: bool) -> None:
        """The first blocks of a node are a node of their own now, which is entered next if it is in the tier."""

    def alike(self, above: Any, node: Any) -> bool:
        """Whether a node and its only child may be joined."""
        return True

    def join(self, nodes: Sequence[Any]) -> None:
        """A line of only children, the first on top, is about to be the first one."""

    def cuts(self, node: Any, hashes: bytes) -> Sequence[int]:
        """Where blocks that come below a node are to be cut into nodes: rising offsets, 0 to keep them apart from it."""
        return ()

    def grown(self, node: Any, hashes: bytes) -> None:
        """Blocks were added at the end of a node that is entered."""

    def trimmed(self, node: Any, keep: int) -> None:
        """A node is about to lose all but its first `keep` blocks."""
