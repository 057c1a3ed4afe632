"""The portable Triton kernel of the cache's writer: quantise and scatter in one pass.

A program reads BLOCK_N tokens, [BLOCK_N, TILES, TILE] latent values at once, and stores each
token's fields where its slot says: the page's address, 64 bits, plus the token's offset in it. It
writes the very bytes of `KVLayout.pack`: where that divides, the quotient here is the IEEE one.
"""

import triton
import triton.language as tl

from ..sparse_decode.triton_kernel import INTERPRET, to_bf16


@triton.jit
def write_tokens(
    latent,  # [n, latent width] floats
    rope,  # [n, RoPE width] floats, or None
    slots,  # [n] int32 or int64
    tensor_scale,  # [1] float32, or None
    pages,  # [num_pages, page bytes] uint8
    n,
    latent_stride,
    rope_stride,
    num_slots,
    page_size,
    page_stride,
    FEW_SLOTS: tl.constexpr,  # slots fit 32 bits
    TOKEN_STRIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FOOTER_BYTES: tl.constexpr,
    NUMBER: tl.constexpr,  # "e4m3", "e2m1" or "bf16"
    SCALE: tl.constexpr,  # "fp32", "ue8m0", "e4m3" or ""
    POW2: tl.constexpr,  # scales are rounded up to a power of two
    SCALES_AT: tl.constexpr,
    OUTER_AT: tl.constexpr,  # -1: none
    ROPE_AT: tl.constexpr,
    D_ROPE: tl.constexpr,
    COUNT: tl.constexpr,  # tiles
    TILES: tl.constexpr,  # the power of two above
    TILE: tl.constexpr,
    ROW_GAPS: tl.constexpr,  # offsets of the bytes that no field covers
    FOOTER_GAPS: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + token, mask=token < n, other=-1)
    keep = (slot >= 0) & (slot < num_slots)
    slot = tl.where(keep, slot, 0)
    if FEW_SLOTS:
        slot = slot.to(tl.int32)
    page = slot // page_size
    offset = slot - page * page_size
    start = pages + page.to(tl.int64) * page_stride
    row = start + offset.to(tl.int64) * TOKEN_STRIDE
    footer = row
    if FOOTER_BYTES:
        footer = start + page_size.to(tl.int64) * ROW_BYTES + offset.to(tl.int64) * FOOTER_BYTES
    scales_in = footer if FOOTER_BYTES else row

    tile = tl.arange(0, TILES)[None, :, None]
    column = tile * TILE + tl.arange(0, TILE)[None, None, :]
    mask = keep[:, None, None] & (tile < COUNT)
    at = token.to(tl.int64)[:, None, None] * latent_stride + column
    values = tl.load(latent + at, mask=mask, other=0.0)
    if NUMBER == "bf16":
        to = (row.to(tl.pointer_type(tl.bfloat16))[:, None, None]) + column
        tl.store(to, as_bf16(values), mask=mask)
    else:
        x = to_float(values)
        finite = tl.abs(x) < float("inf")
        if SCALE == "":
            scale = tl.load(tensor_scale)
            q = tl.div_rn(x, tl.zeros_like(x) + scale)
        else:
            amax = tl.max(tl.where(finite, tl.abs(x), 0.0), axis=2, keep_dims=True)
            if NUMBER == "e4m3":
                scale = e4m3_scale(amax, POW2)
                q = quotient(x, scale, POW2)
                stored = scale
            else:
                outer = 1.0
                if OUTER_AT >= 0:
                    outer = outer_scale(tl.max(amax, axis=1, keep_dims=True))
                    outer_to = (row + OUTER_AT).to(tl.pointer_type(tl.float32))[:, None, None]
                    tl.store(outer_to, outer, mask=keep[:, None, None])
                if tensor_scale is not None:
                    outer = tl.load(tensor_scale)
                scale = e2m1_scale(amax, outer, HARDWARE_FP8)
                q = tl.div_rn(x, tl.zeros_like(x) + scale * outer)
                lost = tl.max(tl.where(finite, 0, 1), axis=2, keep_dims=True) > 0
                stored = tl.where(lost, float("nan"), scale)
            store_scales(scales_in, stored, keep, SCALE, SCALES_AT, COUNT, TILES, HARDWARE_FP8)
        if NUMBER == "e4m3":
            code = to_e4m3(tl.where(finite, q, float("nan")), HARDWARE_FP8)
            tl.store(row[:, None, None] + column, code, mask=mask)
        else:
            code = tl.reshape(to_e2m1(q), [BLOCK_N, TILES, TILE // 2, 2])
            even, odd = tl.split(code)
            half = tile * (TILE // 2) + tl.arange(0, TILE // 2)[None, None, :]
            tl.store(row[:, None, None] + half, even | (odd << 4), mask=mask)

    if D_ROPE:
        column = tl.arange(0, D_ROPE)[None, :]
        at = token.to(tl.int64)[:, None] * rope_stride + column
        values = tl.load(rope + at, mask=keep[:, None], other=0.0)
        to = (row + ROPE_AT).to(tl.pointer_type(tl.bfloat16))[:, None] + column
        tl.store(to, as_bf16(values), mask=keep[:, None])
    clear(row, keep, ROW_GAPS)
    clear(footer, keep, FOOTER_GAPS)


@triton.jit
def as_bf16(values):
    """To nearest even; bf16 stays as it is, bits of a NaN included."""
    if values.dtype == tl.bfloat16:
        return values
    else:
        return to_bf16(to_float(values))


@triton.jit
def to_float(values):
    """To float32; the interpreter's cast doubles subnormal bf16 numbers (Triton 3.9)."""
    if INTERPRET and values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def clear(start, keep, BYTES: tl.constexpr):
    """Zero bytes that no field covers, as `pack` leaves them."""
    for i in tl.static_range(len(BYTES)):
        tl.store(start + BYTES[i], tl.zeros_like(keep).to(tl.uint8), mask=keep)


@triton.jit
def store_scales(
    start,
    scale,
    keep,
    SCALE: tl.constexpr,
    SCALES_AT: tl.constexpr,
    COUNT: tl.constexpr,
    TILES: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Scales [n, TILES, 1] as the layout stores them, the first COUNT of them."""
    tile = tl.arange(0, TILES)[None, :, None]
    mask = keep[:, None, None] & (tile < COUNT)
    if SCALE == "fp32":
        to = (start + SCALES_AT).to(tl.pointer_type(tl.float32))[:, None, None] + tile
        tl.store(to, scale, mask=mask)
    else:
        if SCALE == "ue8m0":
            # Powers of two that are normal numbers: their exponents.
            code = (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)
        else:
            code = to_e4m3(scale, HARDWARE_FP8)
        tl.store(start[:, None, None] + (SCALES_AT + tile), code, mask=mask)


@triton.jit
def e4m3_scale(amax, POW2: tl.constexpr):
    """amax / 448, at least the smallest normal number, 1 for zeros; or the power of two above."""
    scale = tl.maximum(tl.div_rn(amax, tl.zeros_like(amax) + 448.0), 1.1754943508222875e-38)
    if POW2:
        bits = scale.to(tl.uint32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def outer_scale(amax):
    """amax / (6 * 448), at least 2^-117, 1 for zeros."""
    scale = tl.maximum(tl.div_rn(amax, tl.zeros_like(amax) + 2688.0), 6.018531076210112e-36)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def e2m1_scale(amax, outer, HARDWARE_FP8: tl.constexpr):
    """amax / 6 / outer rounded to e4m3, between 2^-9 and 448; 1 for zeros."""
    want = tl.div_rn(amax, tl.zeros_like(amax) + 6.0)
    want = tl.div_rn(want, tl.zeros_like(amax) + outer)
    want = tl.minimum(tl.maximum(want, 0.001953125), 448.0)
    bits = to_e4m3(want, HARDWARE_FP8).to(tl.uint32)
    # Positive; the bits shifted into a float32 are the value times 2^-120.
    scale = (bits << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def quotient(x, scale, POW2: tl.constexpr):
    """x / scale, rounded to nearest even wherever that decides about the e4m3 number next to it.

    2^-126 <= scale < 2^120, |x| <= 448.1 scale or not finite.
    """
    if INTERPRET:
        return x / scale
    elif POW2:
        return x * tl.div_rn(tl.full([1], 1.0, tl.float32)[:, None, None], scale)
    else:
        # One division a tile, then Markstein's two corrections: each takes the exact remainder,
        # which small tiles are scaled up for, as it has to be a normal number.
        up = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)
        divisor = scale * up
        inverse = tl.div_rn(tl.full([1], 1.0, tl.float32)[:, None, None], divisor)
        x = x * up
        q = x * inverse
        q = tl.fma(tl.fma(-q, divisor, x), inverse, q)
        return tl.fma(tl.fma(-q, divisor, x), inverse, q)


@triton.jit
def to_e4m3(x, HARDWARE_FP8: tl.constexpr):
    """float32 as e4m3 bytes, to nearest even, saturated at +-448; NaN as 0x7f."""
    if HARDWARE_FP8 and not INTERPRET:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 lo, hi;
            cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;
            mov.b32 $0, {lo, hi};
            }""",
            "=r,r,r,r,r",
            [x],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        # Below 2^-6 codes are multiples of 2^-9: the spacing of float32 at 2^14.
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, small, normal)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(x == x, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def to_e2m1(x):
    """float32 as e2m1 codes, to nearest, ties to the even code, saturated; NaN as 0."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
    code += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(x == x, code | sign, 0).to(tl.uint8)
