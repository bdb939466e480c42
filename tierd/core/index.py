"""The prefix tree of runs: which blocks exist, and in which slot of which tier each one lives.

A node holds a run of consecutive blocks that were last used together: their concatenated 32-byte hashes and one row of slot
numbers per tier (-1: not there). Matching a node is one `bytes.startswith`, so an 8,192-block prompt costs microseconds per
node, not 8,192 look-ups. The tree is a skeleton of hashes; residency is per block and tier and may have holes.

Rules of this file:
- all blocks of a node have the same last use and use count: a touch that ends inside a node splits it, and a touch that
  covers a node and its only child merges them. Uses fall monotonically toward the tail, so the coldest node is a leaf;
- a split makes a new node of the head, which its caller is about to touch; the tail keeps its place in every order;
- arrays handed out are copies.

Chains can be entered in the middle (`parent`) through a Table of hash fragments, verified against the full hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.core.policy.lru import Lru
from tierd.core.table import Table, fragments_of

Slots = NDArray[np.int32]


class Node:
    """A run of n blocks: hashes (32 n bytes), slots (int32[tiers, n])."""

    __slots__ = ("children", "hashes", "id", "last_use", "parent", "slots", "uses")

    def __init__(self, node_id: int, hashes: bytes, slots: Slots, parent: Node | None) -> None:
        self.id = node_id
        self.hashes = hashes
        self.slots = slots
        self.parent = parent
        self.children: dict[bytes, Node] | None = None
        self.last_use = 0
        self.uses = 0

    def __len__(self) -> int:
        return len(self.hashes) // HASH_BYTES

    def __repr__(self) -> str:
        return f"<Node {self.id}: {len(self)} blocks from {self.hashes[:4].hex()}, used {self.last_use}>"

    @property
    def last_hash(self) -> bytes:
        """Hash of the run's last block; the root's is the parent of all chains."""
        return self.hashes[-HASH_BYTES:] if self.hashes else ROOT


class Piece(NamedTuple):
    """`count` blocks of `node` from `start`."""

    node: Node
    start: int
    count: int


class Index:
    """Tree of one namespace over `tiers` tiers; `orders[tier]` is that tier's order of eviction."""

    def __init__(self, tiers: int) -> None:
        self.tiers = tiers
        self.orders = [Lru() for _ in range(tiers)]
        self.table = Table()
        self.blocks = 0
        self.touched: dict[Node, None] = {}
        """Nodes whose recency changed since it was last written to the directories."""
        self._nodes: list[Node | None] = [None]
        self._ids: list[int] = []
        self.root = Node(0, b"", np.empty((tiers, 0), np.int32), None)

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, block: bytes) -> tuple[Node, int] | None:
        """The node and offset of one block hash, or None."""
        fragment = int.from_bytes(block[8:12], "little")
        for owner in self.table.candidates(fragment):
            node = self._nodes[owner]
            at = node.hashes.find(block) if node is not None else -1
            while at >= 0 and at % HASH_BYTES:
                at = node.hashes.find(block, at + 1)  # type: ignore[union-attr]
            if at >= 0:
                return node, at // HASH_BYTES  # type: ignore[return-value]
        return None

    def match(self, hashes: bytes, parent: bytes = ROOT) -> list[Piece] | None:
        """The longest known run of `hashes` behind `parent`, as pieces of nodes; None when the parent is unknown."""
        if parent == ROOT:
            node, offset = self.root, 0
        else:
            entry = self.find(parent)
            if entry is None:
                return None
            node, offset = entry[0], entry[1] + 1
        return list(self._follow(hashes, node, offset))

    def runs(self, hashes: bytes) -> list[tuple[int, Piece]]:
        """Every known block of `hashes` as (position, piece), wherever it is: gaps in the chain are stepped over."""
        found = []
        at, total = 0, len(hashes) // HASH_BYTES
        while at < total:
            entry = self.find(hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES])
            if entry is None:
                at += 1
                continue
            for piece in self._follow(hashes[at * HASH_BYTES :], *entry):
                found.append((at, piece))
                at += piece.count
        return found

    def path(self, node: Node) -> Iterator[Node]:
        """The node and its ancestors, deepest first, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _follow(self, hashes: bytes, node: Node, offset: int) -> Iterator[Piece]:
        at, total = 0, len(hashes)
        while True:
            size = len(node.hashes)
            start = offset * HASH_BYTES
            if start < size:
                count = _common(node.hashes, start, hashes, at)
                if count:
                    yield Piece(node, offset, count)
                at += count * HASH_BYTES
                if start + count * HASH_BYTES < size:
                    return
            child = node.children.get(hashes[at : at + HASH_BYTES]) if at < total and node.children else None
            if child is None:
                return
            node, offset = child, 0

    # -- growing ------------------------------------------------------------------------------------------------------

    def extend(self, node: Node, hashes: bytes, slots: Slots, last_use: int) -> Node:
        """Hang new blocks (slots: int32[tiers, n]) below the *last* block of `node`; returns the node they are in.

        A leaf that was last used at the same time grows in place; else a child is added.
        """
        count = len(hashes) // HASH_BYTES
        self.blocks += count
        fragments = fragments_of(hashes)
        if node.parent is not None and not node.children and node.last_use == last_use:
            node.hashes += hashes
            node.slots = np.concatenate((node.slots, slots), axis=1)
        else:
            node = self._add(node, hashes, slots.copy(), last_use)
        self.table.add(fragments, np.full(count, node.id, np.int32))
        self._enlist(node)
        return node

    def split(self, node: Node, offset: int) -> Node:
        """Cut a node before block `offset` (0 < offset < len): returns the new head; `node` stays as the tail."""
        cut = offset * HASH_BYTES
        head = self._add(node.parent, node.hashes[:cut], node.slots[:, :offset].copy(), node.last_use)
        head.uses = node.uses
        node.hashes, node.slots = node.hashes[cut:], node.slots[:, offset:].copy()
        node.parent, head.children = head, {node.hashes[:HASH_BYTES]: node}
        if len(head) > len(node):  # the larger part keeps the id that its table entries name
            head.id, node.id = node.id, head.id
            self._nodes[head.id], self._nodes[node.id] = head, node
            self.table.reassign(fragments_of(node.hashes), head.id, node.id)
        else:
            self.table.reassign(fragments_of(head.hashes), node.id, head.id)
        if node in self.touched:
            self.touched[head] = None
        self._enlist(head)
        for order, row in zip(self.orders, node.slots, strict=True):
            if node in order and row.max() < 0:
                order.remove(node)
        return head

    def touch(self, pieces: list[Piece], now: int) -> list[Piece]:
        """Make the blocks of `pieces` (a chain) and all above them the most recently used; returns the pieces as they are now.

        The last node is split where the touch ends; neighbours without other children merge.
        """
        if not pieces:
            return []
        node, start, count = pieces[-1]
        if start + count < len(node):
            node = self.split(node, start + count)
            pieces[-1] = Piece(node, start, count)
        path = list(self.path(node))
        for member in path:
            member.last_use = now
            member.uses += 1
            self.touched[member] = None
            for order in self.orders:
                if member in order:
                    order.touch(member)
        if any(len(member.children or ()) == 1 for member in path[1:]):
            return self._merge(path, pieces)
        return pieces

    def _merge(self, path: list[Node], pieces: list[Piece]) -> list[Piece]:
        """Join only children to their parents along a freshly touched path."""
        known = {id(piece.node): piece for piece in pieces}
        merged: list[Piece] = []
        for child in path[:-1]:
            parent = child.parent
            assert parent is not None and parent.parent is not None
            piece = known.pop(id(child), None)
            if len(parent.children or ()) != 1:
                if piece is not None:
                    merged.append(piece)
                continue
            above = known.get(id(parent))
            shift = len(parent)
            if piece is not None:
                start, count = (above.start, above.count + piece.count) if above else (shift + piece.start, piece.count)
                known[id(parent)] = Piece(parent, start, count)
            self._absorb(parent, child)
        top = known.pop(id(path[-1]), None)
        return ([top] if top else []) + merged[::-1]

    def _absorb(self, parent: Node, child: Node) -> None:
        """Append an only child to its parent, which keeps its place."""
        keep, gone = (parent, child) if len(parent) >= len(child) else (child, parent)
        self.table.reassign(fragments_of(gone.hashes), gone.id, keep.id)
        parent.hashes += child.hashes
        parent.slots = np.concatenate((parent.slots, child.slots), axis=1)
        parent.children = child.children
        for grandchild in (child.children or {}).values():
            grandchild.parent = parent
        kept, free = keep.id, gone.id
        parent.id, child.id = kept, free
        self._nodes[kept] = parent
        self._enlist(parent)
        self._forget(child)

    # -- shrinking ----------------------------------------------------------------------------------------------------

    def clear(self, tier: int, node: Node, offsets: NDArray[np.intp] | slice) -> None:
        """Forget the copies of some of a node's blocks in one tier; call `trim` afterwards."""
        node.slots[tier, offsets] = -1
        if node.slots[tier].max() < 0:
            self.orders[tier].remove(node)

    def assign(self, tier: int, piece: Piece, slots: Slots) -> None:
        """Record where a piece's blocks live in one tier (int32[count])."""
        piece.node.slots[tier, piece.start : piece.start + piece.count] = slots
        self._enlist(piece.node)

    def trim(self, nodes: list[Node]) -> None:
        """Remove what lives nowhere from the tails of these nodes, and of ancestors that become childless."""
        dropped: list[bytes] = []
        owners: list[tuple[int, int]] = []
        for node in nodes:
            while node.parent is not None and not node.children and self._nodes[node.id] is node:
                used = np.flatnonzero((node.slots >= 0).any(0))
                keep = int(used[-1]) + 1 if len(used) else 0
                if keep == len(node):
                    break
                dropped.append(node.hashes[keep * HASH_BYTES :])
                owners.append((node.id, len(node) - keep))
                if keep:
                    node.hashes, node.slots = node.hashes[: keep * HASH_BYTES], node.slots[:, :keep].copy()
                    break
                above = node.parent
                assert above.children is not None
                del above.children[node.hashes[:HASH_BYTES]]
                if not above.children:
                    above.children = None
                self._forget(node)
                node = above
        if dropped:
            ids, counts = zip(*owners, strict=True)
            fragments = fragments_of(b"".join(dropped))
            self.blocks -= len(fragments)
            self.table.drop(fragments, np.repeat(np.array(ids, np.int32), counts))

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, in no order."""
        return (node for node in self._nodes if node is not None)

    def check(self) -> None:
        """Raise AssertionError if any rule of this file is broken; for tests and idle time."""
        blocks = 0
        stack = [self.root]
        while stack:
            node = stack.pop()
            assert node.children is None or node.children, f"{node} has an empty map of children"
            for first, child in (node.children or {}).items():
                assert child.parent is node and child.hashes.startswith(first), f"{child} hangs wrong below {node}"
                assert node is self.root or child.last_use <= node.last_use, f"{child} is hotter than {node}"
                stack.append(child)
            if node is self.root:
                continue
            blocks += len(node)
            assert len(node) and node.slots.shape == (self.tiers, len(node)), f"{node}: slots {node.slots.shape}"
            assert self._nodes[node.id] is node, f"{node} is not at its id"
            for at in range(0, len(node.hashes), HASH_BYTES):
                assert self.find(node.hashes[at : at + HASH_BYTES]) == (node, at // HASH_BYTES), f"{node}: {at} unknown"
            for tier, order in enumerate(self.orders):
                assert (node in order) == bool((node.slots[tier] >= 0).any()), f"{node}: order of tier {tier} is wrong"
            if not node.children:
                assert (node.slots[:, -1] >= 0).any(), f"{node} ends in a block that lives nowhere"
        assert blocks == self.blocks == self.table.size, (
            f"{blocks} blocks, {self.blocks} counted, {self.table.size} in table"
        )
        assert len(self._nodes) - 1 - len(self._ids) == sum(1 for _ in self.nodes()), "node ids leak"

    def _add(self, parent: Node | None, hashes: bytes, slots: Slots, last_use: int) -> Node:
        assert parent is not None
        node_id = self._ids.pop() if self._ids else len(self._nodes)
        node = Node(node_id, hashes, slots, parent)
        node.last_use = last_use
        if node_id == len(self._nodes):
            self._nodes.append(node)
        else:
            self._nodes[node_id] = node
        if parent.children is None:
            parent.children = {}
        parent.children[hashes[:HASH_BYTES]] = node
        return node

    def _enlist(self, node: Node) -> None:
        """Enter a node in the orders of the tiers that it is new in, and keep its ancestors behind it (hotter)."""
        for order, row in zip(self.orders, node.slots, strict=True):
            if node not in order and row.max() >= 0:
                order.add(node)
                for member in self.path(node.parent or self.root):
                    if member in order:
                        order.touch(member)

    def _forget(self, node: Node) -> None:
        for order in self.orders:
            if node in order:
                order.remove(node)
        self.touched.pop(node, None)
        self._nodes[node.id] = None
        self._ids.append(node.id)


def _common(run: bytes, start: int, hashes: bytes, at: int) -> int:
    """How many whole hashes `run` from byte `start` and `hashes` from byte `at` have in common."""
    size = min(len(run) - start, len(hashes) - at)
    if start == 0 and size == len(run) and hashes.startswith(run, at):
        return size // HASH_BYTES
    left = np.frombuffer(run, np.uint64, size // 8, start)
    right = np.frombuffer(hashes, np.uint64, size // 8, at)
    differ = left != right
    first = int(differ.argmax()) if size else 0
    return first // 4 if size and differ[first] else size // HASH_BYTES
