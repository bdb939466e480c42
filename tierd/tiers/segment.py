"""What a segment looks like: its geometry and its header. `docs/segment-format.md` is the contract.

A segment is a header, a directory of four columns and slots. It belongs to one namespace for its whole life, and
everything that is needed to read it again is in its header.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from struct import Struct, pack_into, unpack_from
from typing import Any

from tierd.clock import unix_nanoseconds
from tierd.errors import Invalid
from tierd.layout import HUGE_PAGE_BYTES, PAGE_BYTES, Layout, Namespace

MAGIC = b"TIERDSEG"
VERSION = 1
HEADER_BYTES = PAGE_BYTES
STATE_BYTES, HOLDERS_BYTES, IDENTITY_BYTES, RECENCY_BYTES = 8, 8, 128, 16
"""Bytes of one row in each column of the directory."""

_FIELDS = Struct("<8s2I16s32s16s4Q2I6Q")
_RECORD_OFFSET = 512
_CRC_OFFSET = HEADER_BYTES - 4


class Medium(IntEnum):
    """Where a segment lives: two memfds, two files, or a memfd and an exported allocation of a GPU."""

    MEMORY = 1
    FILE = 2
    DEVICE = 3


@dataclass(frozen=True)
class Geometry:
    """Where everything is in a segment of `slot_count` slots; all offsets and sizes in bytes.

    `slots_page_bytes` is the page size that the slots are rounded up to: 4,096, or 2 MiB for memory in huge pages.
    """

    slot_count: int
    payload_bytes: int
    slots_page_bytes: int = PAGE_BYTES

    @classmethod
    def fit(cls, layout: Layout, segment_bytes: int, slots_page_bytes: int = PAGE_BYTES) -> Geometry:
        """The geometry with the most slots that costs at most `segment_bytes`; Invalid if not even one slot fits."""
        row_bytes = STATE_BYTES + HOLDERS_BYTES + IDENTITY_BYTES + RECENCY_BYTES
        slot_count = (segment_bytes - HEADER_BYTES) // (layout.slot_bytes + row_bytes)
        while slot_count > 0:
            geometry = cls(slot_count, layout.block_bytes, slots_page_bytes)
            if geometry.total_bytes <= segment_bytes:
                return geometry
            slot_count -= 1
        needed = cls(1, layout.block_bytes, slots_page_bytes).total_bytes
        raise Invalid(
            f"a segment of {segment_bytes} bytes cannot hold one block of {layout.block_bytes} bytes, "
            f"which takes {needed} with its directory: raise segment_bytes"
        )

    @cached_property
    def slot_bytes(self) -> int:
        """Distance between slots: the payload rounded up to a page."""
        return _round_up(self.payload_bytes, PAGE_BYTES)

    @cached_property
    def state_offset(self) -> int:
        """Start of the state column; like all columns page aligned."""
        return HEADER_BYTES

    @cached_property
    def holders_offset(self) -> int:
        """Start of the holders column."""
        return self.state_offset + _round_up(self.slot_count * STATE_BYTES, PAGE_BYTES)

    @cached_property
    def identity_offset(self) -> int:
        """Start of the identity column."""
        return self.holders_offset + _round_up(self.slot_count * HOLDERS_BYTES, PAGE_BYTES)

    @cached_property
    def recency_offset(self) -> int:
        """Start of the recency column."""
        return self.identity_offset + _round_up(self.slot_count * IDENTITY_BYTES, PAGE_BYTES)

    @cached_property
    def directory_bytes(self) -> int:
        """Header and columns."""
        return self.recency_offset + _round_up(self.slot_count * RECENCY_BYTES, PAGE_BYTES)

    @cached_property
    def slots_bytes(self) -> int:
        """All slots, rounded up to whole pages of their kind."""
        return _round_up(self.slot_count * self.slot_bytes, self.slots_page_bytes)

    @cached_property
    def total_bytes(self) -> int:
        """What the segment costs its tier."""
        return self.directory_bytes + self.slots_bytes


@dataclass(frozen=True)
class Header:
    """The first page of a segment: whose it is, and its shape. `created_ns` is Unix time in nanoseconds."""

    medium: Medium
    segment_id: bytes
    namespace: Namespace
    epoch: int
    created_ns: int
    geometry: Geometry

    @classmethod
    def fresh(cls, medium: Medium, namespace: Namespace, geometry: Geometry, epoch: int) -> Header:
        """The header of a new segment, with a random id and the time of now."""
        return cls(medium, os.urandom(16), namespace, epoch, unix_nanoseconds(), geometry)

    def outdated(self, epoch: int) -> bytes:
        """The page of this header in a later epoch: to whoever reads it, all that the segment has is stale."""
        assert epoch > self.epoch, f"epoch {epoch} is not after {self.epoch}"
        return replace(self, epoch=epoch).pack()

    def pack(self) -> bytes:
        """The header as its page of 4,096 bytes."""
        page = bytearray(HEADER_BYTES)
        record = self.namespace.record()
        pack_into(_FIELDS.format, page, 0, *self._values(len(record)))
        page[_RECORD_OFFSET : _RECORD_OFFSET + len(record)] = record
        pack_into("<I", page, _CRC_OFFSET, zlib.crc32(memoryview(page)[:_CRC_OFFSET]))
        return bytes(page)

    @classmethod
    def unpack(cls, page: bytes) -> Header:
        """Read a header back; raises Invalid with the reason why this is not a segment that can be used."""
        if len(page) < HEADER_BYTES:
            raise Invalid(f"segment header has {len(page)} bytes, not {HEADER_BYTES}")
        values = _FIELDS.unpack_from(page)
        if values[0] != MAGIC:
            raise Invalid(f"segment magic is {values[0]!r}, not {MAGIC!r}: not a tierd segment")
        if values[1] != VERSION:
            raise Invalid(f"segment format version is {values[1]}, this tierd reads {VERSION}")
        (crc,) = unpack_from("<I", page, _CRC_OFFSET)
        if crc != (computed := zlib.crc32(memoryview(page)[:_CRC_OFFSET])):
            raise Invalid(f"segment header crc is {crc:#010x}, its bytes give {computed:#010x}: damaged")
        return cls._from_values(values, page)

    @classmethod
    def _from_values(cls, values: tuple[Any, ...], page: bytes) -> Header:
        """Rebuild the header from its fields, and insist that packing it gives the same fields again."""
        _, _, medium, segment_id, _, _, epoch, created_ns, payload_bytes, _, slot_count, record_bytes, *_, total = values
        if medium not in tuple(Medium):
            raise Invalid(f"segment medium is {medium}, not one of {', '.join(str(int(m)) for m in Medium)}")
        namespace = Namespace.from_record(page[_RECORD_OFFSET : _RECORD_OFFSET + record_bytes])
        geometry = Geometry(slot_count, payload_bytes)
        if total != geometry.total_bytes and medium == Medium.MEMORY:
            geometry = Geometry(slot_count, payload_bytes, HUGE_PAGE_BYTES)
        if slot_count == 0:
            raise Invalid("segment has 0 slots: nothing can be stored in it")
        header = cls(Medium(medium), segment_id, namespace, epoch, created_ns, geometry)
        if payload_bytes != namespace.layout.block_bytes:
            raise Invalid(f"segment has blocks of {payload_bytes} bytes, its layout {namespace.layout.block_bytes}")
        if (expected := header._values(record_bytes)) != values:
            raise Invalid(f"segment header fields {values[4:]} do not fit together; expected {expected[4:]}")
        return header

    def _values(self, record_bytes: int) -> tuple[Any, ...]:
        """The fields in their order on the page."""
        shape, namespace = self.geometry, self.namespace
        return (
            *(MAGIC, VERSION, int(self.medium), self.segment_id, namespace.id, namespace.layout.fingerprint),
            *(self.epoch, self.created_ns, shape.payload_bytes, shape.slot_bytes, shape.slot_count, record_bytes),
            *(shape.state_offset, shape.holders_offset, shape.identity_offset, shape.recency_offset),
            0,  # where slot 0 is, in the second descriptor
            shape.total_bytes,
        )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
