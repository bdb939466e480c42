"""The geometry of a block, and the namespace that keeps blocks of different geometry, model or owner apart."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import msgpack

from tierd.errors import Invalid

PAGE_BYTES, HUGE_PAGE_BYTES = 4096, 2 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "float8_e5m2": 1, "uint8": 1}
BLOCK_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class Layout:
    """Geometry of one block: `[layers, kv_parts, kv_heads, block_tokens, head_dim]` of `dtype`, plus scales.

    kv_parts is 2 (keys and values) or 1 (MLA latent); scale_bytes are added per block for quantised formats; shards is the
    tensor-parallel degree whose parts together make one block. `block_bytes` counts one block with all its shards.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = 16
    kv_parts: int = 2
    scale_bytes: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise Invalid(f"layout: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            floor = 0 if field.name == "scale_bytes" else 1
            if field.name != "dtype" and (type(value) is not int or not floor <= value < 1 << 31):
                raise Invalid(f"layout: {field.name} must be an integer from {floor} to 2^31 - 1, not {value!r}")
        if self.block_bytes > BLOCK_BYTES_MAX:
            raise Invalid(f"layout: a block of {self.block_bytes} bytes is over the maximum of {BLOCK_BYTES_MAX}")

    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block."""
        values = self.layers * self.kv_parts * self.kv_heads * self.block_tokens * self.head_dim
        return values * DTYPE_BYTES[self.dtype] + self.scale_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the block rounded up to a page, so that O_DIRECT can reach every slot."""
        return -(-self.block_bytes // PAGE_BYTES) * PAGE_BYTES

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that differ whenever any field does."""
        return hashlib.sha256(msgpack.packb(sorted(asdict(self).items()))).digest()[:16]

    def to_map(self) -> dict[str, Any]:
        """The layout as the wire and the segment header carry it."""
        return asdict(self)

    @classmethod
    def from_map(cls, values: Any) -> Layout:
        """Rebuild a layout from `to_map`'s output; raises Invalid with the key that is unknown, missing or wrong."""
        if not isinstance(values, dict):
            raise Invalid(f"layout must be a map, not {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(str(key) for key in set(values) - known):
            raise Invalid(f"layout: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if missing := sorted({"layers", "kv_heads", "head_dim", "dtype"} - set(values)):
            raise Invalid(f"layout: key {missing[0]!r} is missing")
        return cls(**values)


@dataclass(frozen=True)
class Namespace:
    """A trust domain plus model and layout: blocks never cross from one namespace to another.

    `model` is whatever distinguishes weights and everything else that changes KV bytes (name, revision, RoPE, KV dtype);
    the caller makes it up, tierd only compares it.
    """

    domain: str
    model: str
    layout: Layout

    def __post_init__(self) -> None:
        for name in ("domain", "model"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 1 <= len(value.encode()) <= 1024:
                raise Invalid(f"namespace: {name} must be a string of 1 to 1,024 bytes, not {str(value)[:80]!r}")

    @cached_property
    def id(self) -> bytes:
        """32-byte name of the namespace."""
        return hashlib.sha256(msgpack.packb([self.domain, self.model, self.layout.fingerprint])).digest()

    def record(self) -> bytes:
        """The namespace as a segment header carries it (MessagePack)."""
        packed: bytes = msgpack.packb({"domain": self.domain, "model": self.model, "layout": self.layout.to_map()})
        return packed

    @classmethod
    def from_record(cls, data: bytes) -> Namespace:
        """Rebuild a namespace from `record`'s output; raises Invalid."""
        try:
            values = msgpack.unpackb(data)
            return cls(values["domain"], values["model"], Layout.from_map(values["layout"]))
        except (ValueError, KeyError, TypeError) as error:
            raise Invalid(f"namespace record of {len(data)} bytes cannot be read: {error!r}") from error
