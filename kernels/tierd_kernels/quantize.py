"""Blocks in fewer bits: quantised when they are demoted, dequantised when they are promoted.

Three standard formats are parameters of one kernel. Numbers come in *groups* that share a scale:

    mxfp8   e4m3 numbers in groups of 32, whose scale is a power of two (e8m0)     8.25 bits a number
    mxfp4   e2m1 numbers in groups of 32, whose scale is a power of two (e8m0)     4.25 bits
    nvfp4   e2m1 numbers in groups of 16, whose scale is e4m3, times a float32     4.5 bits and a little

MX: Open Compute Project, Microscaling Formats (MX) Specification v1.0, 2023. NVFP4: NVIDIA, Pretraining Large Language Models
with NVFP4, 2025, https://arxiv.org/abs/2509.25149. The float32 of NVFP4 belongs to one part (keys or values) of one layer of
one block, so that a block can be read by itself.

A group runs along the vector of one head and token (`axis="dim"`) or along the tokens of one channel (`axis="tokens"`, as
KIVI does for keys, https://arxiv.org/abs/2402.02750), and never beyond a block. A packed block is `[values][scales][float32
of each part]`; values and scales lie group after group, two values of 4 bits in a byte, the first in its lower half.

Numbers must be finite. Rounding is to nearest, ties to even; a kernel and its twin agree in every bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl

TILE_NUMBERS = 4096
"""What a program quantises at a time: 32 numbers in each of 128 threads."""
E4M3_MAX = tl.constexpr(448.0)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
E4M3_ULP = tl.constexpr(2.0**-9)
"""Distance of e4m3 numbers below the least normal one."""
ROUND_TO_ULP = tl.constexpr(2.0**14)
"""A float32 of this size has just that distance to its neighbours, so adding it rounds."""


@dataclass(frozen=True)
class Format:
    """How numbers are stored: `bits` each (8: e4m3, 4: e2m1), in groups of `group` whose scale is e8m0, or e4m3 and float32."""

    name: str
    bits: int
    group: int
    has_part_scale: bool

    @property
    def number_max(self) -> float:
        """The largest number before scaling."""
        return 448.0 if self.bits == 8 else 6.0

    @property
    def exponent_max(self) -> int:
        """The exponent of the largest number."""
        return 8 if self.bits == 8 else 2

    @property
    def headroom(self) -> float:
        """What a group's largest number is multiplied by before its exponent is taken, so that none becomes too large.

        MX proposes 1, which cuts off what lies between `number_max` and the next power of two. A little less than exact, so
        that `number_max` itself keeps its scale: what was packed before is packed the same again.
        """
        return 2.0 ** (self.exponent_max + 1) / self.number_max * (1 - 2.0**-20)

    def packed_bytes(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Bytes of one packed block of `shape`, `[parts, heads, tokens, dim]`."""
        numbers = prod(shape)
        return numbers * self.bits // 8 + numbers // self.group + (4 * shape[0] if self.has_part_scale else 0)


