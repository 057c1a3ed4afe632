"""Tokens of every cache layout as operands of the tensor cores.

A `KVLayout` arrives as a compile-time constant and says where the bytes lie and what they mean:
nothing about a single layout is written here. `load_tile` gives 128 dims of each token as bf16.
e4m3 and e2m1 numbers are exact in bf16, and so are their products with scales that are powers of
two (ue8m0) or e4m3 numbers beside e2m1 ones (2 bits times 4 bits). Scales in float32 stay outside:
one per 128 dims (`load_scales`), per token or per tensor (`load_factors`).

bf16 has float32's range, with 2^-133 as its smallest number: an e4m3 number under the two smallest
ue8m0 scales may lose bits below that, and one above 2^128 is infinite, as it is in float32.

Invalid entries are masked at the load: never read, their bytes and scales count as zero.
"""

import triton
import triton.language as tl

# Under the interpreter tl.dot takes bf16 operands for raw bit patterns (Triton 3.6 to 3.9) and
# answers off by 1e10; float32 operands are computed right. Inline PTX cannot be interpreted.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


# ------------------------------------------------------------------ what a layout asks for
@triton.constexpr_function
def exact_scales(layout):
    """The type of the scales that are multiplied into the values; "" for none."""
    if layout.scales is None or layout.scales.dtype == "fp32":
        return ""
    return layout.scales.dtype


@triton.constexpr_function
def scaled_outside(layout):
    """Whether there is a float32 scale for every 128 dims."""
    return layout.scales is not None and layout.scales.dtype == "fp32"


@triton.constexpr_function
def any_quantised(*layouts):
    return any(layout is not None and layout.quantised for layout in layouts)


@triton.constexpr_function
def any_scaled_outside(*layouts):
    return any(layout is not None and scaled_outside(layout) for layout in layouts)


@triton.constexpr_function
def has_factor(layout):
    """Whether tokens have a float32 scale of their own, or all of them share one."""
    return layout.outer is not None or layout.tensor_scale


@triton.constexpr_function
def rope_dims(layout):
    """Dims of a key beyond the values."""
    return layout.d_qk - layout.d_v


@triton.constexpr_function
def rope_in_values(layout):
    """Whether the last of the 512 dims of the values are the RoPE part."""
    return layout.latent.count < layout.d_v


@triton.constexpr_function
def rope_in_latent(layout):
    """Whether the dims beyond the values are numbers like the others."""
    return layout.latent.count > layout.d_v


@triton.constexpr_function
def lines_of_row(layout):
    """128-byte lines that a row aligned to 16 bytes touches at most."""
    return (112 + layout.row_bytes + 127) // 128


