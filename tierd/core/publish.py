"""Entering filled slots into the tree: what a commit does, whether a lease's or that of single pages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tierd.block import HASH_BYTES, ROOT
from tierd.core.index import Index, Piece
from tierd.core.plan import Slots


def publish(index: Index, tier: int, parent: bytes, hashes: bytes, offered: Slots, now: int) -> Slots | None:
    """Offer slots (int32[n], -1: none) for the blocks of a chain; returns where each block is in the tier now, -1 where it
    is not, or None when the parent is unknown.

    A block that is there already stays where it is. What is behind a block that the tree has in another place is left
    out. Nothing is written to directories.
    """
    pieces = index.match(hashes, parent)
    if pieces is None:
        return None
    anchor = index.touch(pieces or parent_piece(index, parent), now)
    placed = np.full(len(offered), -1, np.int32)
    known = 0
    for known, piece in positions(anchor if pieces else []):
        here = piece.node.slots[tier, piece.start : piece.end]
        part = np.where(here >= 0, here, offered[known : known + piece.blocks])
        if (part != here).any():
            index.assign(tier, piece, part)
        placed[known : known + piece.blocks] = part
        known += piece.blocks
    new = known + index.count_new(hashes[known * HASH_BYTES :])
    given = np.flatnonzero(offered[known:new] >= 0)
    if len(given):
        end = known + int(given[-1]) + 1
        placed[known:end] = offered[known:end]
        rows = np.full((index.tiers, end - known), -1, np.int32)
        rows[tier] = offered[known:end]
        node = anchor[-1].node if anchor else index.root
        index.extend(node, hashes[known * HASH_BYTES : end * HASH_BYTES], rows, now)
    return placed


def parent_piece(index: Index, parent: bytes) -> list[Piece]:
    """The parent of a chain that is new here, as the end of a path to touch."""
    entry = index.find(parent) if parent != ROOT else None
    return [Piece(entry[0], 0, entry[1] + 1)] if entry else []


def positions(pieces: list[Piece]) -> Iterator[tuple[int, Piece]]:
    """Pieces of one chain with the position of their first block."""
    at = 0
    for piece in pieces:
        yield at, piece
        at += piece.blocks