MXFP8 = Format("mxfp8", bits=8, group=32, has_part_scale=False)
MXFP4 = Format("mxfp4", bits=4, group=32, has_part_scale=False)
NVFP4 = Format("nvfp4", bits=4, group=16, has_part_scale=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (MXFP8, MXFP4, NVFP4)


def quantize(blocks: torch.Tensor, packed: torch.Tensor, format: Format, axis: str = "dim") -> None:
    """Pack `blocks[i]` into `packed[i]`, for every i.

    `blocks` is `[blocks, parts, heads, tokens, dim]` of float32, bfloat16 or float16, contiguous within a block; parts are
    those of all layers. `packed` is `uint8[blocks, bytes]`, contiguous by row, with `format.packed_bytes` or more a row.
    Raises ValueError when a group would straddle vectors or blocks, and when shapes or dtypes are others.
    """
    (quantize_kernel if blocks.is_cuda else quantize_twin)(blocks, packed, format, axis)


def dequantize(packed: torch.Tensor, blocks: torch.Tensor, format: Format, axis: str = "dim") -> None:
    """Unpack `packed[i]` into `blocks[i]`, for every i; otherwise as `quantize`."""
    (dequantize_kernel if blocks.is_cuda else dequantize_twin)(packed, blocks, format, axis)


def quantize_kernel(blocks: torch.Tensor, packed: torch.Tensor, format: Format, axis: str = "dim") -> None:
    """`quantize` as one launch, which reads numbers from memory once."""
    if len(blocks):
        _quantize[(len(blocks), blocks.shape[1])](blocks, packed, *_arguments(blocks, packed, format, axis))


def dequantize_kernel(packed: torch.Tensor, blocks: torch.Tensor, format: Format, axis: str = "dim") -> None:
    """`dequantize` as one launch."""
    if len(blocks):
        _dequantize[(len(blocks), blocks.shape[1])](blocks, packed, *_arguments(blocks, packed, format, axis))


def quantize_twin(blocks: torch.Tensor, packed: torch.Tensor, format: Format, axis: str = "dim") -> None:
    """`quantize` in plain torch."""
    _check(blocks, packed, format, axis)
    groups = _groups(blocks, format, axis).float().flatten(2, -2)
    highest = groups.abs().amax(-1)
    rest = []
    if format.has_part_scale:
        part_scale = highest.amax(-1, keepdim=True) / (format.number_max * 448.0)
        part_scale = torch.where(part_scale == 0.0, 1.0, part_scale)
        scales = _to_e4m3(highest / format.number_max / part_scale)
        unit = _from_e4m3(scales) * part_scale
        scaled = groups / torch.where(unit == 0.0, 1.0, unit)[..., None]
        rest = [part_scale.flatten(1).view(torch.uint8)]
    else:
        scales = _to_e8m0(highest, format)
        scaled = groups * _from_e8m0(254 - scales)[..., None]
    codes = _to_e4m3(scaled) if format.bits == 8 else _to_e2m1(scaled)
    if format.bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    row = torch.cat([codes.to(torch.uint8).flatten(1), scales.to(torch.uint8).flatten(1), *rest], dim=1)
    packed[:, : row.shape[1]] = row


def dequantize_twin(packed: torch.Tensor, blocks: torch.Tensor, format: Format, axis: str = "dim") -> None:
    """`dequantize` in plain torch."""
    _check(blocks, packed, format, axis)
    groups = _groups(blocks, format, axis)
    numbers = prod(blocks.shape[1:])
    values, scales, rest = packed[:, : format.packed_bytes(blocks.shape[1:])].split_with_sizes(
        [numbers * format.bits // 8, numbers // format.group, 4 * blocks.shape[1] if format.has_part_scale else 0], dim=1
    )
    codes = values.int() if format.bits == 8 else torch.stack([values & 15, values >> 4], dim=-1).int()
    codes = codes.reshape(*blocks.shape[:2], -1, format.group)
    units = scales.int().reshape(codes.shape[:-1])
    unit = _from_e8m0(units)
    if format.has_part_scale:
        unit = _from_e4m3(units) * rest.contiguous().view(torch.float32)[..., None]
    restored = (_from_e4m3(codes) if format.bits == 8 else _from_e2m1(codes)) * unit[..., None]
    groups.copy_(restored.reshape(groups.shape))


def _to_e4m3(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).int()


def _from_e4m3(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def _to_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    # Halfway between two neighbours the one with the even code is nearest.
    size = numbers.abs().contiguous()
    below = torch.bucketize(size, torch.tensor([0.25, 1.25, 2.5, 5.0], device=size.device))
    at_or_below = torch.bucketize(size, torch.tensor([0.75, 1.75, 3.5], device=size.device), right=True)
    return below.int() + at_or_below.int() + 8 * numbers.signbit().int()


def _from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat((sizes, -sizes))[codes]


def _to_e8m0(highest: torch.Tensor, format: Format) -> torch.Tensor:
    exponent = torch.frexp(highest * format.headroom).exponent - 1 - format.exponent_max
    return torch.where(highest == 0.0, 1, (exponent + 127).clamp_min(1))


def _from_e8m0(codes: torch.Tensor) -> torch.Tensor:
    return (codes << 23).int().view(torch.float32)


def _arguments(blocks: torch.Tensor, packed: torch.Tensor, format: Format, axis: str) -> tuple[object, ...]:
    """What both kernels take."""
    _check(blocks, packed, format, axis)
    parts, heads, tokens, dim = blocks.shape[1:]
    part_groups = heads * tokens * dim // format.group
    return (
        blocks.stride(0),
        packed.stride(0),
        parts,
        part_groups,
        format.group,
        format.bits,
        1 if axis == "dim" else dim,
        format.has_part_scale,
        format.exponent_max,
        format.number_max,
        format.headroom,
        min(TILE_NUMBERS // format.group, triton.next_power_of_2(part_groups)),
    )


def _groups(blocks: torch.Tensor, format: Format, axis: str) -> torch.Tensor:
    """A view of the blocks whose last axis is a group's numbers."""
    if axis == "dim":
        return blocks.unflatten(4, (-1, format.group))
    return blocks.unflatten(3, (-1, format.group)).transpose(4, 5)


def _check(blocks: torch.Tensor, packed: torch.Tensor, format: Format, axis: str) -> None:
    if axis not in ("dim", "tokens"):
        raise ValueError(f"{format.name}: axis {axis!r} is neither 'dim' nor 'tokens'")
    if blocks.dim() != 5 or not blocks[:1].is_contiguous() or blocks.dtype not in DTYPES:
        raise ValueError(
            f"{format.name}: {blocks.dtype} {tuple(blocks.shape)} with strides {blocks.stride()}; float "
            "[blocks, parts, heads, tokens, dim], contiguous within a block, is needed"
        )
    tokens, dim = blocks.shape[3:]
    if axis == "dim" and dim % format.group:
        raise ValueError(
            f"{format.name}: groups of {format.group} along vectors of {dim} numbers would straddle vectors; "
            f"{_others(format, dim)}"
        )
    if axis == "tokens" and tokens % format.group:
        raise ValueError(
            f"{format.name}: groups of {format.group} tokens would straddle blocks of {tokens} tokens; "
            f"{_others(format, tokens)}, make blocks of a multiple of {format.group} tokens, or group along 'dim'"
        )
    needed = format.packed_bytes(blocks.shape[1:])
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.stride(1) != 1 or packed.shape[1] < needed:
        raise ValueError(
            f"{format.name}: {packed.dtype} {tuple(packed.shape)} for packed blocks; uint8[blocks, {needed} or more] is needed"
        )
    part_scales_at = needed - 4 * blocks.shape[1]
    if format.has_part_scale and (packed.stride(0) % 4 or packed.data_ptr() % 4 or part_scales_at % 4):
        raise ValueError(
            f"{format.name}: packed blocks every {packed.stride(0)} bytes whose float32 begin at {part_scales_at}; "
            "multiples of 4 are needed"
        )


def _others(format: Format, length: int) -> str:
    """Formats that do not straddle."""
    names = [other.name for other in FORMATS if length % other.group == 0]
    return f"{' or '.join(names)} would not" if names else "no format fits"


@triton.jit
def _quantize(
    blocks,
    packed,
    block_stride,
    packed_stride,
    parts,
    part_groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_PART_SCALE: tl.constexpr,
    EXPONENT_MAX: tl.constexpr,
    NUMBER_MAX: tl.constexpr,
    HEADROOM: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Program (block, part) packs one part, GROUPS groups at a time. STEP is from number to number of a group."""
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers_at = blocks + block * block_stride + part * part_groups * GROUP
    values_at, scales_at, part_scale_at = _packed(packed + block * packed_stride, parts, part, part_groups, GROUP, BITS)
    if HAS_PART_SCALE:
        # The part is read twice; the second time it comes from a cache.
        highest_each = tl.full((GROUPS,), 0.0, tl.float32)
        for start in range(0, part_groups, GROUPS):
            at, inside = _tile(start, part_groups, GROUP, STEP, GROUPS)
            numbers = tl.load(numbers_at + at, mask=inside, other=0.0).to(tl.float32)
            highest_each = tl.maximum(highest_each, tl.max(tl.abs(numbers), 1))
        part_scale = tl.div_rn(tl.max(highest_each, 0), NUMBER_MAX * E4M3_MAX)
        part_scale = tl.where(part_scale == 0.0, 1.0, part_scale)
        tl.store(part_scale_at, part_scale)
    for start in range(0, part_groups, GROUPS):
        at, inside = _tile(start, part_groups, GROUP, STEP, GROUPS)
        numbers = tl.load(numbers_at + at, mask=inside, other=0.0).to(tl.float32)
        highest = tl.max(tl.abs(numbers), 1)
        if HAS_PART_SCALE:
            scale = _encode_e4m3(tl.div_rn(tl.div_rn(highest, NUMBER_MAX), part_scale))
            unit = _decode_e4m3(scale) * part_scale
            scaled = tl.div_rn(numbers, tl.where(unit == 0.0, 1.0, unit)[:, None])
        else:
            scale = tl.maximum(_exponent(highest * HEADROOM) - EXPONENT_MAX, 1)
            scaled = numbers * _decode_e8m0(254 - scale)[:, None]
        group = start + tl.arange(0, GROUPS)
        tl.store(scales_at + group, scale.to(tl.uint8), mask=group < part_groups)
        if BITS == 8:
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            tl.store(values_at + at, _encode_e4m3(scaled).to(tl.uint8), mask=inside)
        else:
            low, high = tl.split(tl.reshape(_encode_e2m1(scaled), (GROUPS, GROUP // 2, 2)))
            at = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
            tl.store(values_at + at, (low | high << 4).to(tl.uint8), mask=(group < part_groups)[:, None])


@triton.jit
def _dequantize(
    blocks,
    packed,
    block_stride,
    packed_stride,
    parts,
    part_groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_PART_SCALE: tl.constexpr,
    EXPONENT_MAX: tl.constexpr,
    NUMBER_MAX: tl.constexpr,
    HEADROOM: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Program (block, part) unpacks one part; arguments as in `_quantize`."""
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers_at = blocks + block * block_stride + part * part_groups * GROUP
    values_at, scales_at, part_scale_at = _packed(packed + block * packed_stride, parts, part, part_groups, GROUP, BITS)
    for start in range(0, part_groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        scale = tl.load(scales_at + group, mask=group < part_groups, other=0).to(tl.int32)
        unit = _decode_e4m3(scale) * tl.load(part_scale_at) if HAS_PART_SCALE else _decode_e8m0(scale)
        to, inside = _tile(start, part_groups, GROUP, STEP, GROUPS)
        if BITS == 8:
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            numbers = _decode_e4m3(tl.load(values_at + at, mask=inside, other=0).to(tl.int32))
        else:
            at = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
            pairs = tl.load(values_at + at, mask=(group < part_groups)[:, None], other=0).to(tl.int32)
            numbers = _decode_e2m1(tl.reshape(tl.join(pairs & 15, pairs >> 4), (GROUPS, GROUP)))
        tl.store(numbers_at + to, (numbers * unit[:, None]).to(blocks.dtype.element_ty), mask=inside)


@triton.jit
def _packed(row, parts, part, part_groups, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Where a part's values, scales and float32 are in a packed block."""
    part_bytes = part_groups * (GROUP * BITS // 8)
    scales = row + parts * part_bytes
    part_scale = (scales + parts * part_groups).to(tl.pointer_type(tl.float32)) + part
    return row + part * part_bytes, scales + part * part_groups, part_scale


@triton.jit
def _tile(start, part_groups, GROUP: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr):
    """Places of the numbers `[GROUPS, GROUP]` of some groups within a part, and which of them exist."""
    group = (start + tl.arange(0, GROUPS))[:, None]
    number = tl.arange(0, GROUP)[None, :]
    at = group // STEP * (GROUP * STEP) + group % STEP + number * STEP
    return at, (group < part_groups) & (number < GROUP)


@triton.jit
def _exponent(numbers):
    """The exponent of positive float32 numbers, biased by 127."""
    return numbers.to(tl.int32, bitcast=True) >> 23


@triton.jit
def _decode_e8m0(codes):
    """2 to the power of codes - 127, for codes of 1 to 254."""
    return (codes << 23).to(tl.float32, bitcast=True)


@triton.jit
def _encode_e4m3(numbers):
    """The e4m3 codes of numbers, to the nearest, ties to even; what is too large becomes 448."""
    sign = (numbers.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(numbers), E4M3_MAX)
    bits = size.to(tl.int32, bitcast=True)
    # 20 of 23 bits of the mantissa go; the exponent's bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + ROUND_TO_ULP).to(tl.int32, bitcast=True) & 0xF
    return sign | tl.where(size < E4M3_MIN_NORMAL, small, normal)


@triton.jit
def _decode_e4m3(codes):
    """The numbers of e4m3 codes."""
    size = codes & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * E4M3_ULP, normal)
    return tl.where((codes & 0x80) != 0, -number, number)


@triton.jit
def _encode_e2m1(numbers):
    """The e2m1 codes of numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6), to the nearest, ties to even; what is too large becomes 6."""
    size = tl.abs(numbers)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    return code | ((numbers.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _decode_e2m1(codes):
    """The numbers of e2m1 codes."""
    size = codes & 7
    # An exponent of two bits and a mantissa of one, as float32 has them; 1 is the only one below the normal ones.
    normal = ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where((codes & 8) != 0, -number, number)
