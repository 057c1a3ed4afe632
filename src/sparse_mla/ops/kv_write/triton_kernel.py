"""The portable Triton kernel of the cache's writer: quantise and scatter in one pass.

A program reads BLOCK_N tokens, [BLOCK_N, TILES, TILE] latent values at once, and stores each
token's fields where its slot says: the page's address, 64 bits, plus the token's offset in it. It
writes the very bytes of `KVLayout.pack`: where that divides, the number stored here is the one next
to the IEEE quotient.

What it takes are instructions per value, not bytes: a first version with 28 of them, for IEEE
quotients and checks for NaN one by one, took 87 us for 131072 tokens of v32_fp8 on an H200; with 18
it takes 74, and a copy of as many bytes 59.
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
    footers_at,
    PAGE_SHIFT: tl.constexpr,  # log2 of page_size, -1 where it is no power of two
    FEW_SLOTS: tl.constexpr,  # slots fit 32 bits
    TOKEN_STRIDE: tl.constexpr,
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
    there = token < n
    slot = tl.load(slots + token, mask=there, other=-1)
    keep = (slot >= 0) & (slot < num_slots)
    slot = tl.where(keep, slot, 0)
    if FEW_SLOTS:
        slot = slot.to(tl.int32)
    if PAGE_SHIFT >= 0:
        page = slot >> PAGE_SHIFT
        offset = slot & ((1 << PAGE_SHIFT) - 1)
    else:
        page = slot // page_size
        offset = slot - page * page_size
    start = pages + page.to(tl.int64) * page_stride
    row = start + offset.to(tl.int64) * TOKEN_STRIDE
    footer = row
    if FOOTER_BYTES:
        footer = start + footers_at + offset.to(tl.int64) * FOOTER_BYTES

    tile = tl.arange(0, TILES)[None, :, None]
    column = tile * TILE + tl.arange(0, TILE)[None, None, :]
    mask = keep[:, None, None] & (tile < COUNT)
    at = token.to(tl.int64)[:, None, None] * latent_stride + column
    # Without the slot in its mask: neither load waits for the other.
    values = tl.load(latent + at, mask=there[:, None, None] & (tile < COUNT), other=0.0)
    if NUMBER == "bf16":
        to = (row.to(tl.pointer_type(tl.bfloat16))[:, None, None]) + column
        tl.store(to, as_bf16(values), mask=mask)
    else:
        x = to_float(values)
        to = row[:, None, None] + column
        if SCALE == "":
            scale = tl.load(tensor_scale)
            inverse = tl.div_rn(tl.full([1, 1, 1], 1.0, tl.float32), scale)
            usable = (tl.abs(scale) > 7.9e-31) & (tl.abs(scale) < 1.2e30)
            inverse = tl.where(usable, inverse, float("nan"))
            tl.store(to, divide_to_e4m3(x, scale, inverse, False, HARDWARE_FP8), mask=mask)
        elif NUMBER == "e4m3":
            scale = e4m3_scale(finite_amax(x), POW2)
            inverse = tl.div_rn(tl.full([1, 1, 1], 1.0, tl.float32), scale)
            tl.store(to, divide_to_e4m3(x, scale, inverse, POW2, HARDWARE_FP8), mask=mask)
            store_scales(footer, scale, keep, SCALE, SCALES_AT, COUNT, TILES)
        else:
            amax = finite_amax(x)
            outer = 1.0
            if OUTER_AT >= 0:
                outer = outer_scale(tl.max(amax, axis=1, keep_dims=True))
                outer_to = (row + OUTER_AT).to(tl.pointer_type(tl.float32))[:, None, None]
                tl.store(outer_to, outer, mask=keep[:, None, None])
            if tensor_scale is not None:
                outer = tl.load(tensor_scale)
            scale = e2m1_scale(amax, outer)
            q, sign = quotient(x, scale * outer)
            code = to_e2m1(q, sign)
            even, odd = tl.split(tl.reshape(code, [BLOCK_N, TILES, TILE // 2, 2]))
            half = tile * (TILE // 2) + tl.arange(0, TILE // 2)[None, None, :]
            tl.store(row[:, None, None] + half, (even | (odd << 4)).to(tl.uint8), mask=mask)
            largest = tl.max(x.to(tl.uint32, bitcast=True) << 1, axis=2, keep_dims=True)
            stored = tl.where(largest >= 0xFF000000, float("nan"), scale)
            store_scales(footer, stored, keep, SCALE, SCALES_AT, COUNT, TILES)

    if D_ROPE:
        column = tl.arange(0, D_ROPE)[None, :]
        at = token.to(tl.int64)[:, None] * rope_stride + column
        values = tl.load(rope + at, mask=there[:, None], other=0.0)
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
            code = to_e4m3(scale)
        tl.store(start[:, None, None] + (SCALES_AT + tile), code, mask=mask)


@triton.jit
def finite_amax(x):
    """Largest magnitude of the finite values along the last axis, kept as an axis of one.

    Without its sign, and 2^24 added, a number that is not finite wraps to less than any that is:
    two instructions a value, where comparing with infinity takes three.
    """
    top = tl.max((x.to(tl.uint32, bitcast=True) << 1) + 0x01000000, axis=2, keep_dims=True)
    top = tl.maximum(top, 0x01000000) - 0x01000000
    return (top >> 1).to(tl.float32, bitcast=True)


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
def e2m1_scale(amax, outer):
    """amax / 6 / outer rounded to e4m3, between 2^-9 and 448; 1 for zeros."""
    want = tl.div_rn(amax, tl.zeros_like(amax) + 6.0)
    want = tl.div_rn(want, tl.zeros_like(amax) + outer)
    want = tl.minimum(tl.maximum(want, 0.001953125), 448.0)
    bits = to_e4m3(want).to(tl.uint32)
    # Positive; the bits shifted into a float32 are the value times 2^-120.
    scale = (bits << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def quotient(x, divisor):
    """x / divisor as IEEE has it, but for a sign of zero and infinity; and one with the right sign.

    One division a tile, then Markstein's two corrections: each takes the exact remainder, which
    small divisors are scaled up for, as it has to be a normal number. A zero loses its sign and
    infinity becomes NaN in them, so the uncorrected quotient goes along; it is NaN only where x is.
    |divisor| is between 2^-126 and 2^126.
    """
    if INTERPRET:
        return x / divisor, x / divisor
    else:
        up = tl.where(tl.abs(divisor) < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)
        divisor = divisor * up
        inverse = tl.div_rn(tl.zeros_like(divisor) + 1.0, divisor)
        x = x * up
        first = x * inverse
        q = tl.fma(tl.fma(-first, divisor, x), inverse, first)
        return tl.fma(tl.fma(-q, divisor, x), inverse, q), first


# x / scale between two products with an inverse that is a little too small, $5 to $8, or too large,
# $9 to $12. Where both make the same four bytes, so does the quotient, which is rare to fail: 1e-5
# of all values. There, and where x is not finite, divide.
_DIVIDE = tl.constexpr("""{
    .reg .f32 a, b, c, d, z;
    .reg .b16 lo, hi;
    .reg .b32 low, high;
    .reg .pred p, q;
    mul.rn.f32 a, $1, $5;
    mul.rn.f32 b, $2, $6;
    mul.rn.f32 c, $3, $7;
    mul.rn.f32 d, $4, $8;
    cvt.rn.satfinite.e4m3x2.f32 lo, b, a;
    cvt.rn.satfinite.e4m3x2.f32 hi, d, c;
    mov.b32 low, {lo, hi};
    mul.rn.f32 a, $1, $9;
    mul.rn.f32 b, $2, $10;
    mul.rn.f32 c, $3, $11;
    mul.rn.f32 d, $4, $12;
    cvt.rn.satfinite.e4m3x2.f32 lo, b, a;
    cvt.rn.satfinite.e4m3x2.f32 hi, d, c;
    mov.b32 high, {lo, hi};
    mul.rn.f32 z, $1, 0f00000000;
    fma.rn.f32 z, $2, 0f00000000, z;
    fma.rn.f32 z, $3, 0f00000000, z;
    fma.rn.f32 z, $4, 0f00000000, z;
    setp.ne.b32 p, low, high;
    setp.nan.or.f32 q, z, z, p;
    @!q bra DONE;
    div.rn.f32 a, $1, $13;
    div.rn.f32 b, $2, $14;
    div.rn.f32 c, $3, $15;
    div.rn.f32 d, $4, $16;
    testp.finite.f32 p, $1;
    selp.f32 a, a, 0f7FFFFFFF, p;
    testp.finite.f32 p, $2;
    selp.f32 b, b, 0f7FFFFFFF, p;
    testp.finite.f32 p, $3;
    selp.f32 c, c, 0f7FFFFFFF, p;
    testp.finite.f32 p, $4;
    selp.f32 d, d, 0f7FFFFFFF, p;
    cvt.rn.satfinite.e4m3x2.f32 lo, b, a;
    cvt.rn.satfinite.e4m3x2.f32 hi, d, c;
    mov.b32 low, {lo, hi};
    DONE:
    mov.b32 $0, low;
}""")

# x times a power of two, $5 to $8, which is exact; NaN where x is not finite.
_MULTIPLY = tl.constexpr("""{
    .reg .f32 a, b, c, d, z;
    .reg .b16 lo, hi;
    .reg .b32 low;
    .reg .pred p, q;
    mul.rn.f32 a, $1, $5;
    mul.rn.f32 b, $2, $6;
    mul.rn.f32 c, $3, $7;
    mul.rn.f32 d, $4, $8;
    cvt.rn.satfinite.e4m3x2.f32 lo, b, a;
    cvt.rn.satfinite.e4m3x2.f32 hi, d, c;
    mov.b32 low, {lo, hi};
    mul.rn.f32 z, $1, 0f00000000;
    fma.rn.f32 z, $2, 0f00000000, z;
    fma.rn.f32 z, $3, 0f00000000, z;
    fma.rn.f32 z, $4, 0f00000000, z;
    setp.nan.f32 q, z, z;
    @!q bra DONE;
    testp.finite.f32 p, $1;
    selp.f32 a, a, 0f7FFFFFFF, p;
    testp.finite.f32 p, $2;
    selp.f32 b, b, 0f7FFFFFFF, p;
    testp.finite.f32 p, $3;
    selp.f32 c, c, 0f7FFFFFFF, p;
    testp.finite.f32 p, $4;
    selp.f32 d, d, 0f7FFFFFFF, p;
    cvt.rn.satfinite.e4m3x2.f32 lo, b, a;
    cvt.rn.satfinite.e4m3x2.f32 hi, d, c;
    mov.b32 low, {lo, hi};
    DONE:
    mov.b32 $0, low;
}""")


@triton.jit
def divide_to_e4m3(x, scale, inverse, POW2: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """x / scale as e4m3 bytes, saturated; what is not finite as NaN. `inverse`: 1 / scale.

    An inverse of NaN says that 1 / scale is no number to multiply by.
    """
    if INTERPRET or not HARDWARE_FP8:
        if INTERPRET:
            q = x / scale
        elif POW2:
            q = x * inverse
        else:
            q = tl.div_rn(x, tl.zeros_like(x) + scale)
        return to_e4m3(tl.where(tl.abs(x) < float("inf"), q, float("nan")))
    elif POW2:
        return tl.inline_asm_elementwise(
            _MULTIPLY, "=r,r,r,r,r,r,r,r,r", [x, inverse], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        # 1 -+ 2^-22: more than the inverse's own rounding. NaN and 0 make different bytes.
        low = inverse * 0.9999997615814209
        high = tl.where(inverse == inverse, inverse * 1.000000238418579, 0.0)
        return tl.inline_asm_elementwise(
            _DIVIDE,
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [x, low, high, scale],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def to_e4m3(x):
    """float32 as e4m3 bytes, to nearest even, saturated at +-448; NaN as 0x7f."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Below 2^-6 codes are multiples of 2^-9: the spacing of float32 at 2^14.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(x == x, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def to_e2m1(x, sign):
    """float32 as e2m1 codes, int32, to nearest, ties to the even code, saturated.

    `sign` has the sign; where it is NaN the code is 0, where only x is, it is the largest.
    """
    size = tl.minimum(tl.abs(x), 6.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 252
    # Below 1 codes are multiples of a half: the spacing of float32 at 2^22.
    small = (size + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    code = tl.where(size < 1.0, small, normal)
    code = code | ((sign.to(tl.int32, bitcast=True) >> 28) & 8)
    return tl.where(sign == sign, code, 0)
