"""The prefix tree of runs: which blocks exist, and in which slot of which tier each one lives.

A node holds a run of consecutive blocks that were last used together: their concatenated 32-byte hashes and one row of
slot numbers per tier (-1: not there). Matching a node is one `bytes.startswith`, so an 8,192-block prompt costs
microseconds per node, not 8,192 look-ups. The tree is a skeleton of hashes; residency is per block and tier and may
have holes.

Rules of this file:
- a hash is in the tree once (it is chained over its parent, so it has one place);
- all blocks of a node have the same last use and use count: a touch that ends inside a node splits it, and a touch that
  covers a node and its only child merges them. Uses fall monotonically toward the tail;
- in every order of eviction a node comes before its ancestors, so the coldest node of a tier has nothing below it
  there;
- a split makes a new node of the head, which its caller is about to touch; the tail keeps its place in every order;
- time never runs backwards here, whatever the wall clock does.

Chains can be entered in the middle (`parent`) through a Table of hash fragments, verified against the full hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.core.compare import common, offset_of
from tierd.core.plan import Hint, any_of, any_true
from tierd.core.policy import Policy
from tierd.core.policy.lru import Lru
from tierd.core.removed import Removed
from tierd.core.table import Cells, Table

Slots = NDArray[np.int32]
NODES_AT_ONCE = 64


class Node:
    """A run of n blocks: hashes (32 n bytes), slots (int32[tiers, n]), cells (int32[n]: their places in the table).

    `born` is when its blocks were stored, on average (all that is known of them after a restart is their last use);
    `hint` what an engine said last when it let go of the run's end, for policies.
    """

    __slots__ = ("born", "cells", "children", "hashes", "hint", "id", "last_use", "parent", "slots", "uses")

    def __init__(self, node_id: int, hashes: bytes, slots: Slots, cells: Cells, parent: Node | None) -> None:
        self.id = node_id
        self.hashes = hashes
        self.slots = slots
        self.cells = cells
        self.parent = parent
        self.children: dict[bytes, Node] | None = None
        self.born = self.last_use = 0
        self.uses = 0
        self.hint: Hint | None = None

    def __len__(self) -> int:
        return len(self.hashes) // HASH_BYTES

    def __repr__(self) -> str:
        return f"<Node {self.id}: {len(self)} blocks from {self.hashes[:4].hex()}, used {self.last_use}>"

    @property
    def last_hash(self) -> bytes:
        """Hash of the run's last block; the root's is the parent of all chains."""
        return self.hashes[-HASH_BYTES:] if self.hashes else ROOT


class Piece(NamedTuple):
    """Some consecutive blocks of `node` from offset `start`."""

    node: Node
    start: int
    blocks: int

    @property
    def end(self) -> int:
        """Offset in the node behind the last block."""
        return self.start + self.blocks


_piece = partial(tuple.__new__, Piece)
"""Makes a Piece of a tuple in a third of the time: a prompt has dozens."""


class Index:
    """Tree of one namespace over `tiers` tiers; `orders[tier]` is that tier's order of eviction.

    `seed` makes the secret keys of the table of hashes.
    """

    def __init__(self, tiers: int, seed: int = 0, orders: Sequence[Policy] | None = None) -> None:
        self.tiers = tiers
        self.orders: Sequence[Policy] = orders or [Lru() for _ in range(tiers)]
        self.table = Table(seed)
        self.blocks = 0
        self.touched: dict[Node, None] = {}
        """Nodes whose recency changed since it was last written to the directories."""
        self.removed: Removed | None = None
        """Where is noted what lives nowhere any more, while somebody wants to know."""
        self._latest = 0
        self._nodes: list[Node | None] = [None]
        self._ids: list[int] = []
        self.root = Node(0, b"", np.empty((tiers, 0), np.int32), np.empty(0, np.int32), None)
        self._found = self.root, 0
        """Where the last block was that was looked for: a chain that grows is entered at its end again and again."""

    @property
    def latest(self) -> int:
        """The latest use of anything, in Unix milliseconds."""
        return self._latest

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, block: bytes) -> tuple[Node, int] | None:
        """The node and offset of one block hash, or None."""
        last, at = self._found
        if last.hashes.startswith(block, at * HASH_BYTES) and self._nodes[last.id] is last:
            return self._found
        for owner in self.table.candidates(block):
            node = self._nodes[owner]
            offset = offset_of(node.hashes, block) if node is not None else -1
            if node is not None and offset >= 0:
                self._found = node, offset
                return self._found
        return None

    def match(self, hashes: bytes, parent: bytes = ROOT) -> list[Piece] | None:
        """The longest known run of `hashes` behind `parent`, as pieces of nodes; None when the parent is unknown."""
        if parent == ROOT:
            return self._follow(hashes, 0, self.root, 0)
        entry = self.find(parent)
        return self._follow(hashes, 0, entry[0], entry[1] + 1) if entry else None

    def runs(self, hashes: bytes) -> list[tuple[int, Piece]]:
        """Every known block of `hashes` as (position, piece), wherever it is: gaps in the chain are stepped over."""
        found: list[tuple[int, Piece]] = []
        at, total = 0, len(hashes) // HASH_BYTES
        while at < total:
            entry = self.find(hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES])
            for piece in self._follow(hashes, at * HASH_BYTES, *entry) if entry else ():
                found.append((at, piece))
                at += piece.blocks
            at += entry is None
        return found

    def count_new(self, hashes: bytes) -> int:
        """How many leading blocks of `hashes` are not in the tree, wherever that might be."""
        for at in np.flatnonzero(self.table.contains(self.table.fragments(hashes))).tolist():
            if self.find(hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES]):
                return int(at)
        return len(hashes) // HASH_BYTES

    def path(self, node: Node) -> list[Node]:
        """The node and its ancestors, deepest first, without the root."""
        path = []
        while (parent := node.parent) is not None:
            path.append(node)
            node = parent
        return path

    def _follow(self, hashes: bytes, at: int, node: Node, offset: int) -> list[Piece]:
        """Pieces that match `hashes` from byte `at`, where block `offset` of `node` (or its children) comes next."""
        pieces: list[Piece] = []
        child: Node | None = node
        if offset:
            same = common(node.hashes, offset * HASH_BYTES, hashes, at)
            if same:
                pieces.append(Piece(node, offset, same))
            at += same * HASH_BYTES
            if offset + same < len(node):
                return pieces
            child = node.children.get(hashes[at : at + HASH_BYTES]) if node.children else None
        while child is not None:
            node, run = child, child.hashes
            if not hashes.startswith(run, at):
                if same := common(run, 0, hashes, at):
                    pieces.append(Piece(node, 0, same))
                return pieces
            if run:  # the root has none
                pieces.append(_piece((node, 0, len(run) // HASH_BYTES)))
                at += len(run)
            child = node.children.get(hashes[at : at + HASH_BYTES]) if node.children else None
        return pieces

    # -- growing ------------------------------------------------------------------------------------------------------

    def extend(self, node: Node, hashes: bytes, slots: Slots, now: int) -> Node:
        """Hang blocks that are not in the tree (slots: int32[tiers, n]) below the *last* block of `node`, which was
        just touched; returns the node they are in.

        A leaf that was last used at the same time grows in place, if policies find all alike; else a child is added.
        """
        if any(cuts := [order.cuts(node, hashes) for order in self.orders]):
            ends = sorted({*chain.from_iterable(cuts), len(hashes) // HASH_BYTES} - {0})
            for first, end in pairwise([0, *ends]):
                grows = first == 0 and not any(0 in some for some in cuts)
                part = hashes[first * HASH_BYTES : end * HASH_BYTES]
                node = self._extend(node, part, slots[:, first:end], now, grows)
            return node
        return self._extend(node, hashes, slots, now)

    def _extend(self, node: Node, hashes: bytes, slots: Slots, now: int, grows: bool = True) -> Node:
        now = self._latest = max(self._latest, now)
        if grows and node.parent is not None and not node.children and node.last_use == now:
            cells = self._enter(hashes, node.id)
            node.hashes += hashes
            node.born += (now - node.born) * len(hashes) // len(node.hashes)
            node.slots = np.concatenate((node.slots, slots), axis=1)
            node.cells = np.concatenate((node.cells, cells))
            for order in self.orders:
                order.grown(node, hashes)
        else:
            node = self.attach(node, hashes, slots.copy(), now)
        self.touched[node] = None
        self._enlist(node)
        self._found = node, len(node) - 1
        return node

    def attach(self, parent: Node, hashes: bytes, slots: Slots, last_use: int, uses: int = 0) -> Node:
        """Add a child of the last block of `parent`, without a place in the orders: `arrange` gives it one."""
        node_id = self._ids.pop() if self._ids else len(self._nodes)
        return self._add(node_id, parent, hashes, slots, self._enter(hashes, node_id), last_use, uses)

    def arrange(self, nodes: list[Node]) -> None:
        """Enter nodes into the orders, the first as the coldest."""
        for tier, order in enumerate(self.orders):
            for node in nodes:
                if node.slots[tier].max() >= 0:
                    order.add(node)
        self._latest = max([self._latest, *(node.last_use for node in nodes)])

    def split(self, node: Node, offset: int) -> Node:
        """Cut a node before block `offset` (0 < offset < len): returns the new head; `node` stays as the tail."""
        cut = offset * HASH_BYTES
        assert node.parent is not None and 0 < cut < len(node.hashes)
        node_id = self._ids.pop() if self._ids else len(self._nodes)
        slots, cells = node.slots[:, :offset].copy(), node.cells[:offset].copy()
        head = self._add(node_id, node.parent, node.hashes[:cut], slots, cells, node.last_use, node.uses)
        head.born = node.born
        node.hashes, node.slots, node.cells = (
            node.hashes[cut:],
            node.slots[:, offset:].copy(),
            node.cells[offset:].copy(),
        )
        node.parent, head.children = head, {node.hashes[:HASH_BYTES]: node}
        smaller, larger = (node, head) if len(head) > len(node) else (head, node)
        if larger is head:  # the larger part keeps the id that its table entries name
            self._swap_ids(head, node)
        self.table.reassign(smaller.cells, smaller.hashes, larger.id, smaller.id)
        if node in self.touched:
            self.touched[head] = None
        for order, before, behind in zip(self.orders, head.slots, node.slots, strict=True):
            is_entered = any_true(before >= 0)
            order.split(node, head, is_entered)
            if is_entered:
                order.add(head)  # hotter than its ancestors until the caller has touched them
            if node in order and not any_true(behind >= 0):
                order.remove(node)
        return head

    def touch(self, pieces: list[Piece], now: int, rest: bytes | None = None) -> list[Piece]:
        """Make the blocks of `pieces` (a chain) and all above them the most recently used; returns the pieces as they
        are now.

        The last node is split where the touch ends; neighbours without other children merge. `rest` are the hashes of the
        blocks behind that a request also wants; None: there is no request.
        """
        now = self._latest = max(self._latest, now)
        if not pieces:
            for order in self.orders if rest else ():
                order.asked((), rest or b"", now)
            return []
        node, start, count = pieces[-1]
        if start + count < len(node):
            node = self.split(node, start + count)
            pieces = [*pieces[:-1], Piece(node, start, count)]
        path = self.path(node)
        lonely = 0
        for member in path:
            member.last_use = now
            member.uses += 1
            if member.children is not None and len(member.children) == 1:
                lonely += 1
        self.touched.update(dict.fromkeys(path))
        for order in self.orders:
            if rest is None:
                order.touch(path)
            else:
                order.asked(path, rest, now)
        if lonely > (len(node.children or ()) == 1):  # the deepest may have one: it was not touched
            return self._merge(path, pieces)
        return pieces

    def _merge(self, path: list[Node], pieces: list[Piece]) -> list[Piece]:
        """Join only children to their parents along a freshly touched path (deepest first); returns the pieces as they
        are now.
        """
        groups = [[path[-1]]]
        for node in path[-2::-1]:
            above = groups[-1][-1]
            if len(above.children or ()) == 1 and all(order.alike(above, node) for order in self.orders):
                groups[-1].append(node)
            else:
                groups.append([node])
        if len(groups) == len(path):
            return pieces
        place: dict[Node, tuple[Node, int]] = {}
        for group in groups:
            shift = 0
            for node in group:
                place[node] = group[0], shift
                shift += len(node)
        merged: list[Piece] = []
        for node, start, count in pieces:
            top, shift = place[node]
            if merged and merged[-1].node is top:
                merged[-1] = merged[-1]._replace(blocks=merged[-1].blocks + count)
            else:
                merged.append(Piece(top, shift + start, count))
        for group in groups:
            if len(group) > 1:
                self._join(group)
        return merged

    def _join(self, group: list[Node]) -> None:
        """Append a line of only children to the first of them, which keeps its place."""
        top, largest = group[0], max(group, key=len)
        for node in group:
            if node is not largest:
                self.table.reassign(node.cells, node.hashes, node.id, largest.id)
        if largest is not top:
            self._swap_ids(top, largest)
        for order in self.orders:
            order.join(group)
        hashes = b"".join([node.hashes for node in group])
        top.born = sum(node.born * len(node) for node in group) * HASH_BYTES // len(hashes)
        top.hashes = hashes
        top.slots = np.concatenate([node.slots for node in group], axis=1)
        top.cells = np.concatenate([node.cells for node in group])
        top.children, top.hint = group[-1].children, group[-1].hint
        for child in (top.children or {}).values():
            child.parent = top
        self._enlist(top)
        for node in group[1:]:
            self._forget(node)

    # -- shrinking ----------------------------------------------------------------------------------------------------

    def assign(self, tier: int, piece: Piece, slots: Slots) -> None:
        """Record where a piece's blocks live in one tier (int32[count])."""
        piece.node.slots[tier, piece.start : piece.start + piece.blocks] = slots
        self.touched[piece.node] = None
        self._enlist(piece.node)

    def clear(self, tier: int, node: Node, offsets: NDArray[np.intp]) -> Slots:
        """Forget the copies of some of a node's blocks in one tier; returns their slots. Call `trim` afterwards."""
        slots: Slots = node.slots[tier, offsets]
        node.slots[tier, offsets] = -1
        if self.removed is not None:
            self.removed.note(node.hashes, node.slots, offsets)
        if not any_true(node.slots[tier] >= 0):
            self.orders[tier].remove(node)
        return slots

    def trim(self, nodes: Iterable[Node]) -> None:
        """Remove what lives nowhere from the tails of these nodes, and of ancestors that become childless."""
        dropped = []
        for node in nodes:
            while node.parent is not None and not node.children and self._nodes[node.id] is node:
                living = any_of(node.slots).nonzero()[0]
                keep = int(living[-1]) + 1 if len(living) else 0
                if keep == len(node):
                    break
                dropped.append((node.cells[keep:], node.hashes[keep * HASH_BYTES :], node.id))
                self.blocks -= len(node) - keep
                if keep:
                    for order in self.orders:
                        order.trimmed(node, keep)
                    node.hashes, node.slots = node.hashes[: keep * HASH_BYTES], node.slots[:, :keep].copy()
                    node.cells = node.cells[:keep].copy()
                    break
                above = node.parent
                assert above.children is not None
                del above.children[node.hashes[:HASH_BYTES]]
                if not above.children:
                    above.children = None
                self._forget(node)
                node = above
        self.table.drop(dropped)

    def hinted(self, node: Node, hint: Hint) -> None:
        """Why the turn ended whose last block is in `node`, for policies."""
        node.hint = hint
        path = list(self.path(node))
        for order in self.orders:
            order.hinted(path, b"", hint.turn)

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, in no order."""
        return (node for node in self._nodes if node is not None)

    def check(self) -> None:
        """Raise AssertionError if any rule of this file is broken; for tests and idle time."""
        blocks = 0
        ranks = [{node: rank for rank, node in enumerate(order.coldest())} for order in self.orders]
        stack = [self.root]
        while stack:
            node = stack.pop()
            assert node.children is None or node.children, f"{node} has an empty map of children"
            for first, child in (node.children or {}).items():
                assert child.parent is node and child.hashes.startswith(first), f"{child} hangs wrong below {node}"
                assert node is self.root or child.last_use <= node.last_use, f"{child} is hotter than {node}"
                stack.append(child)
            if node is not self.root:
                blocks += len(node)
                self._check_node(node, ranks)
        assert blocks == self.blocks == self.table.size, f"{blocks} blocks, {self.blocks} counted, {self.table.size} in table"
        assert len(self._nodes) - 1 - len(self._ids) == sum(1 for _ in self.nodes()), "node ids leak"
        assert all(self._nodes[node.id] is node for node in self.touched), "a forgotten node is still marked as touched"
        self.table.check()

    def _check_node(self, node: Node, ranks: list[dict[Node, int]]) -> None:
        assert len(node) and node.slots.shape == (self.tiers, len(node)), f"{node}: slots {node.slots.shape}"
        assert self._nodes[node.id] is node, f"{node} is not at its id"
        self.table.check_entry(node.cells, node.hashes, node.id)
        for at in range(0, len(node.hashes), HASH_BYTES):
            assert self.find(node.hashes[at : at + HASH_BYTES]) == (node, at // HASH_BYTES), f"{node}: {at} unknown"
        for tier, rank in enumerate(ranks):
            assert (node in rank) == bool((node.slots[tier] >= 0).any()), f"{node}: order of tier {tier} is wrong"
            above = next((member for member in self.path(node) if member is not node and member in rank), None)
            assert node not in rank or above is None or rank[node] < rank[above], f"{above} goes before {node}"
        if not node.children:
            assert (node.slots[:, -1] >= 0).any(), f"{node} ends in a block that lives nowhere"

    def _enter(self, hashes: bytes, owner: int) -> Cells:
        """Enter new blocks into the table; returns their places there."""
        count = len(hashes) // HASH_BYTES
        if not self.table.has_room(count):
            self._enlarge(count)
        self.blocks += count
        return self.table.add(self.table.fragments(hashes), np.int32(owner))

    def _enlarge(self, count: int) -> None:
        """Make the table larger: everything finds a new place, many nodes at a time."""
        nodes = list(self.nodes())
        self.table.enlarge(count)
        for at in range(0, len(nodes), NODES_AT_ONCE):
            some = nodes[at : at + NODES_AT_ONCE]
            fragments = self.table.fragments(b"".join([node.hashes for node in some]))
            ids = np.array([node.id for node in some], np.int32)
            cells = self.table.add(fragments, np.repeat(ids, [len(node) for node in some]))
            for node in some:
                node.cells, cells = cells[: len(node)].copy(), cells[len(node) :]

    def _add(self, node_id: int, parent: Node, hashes: bytes, slots: Slots, cells: Cells, last_use: int, uses: int) -> Node:
        node = Node(node_id, hashes, slots, cells, parent)
        node.born = node.last_use = last_use
        node.uses = uses
        if node_id == len(self._nodes):
            self._nodes.append(node)
        else:
            self._nodes[node_id] = node
        if parent.children is None:
            parent.children = {}
        parent.children[hashes[:HASH_BYTES]] = node
        return node

    def _swap_ids(self, one: Node, other: Node) -> None:
        one.id, other.id = other.id, one.id
        self._nodes[one.id], self._nodes[other.id] = one, other

    def _enlist(self, node: Node) -> None:
        """Enter a node in the orders of the tiers that it is new in, and keep its ancestors behind it (hotter)."""
        there, path = node.slots >= 0, None
        for order, row in zip(self.orders, there, strict=True):
            if node not in order and any_true(row):
                path = path or self.path(node)
                order.add(node)
                order.touch(path)

    def _forget(self, node: Node) -> None:
        for order in self.orders:
            if node in order:
                order.remove(node)
        self.touched.pop(node, None)
        self._nodes[node.id] = None
        self._ids.append(node.id)