# ------------------------------------------------------------------ number formats
@triton.jit
def to_bf16(x):
    """float32 to bf16, to nearest even; the interpreter's cast truncates (Triton 3.6 to 3.9)."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def decode_e4m3(byte, HARDWARE_FP8: tl.constexpr):
    """e4m3 codes as bf16, exact."""
    if INTERPRET:
        # The bits shifted into a float32 are the value times 2^-120 (bias 7 against 127).
        bits = byte.to(tl.int32)
        magnitude = bits & 0x7F
        value = (((bits & 0x80) << 24) | (magnitude << 20)).to(tl.float32, bitcast=True)
        value = tl.where(magnitude == 0x7F, float("nan"), value * 1.329227995784916e36)
        return value.to(tl.bfloat16)
    # Impure on purpose: a pure cast is repeated for the operand layout of each of the two
    # products, and its bytes are then read from shared memory one by one (1.3x slower).
    elif HARDWARE_FP8:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 lo, hi, h0, h1, h2, h3;
            .reg .b32 a, b;
            .reg .f32 f0, f1, f2, f3;
            mov.b32 {lo, hi}, $2;
            cvt.rn.f16x2.e4m3x2 a, lo;
            cvt.rn.f16x2.e4m3x2 b, hi;
            mov.b32 {h0, h1}, a;
            mov.b32 {h2, h3}, b;
            cvt.f32.f16 f0, h0;
            cvt.f32.f16 f1, h1;
            cvt.f32.f16 f2, h2;
            cvt.f32.f16 f3, h3;
            cvt.rn.bf16x2.f32 $0, f1, f0;
            cvt.rn.bf16x2.f32 $1, f3, f2;
            }""",
            "=r,=r,r",
            [byte],
            dtype=tl.bfloat16,
            is_pure=False,
            pack=4,
        )
    else:
        # sm_80 and sm_86 cannot convert e4m3. Two bytes at a time, moved to the top of 16-bit
        # lanes and shifted by 4, are bf16 numbers times 2^-120; the code 0x7f is NaN.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, m, n, s, t, c, d, z;
            mov.b32 z, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            and.b32 m, a, 0x7f007f00;
            and.b32 n, b, 0x7f007f00;
            and.b32 s, a, z;
            and.b32 t, b, z;
            shr.u32 c, m, 4;
            shr.u32 d, n, 4;
            or.b32 c, c, s;
            or.b32 d, d, t;
            mov.b32 s, 0x7b807b80;
            fma.rn.bf16x2 c, c, s, z;
            fma.rn.bf16x2 d, d, s, z;
            add.u32 m, m, 0x01000100;
            add.u32 n, n, 0x01000100;
            and.b32 m, m, z;
            and.b32 n, n, z;
            shr.u32 a, m, 8;
            shr.u32 b, n, 8;
            sub.u32 m, m, a;
            sub.u32 n, n, b;
            or.b32 $0, c, m;
            or.b32 $1, d, n;
            }""",
            "=r,=r,r",
            [byte],
            dtype=tl.bfloat16,
            is_pure=False,
            pack=4,
        )


@triton.jit
def e2m1_value(code):
    """An e2m1 code in an int32 as bf16; for the interpreter."""
    # The bits shifted into a float32 are the value times 2^-126 (bias 1 against 127).
    value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True)
    return (value * 8.507059173023462e37).to(tl.bfloat16)


@triton.jit
def decode_e2m1(byte):
    """[T, w] bytes of two e2m1 codes as bf16 [T, 2 w], exact."""
    if INTERPRET:
        even = e2m1_value(byte.to(tl.int32))
        odd = e2m1_value(byte.to(tl.int32) >> 4)
    else:
        # Codes in 16-bit lanes, exponent and mantissa shifted to where bf16 has them: the value
        # times 2^-126. Impure as in `decode_e4m3`.
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, m, s, t, z, c;
            mov.b32 z, 0x80008000;
            mov.b32 c, 0x7e807e80;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            and.b32 m, a, 0x00070007;
            shl.b32 m, m, 6;
            shl.b32 s, a, 12;
            and.b32 s, s, z;
            or.b32 m, m, s;
            fma.rn.bf16x2 $0, m, c, z;
            and.b32 m, b, 0x00070007;
            shl.b32 m, m, 6;
            shl.b32 s, b, 12;
            and.b32 s, s, z;
            or.b32 m, m, s;
            fma.rn.bf16x2 $1, m, c, z;
            and.b32 m, a, 0x00700070;
            shl.b32 m, m, 2;
            shl.b32 s, a, 8;
            and.b32 s, s, z;
            or.b32 m, m, s;
            fma.rn.bf16x2 $2, m, c, z;
            and.b32 m, b, 0x00700070;
            shl.b32 m, m, 2;
            shl.b32 s, b, 8;
            and.b32 s, s, z;
            or.b32 m, m, s;
            fma.rn.bf16x2 $3, m, c, z;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [byte],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=False,
            pack=4,
        )
    return tl.reshape(tl.join(even, odd), [byte.shape[0], 2 * byte.shape[1]])


@triton.jit
def decode_ue8m0(byte):
    """ue8m0 codes as bf16, exact: 0 is 2^-127, 255 is NaN."""
    byte = byte.to(tl.int16)
    bits = tl.where(byte == 0, 0x40, byte << 7)
    return tl.where(byte == 255, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def times(values, scales):
    """values * scales, both bf16, where bf16 holds the product."""
    if INTERPRET:
        return to_bf16(values.to(tl.float32) * scales.to(tl.float32))
    else:
        # Two products at once, before sm_90 too. Impure as in `decode_e4m3`.
        return tl.inline_asm_elementwise(
            "{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z;}",
            "=r,r,r",
            [values, scales],
            dtype=tl.bfloat16,
            is_pure=False,
            pack=2,
        )


# ------------------------------------------------------------------ where tokens are
@triton.jit
def load_slots(line, entry, limit):
    """The index list's entries, -1 past its end."""
    return tl.load(line + entry, mask=entry < limit, other=-1)


@triton.jit
def page_of(slot, page_magic, page_shift):
    """A slot's page, int64: slot // page_size by the launcher's numbers for it."""
    return (slot.to(tl.int64) * page_magic) >> page_shift


@triton.jit
def row_offset(slot, page, page_gap, TOKEN_STRIDE: tl.constexpr, PACKED: tl.constexpr):
    """Where a slot's row starts, bytes, int64; `page_gap`: what a page has beside its rows."""
    offset = slot.to(tl.int64) * TOKEN_STRIDE
    if not PACKED:
        offset += page * page_gap
    return offset


@triton.jit
def footer_offset(slot, page, table_gap, table, LAYOUT: tl.constexpr):
    """Where a slot's entry of its page's scale table starts, bytes, int64."""
    return slot.to(tl.int64) * LAYOUT.footer_bytes + page * table_gap + table


@triton.jit
def prefetch(ptr, wanted):
    """Ask for the 128-byte lines at ptr to be brought into L2, where wanted."""
    if not INTERPRET:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
            "=r,l,r",
            [ptr.to(tl.int64), wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# ------------------------------------------------------------------ 128 dims of each token
@triton.jit
def interleave(tile):
    """A tile's 128 columns in the order of `column_dims`.

    A thread decodes 16 neighbouring bytes to two 16-byte pieces. In the dims' own order the pieces
    of 8 threads meet in the same banks when they are stored (136 us against 131 at 16 heads).
    """
    pieces = tl.reshape(tile, [tile.shape[0], 8, 2, 8])
    return tl.reshape(tl.permute(pieces, [0, 2, 1, 3]), [tile.shape[0], 128])


@triton.jit
def column_dims(INTERLEAVED: tl.constexpr):
    """[1, 128]: which of a tile's dims each of its columns holds; see `interleave`."""
    column = tl.arange(0, 128)
    if INTERLEAVED:
        column = column % 64 // 8 * 16 + column // 64 * 8 + column % 8
        column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
    return column[None, :]


@triton.jit
def tile_columns(tile, LAYOUT: tl.constexpr, MIXED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[1, w]: where the tile `tile` of 128 dims lies in a row, in bf16 numbers or in bytes."""
    if LAYOUT.latent.dtype == "bf16":
        columns = column_dims(INTERLEAVED) + tile * 128
    else:
        BYTES: tl.constexpr = 64 if LAYOUT.latent.dtype == "e2m1" else 128
        columns = tl.arange(0, BYTES // 2 if MIXED else BYTES)[None, :] + tile * BYTES
    return columns


@triton.jit
def load_tile(
    rows,  # [T] pointers to the tokens' rows
    scales,  # [T] pointers to what the scales' offset counts from
    mask,  # [T, 1]
    tile,  # which 128 of the 512 dims
    columns,  # its tile_columns
    LAYOUT: tl.constexpr,
    MIXED: tl.constexpr,  # the second half of the tile is the RoPE part
    INTERLEAVED: tl.constexpr,  # columns in the order of `column_dims`
    HARDWARE_FP8: tl.constexpr,
):
    """[T, 128] bf16; to be multiplied by `load_scales` or `load_factors` where there are any."""
    if LAYOUT.latent.dtype == "bf16":
        rows = rows.to(tl.pointer_type(tl.bfloat16))
    k = tl.load(rows[:, None] + columns, mask=mask, other=0)
    if LAYOUT.quantised:
        if LAYOUT.latent.dtype == "e2m1":
            k = decode_e2m1(k)
        else:
            k = decode_e4m3(k, HARDWARE_FP8)
        if MIXED:
            halves = tl.join(k, load_rope(rows, mask, LAYOUT))
            k = tl.reshape(tl.permute(halves, [0, 2, 1]), [rows.shape[0], 128])
        if exact_scales(LAYOUT) != "":
            k = times(k, load_exact_scales(scales, mask, tile, LAYOUT, HARDWARE_FP8))
        if INTERLEAVED:
            k = interleave(k)
    return k


@triton.jit
def load_exact_scales(scales, mask, tile, LAYOUT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """[T, 128] bf16: the scales of a tile's values, 1 for those of its RoPE part."""
    TILES: tl.constexpr = 128 // LAYOUT.tile
    number = (tl.arange(0, TILES) + tile * TILES)[None, :]
    at = (scales + LAYOUT.scales.offset)[:, None] + number
    code = tl.load(at, mask=mask & (number < LAYOUT.scales.count), other=0)
    if exact_scales(LAYOUT) == "ue8m0":
        scale = decode_ue8m0(code)
    else:
        scale = decode_e4m3(code, HARDWARE_FP8)
    scale = tl.where(number < LAYOUT.scales.count, scale, 1.0).to(tl.bfloat16)
    wide = tl.broadcast_to(scale[:, :, None], [scales.shape[0], TILES, LAYOUT.tile])
    return tl.reshape(wide, [scales.shape[0], 128])


@triton.jit
def load_rope(rows, mask, LAYOUT: tl.constexpr):
    """[T, 64] as it is stored: the RoPE part, or the dims of the latent beyond the values."""
    dims = tl.arange(0, 64)[None, :]
    if rope_in_latent(LAYOUT):
        at = rows[:, None] + (LAYOUT.d_v + dims)
    else:
        at = (rows + LAYOUT.rope.offset).to(tl.pointer_type(tl.bfloat16))[:, None] + dims
    return tl.load(at, mask=mask, other=0)


@triton.jit
def load_factors(rows, ok, tensor_scale, LAYOUT: tl.constexpr):
    """[T] float32: the tokens' own scales times that of the tensor."""
    factor = tl.full(rows.shape, 1.0, tl.float32)
    if LAYOUT.outer is not None:
        at = (rows + LAYOUT.outer.offset).to(tl.pointer_type(tl.float32))
        factor = tl.load(at, mask=ok, other=0.0)
    if LAYOUT.tensor_scale:
        factor *= tensor_scale
    return factor


@triton.jit
def load_scales(rows, mask, value_block, LAYOUT: tl.constexpr):
    """The tokens' four fp32 scales, in the order in which the program takes the tiles.

    One vector load a token; four loads each keep a register per column of S and thread (8 %
    slower at 64 heads, where they spill).
    """
    at = (rows + LAYOUT.scales.offset).to(tl.pointer_type(tl.float32))
    scales = tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(scales, [rows.shape[0], 2, 2]))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    swap = value_block == 1
    first = tl.where(swap, s2, s0)
    second = tl.where(swap, s3, s1)
    third = tl.where(swap, s0, s2)
    fourth = tl.where(swap, s1, s3)
    return first, second, third, fourth
