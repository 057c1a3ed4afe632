"""The portable Triton kernels: attention over selected tokens, and the merge of split results.

One program attends BLOCK_H heads of one query token to one split of its index list, BLOCK_T
tokens at a time, with a running softmax in float32 (log2 domain).

FP8 caches: the e4m3 values go to the tensor cores as bf16, which holds them exactly, and the fp32
scales are applied outside the products, to S and to P, tile by tile of 128 dims:

    S = sum_g scale_g * (Q_g K_g^T)        out_g = (P * scale_g) K_g

so that the only roundings are P * scale to bf16 and the output to bf16. bf16 has float32's range:
no scale can overflow it. Each tile is normalised by the sum of its own rounded weights, so that
weights that all round the same way (a flat row, equal scales) leave no gain error.

Invalid entries are masked at the load: never read, their bytes and scales count as zero.

`triton_wgmma_kernel` does the same for FP8 caches on Hopper with the operands swapped.
"""

import triton
import triton.language as tl

# Under the interpreter tl.dot takes bf16 operands for raw bit patterns (Triton 3.6 to 3.9) and
# answers off by 1e10; float32 operands are computed right. Inline PTX cannot be interpreted.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 accumulation; bf16 operands, upcast where interpreted."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, acc)


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
def load_e4m3(ptr, mask, HARDWARE_FP8: tl.constexpr):
    """e4m3 bytes at ptr as bf16, exact; masked entries are 0."""
    byte = tl.load(ptr, mask=mask, other=0)
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
def reciprocal(x):
    """1 / x, and 0 where x is 0 or so small or large that it is no normal number."""
    usable = (tl.abs(x) > 1e-37) & (tl.abs(x) < 1e37)
    if INTERPRET:
        return tl.where(usable, 1.0 / tl.where(usable, x, 1.0), 0.0)
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.where(usable, inverse, 0.0)


@triton.jit
def tile_weights(p, scale, total):
    """P * scale rounded to bf16, and the running sum of the weights that this rounding stands for.

    A scale of 0, or one whose reciprocal is no normal number, leaves P as it is in the sum: the
    token's weight counts whatever its values in this tile are.
    """
    exact = p * scale[None, :]
    if INTERPRET:
        weights = to_bf16(exact)
        rounded = weights.to(tl.float32)
    else:
        # One packed conversion for two weights; the compiler's own cast and its way back are not.
        weights, rounded = tl.inline_asm_elementwise(
            """{
            cvt.rn.bf16x2.f32 $0, $4, $3;
            shl.b32 $1, $0, 16;
            and.b32 $2, $0, 0xffff0000;
            }""",
            "=&r,=&r,=r,r,r",
            [exact],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    inverse = reciprocal(scale)[None, :]
    return weights, total + tl.sum(tl.where(inverse == 0.0, p, rounded * inverse), 1)


@triton.jit
def load_scales(rows, mask, value_block, BLOCK_T: tl.constexpr):
    """The tokens' four fp32 scales, in the order in which the program takes the tiles.

    One vector load a token; four loads each keep a register per column of S and thread (8 %
    slower at 64 heads, where they spill).
    """
    at = (rows + 512).to(tl.pointer_type(tl.float32))[:, None] + tl.arange(0, 4)[None, :]
    scales = tl.load(at, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(scales, [BLOCK_T, 2, 2]))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    swap = value_block == 1
    first = tl.where(swap, s2, s0)
    second = tl.where(swap, s3, s1)
    third = tl.where(swap, s0, s2)
    fourth = tl.where(swap, s1, s3)
    return first, second, third, fourth


@triton.jit
def rope_logits(q_rope, ptr, mask, zero):
    """The RoPE part's share of the logits."""
    k_rope = tl.load(ptr, mask=mask, other=0.0)
    return dot(q_rope, tl.trans(k_rope), zero)


@triton.jit
def load_slots(line, entry, limit):
    """The index list's entries, -1 past its end."""
    return tl.load(line + entry, mask=entry < limit, other=-1)


@triton.jit
def row_offset(slot, page_size, page_stride, TOKEN_STRIDE: tl.constexpr, PACKED: tl.constexpr):
    """Where a slot's row starts, bytes, int64."""
    if PACKED:
        return slot.to(tl.int64) * TOKEN_STRIDE
    else:
        offset = (slot // page_size).to(tl.int64) * page_stride
        return offset + (slot % page_size).to(tl.int64) * TOKEN_STRIDE


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


@triton.jit
def interleave(tile):
    """A tile's 128 columns in the order of `column_dims`.

    A thread decodes 16 neighbouring bytes to two 16-byte pieces. In the dims' own order the pieces
    of 8 threads meet in the same banks when they are stored (136 us against 131 at 16 heads).
    """
    pieces = tl.reshape(tile, [tile.shape[0], 8, 2, 8])
    return tl.reshape(tl.permute(pieces, [0, 2, 1, 3]), [tile.shape[0], 128])


@triton.jit
def column_dims(QUANTISED: tl.constexpr):
    """[1, 128]: which of a tile's dims each of its columns holds; see `interleave`."""
    column = tl.arange(0, 128)
    if QUANTISED:
        column = column % 64 // 8 * 16 + column // 64 * 8 + column % 8
        column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
    return column[None, :]


@triton.jit
def sink_factor(lse, sink):
    """exp(lse) / (exp(lse) + exp(sink)), natural; 1 for sink -inf, 0 for +inf or an empty row."""
    factor = 1.0 / (1.0 + tl.exp2((sink - lse) * 1.4426950408889634))
    factor = tl.where(sink == float("-inf"), 1.0, factor)
    return tl.where(lse == float("-inf"), 0.0, factor)


@triton.jit
def store_tile(ptr, acc, total, factor, mask):
    """Store acc / total * factor by rows as the pointer's type; 0 where nothing was summed."""
    values = acc * tl.where(total == 0.0, 0.0, factor / total)[:, None]
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr, to_bf16(values), mask=mask)
    else:
        tl.store(ptr, values, mask=mask)


@triton.jit(do_not_specialize=["heads", "head_blocks", "s_q", "topk", "splits", "split_size"])
def attend(
    q_ptr,  # [b, s_q, heads, D_QK] bf16, strides q_stride_*
    kv_ptr,  # cache bytes, uint8
    indices_ptr,  # [b, s_q, topk] int32, strides indices_stride_*
    lengths_ptr,  # [b] int32, or None
    sink_ptr,  # [heads] float32, or None; only when unsplit
    out_ptr,  # [splits, b * s_q, heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b * s_q, heads] float32: natural when unsplit, else log2
    max_ptr,  # [b * s_q, heads] float32 natural, or None; only when unsplit
    q_stride_b,
    q_stride_s,
    q_stride_h,
    indices_stride_b,
    indices_stride_s,
    page_stride,  # bytes
    page_size,
    last_slot,  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    s_q,
    heads,
    head_blocks,
    topk,
    splits,
    split_size,  # entries per split, a multiple of BLOCK_T
    scale_log2,  # softmax scale * log2(e)
    QUANTISED: tl.constexpr,
    D_ROPE: tl.constexpr,  # 64, or 0 where the row has no separate RoPE part
    TOKEN_STRIDE: tl.constexpr,  # bytes
    PACKED: tl.constexpr,  # page_stride == page_size * TOKEN_STRIDE
    HARDWARE_FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,  # 1, or 2: two programs share the 512 output dims
    STAGES: tl.constexpr,
):
    # Programs of one token run side by side, so that their shared rows meet in L2.
    pid = tl.program_id(0)
    value_block = pid % VALUE_BLOCKS
    pid = pid // VALUE_BLOCKS
    head_block = pid % head_blocks
    split = (pid // head_blocks) % splits
    token = pid // (head_blocks * splits)
    tokens = tl.num_programs(0) // (head_blocks * splits * VALUE_BLOCKS)
    b = (token // s_q).to(tl.int64)
    s = (token % s_q).to(tl.int64)

    head = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    q_mask = (head < heads)[:, None]
    dims = tl.arange(0, 128)[None, :]
    rope_dims = tl.arange(0, 64)[None, :]
    columns = tl.arange(0, BLOCK_T)
    # Tiles of 128 dims in this program's order: those whose output it owns come first.
    tile0 = value_block * 2
    tile2 = 2 - tile0
    dims0 = dims + tile0 * 128
    dims1 = dims + (tile0 * 128 + 128)
    dims2 = dims + tile2 * 128
    dims3 = dims + (tile2 * 128 + 128)
    out_dims = column_dims(QUANTISED)
    out_dims0 = out_dims + tile0 * 128
    out_dims1 = out_dims + (tile0 * 128 + 128)
    out_dims2 = out_dims + tile2 * 128
    out_dims3 = out_dims + (tile2 * 128 + 128)

    q_rows = q_ptr + b * q_stride_b + s * q_stride_s + head[:, None].to(tl.int64) * q_stride_h
    q0 = tl.load(q_rows + out_dims0, mask=q_mask, other=0.0)
    q1 = tl.load(q_rows + out_dims1, mask=q_mask, other=0.0)
    q2 = tl.load(q_rows + out_dims2, mask=q_mask, other=0.0)
    q3 = tl.load(q_rows + out_dims3, mask=q_mask, other=0.0)
    if D_ROPE > 0:
        q_rope = tl.load(q_rows + (rope_dims + 512), mask=q_mask, other=0.0)

    limit = topk
    if lengths_ptr is not None:
        limit = tl.minimum(tl.load(lengths_ptr + b), topk)
    first = split * split_size
    limit = tl.minimum(limit, first + split_size)
    line = indices_ptr + b * indices_stride_b + s * indices_stride_s

    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    base = peak
    total = tl.zeros([BLOCK_H], tl.float32)
    total0 = tl.zeros([BLOCK_H], tl.float32)
    total1 = tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, 128], tl.float32)
    acc1 = tl.zeros([BLOCK_H, 128], tl.float32)
    if VALUE_BLOCKS == 1:
        total2 = tl.zeros([BLOCK_H], tl.float32)
        total3 = tl.zeros([BLOCK_H], tl.float32)
        acc2 = tl.zeros([BLOCK_H, 128], tl.float32)
        acc3 = tl.zeros([BLOCK_H, 128], tl.float32)
    zero = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)

    # Slots are loaded ahead: rows wait for slots, and slots come from far memory. Two steps with
    # 16 heads (131 us against 134), one step where registers are short (64 heads: 241 against 248).
    TWO_AHEAD: tl.constexpr = BLOCK_H == 16
    next_slot = load_slots(line, first + columns, limit)
    if TWO_AHEAD:
        later_slot = load_slots(line, first + BLOCK_T + columns, limit)
    PREFETCH: tl.constexpr = QUANTISED and VALUE_BLOCKS == 2
    if PREFETCH:
        # Each of the two programs asks for half the rows of the next step, 6 lines a row.
        asked = tl.arange(0, BLOCK_T * 4)
        line_of_row = asked % 8
        asked = asked // 8 + value_block * (BLOCK_T // 2)
        asked_slot = load_slots(line, first + BLOCK_T + asked, limit)
    # Hoisted out of the loop, the matrix descriptors take more registers than there are (64 heads:
    # 248 us against 311).
    for start in tl.range(first, limit, BLOCK_T, num_stages=STAGES, disable_licm=True):
        ok = (next_slot >= 0) & (next_slot <= last_slot)
        slot = tl.where(ok, next_slot, 0)
        if TWO_AHEAD:
            next_slot = later_slot
            later_slot = load_slots(line, start + 2 * BLOCK_T + columns, limit)
        else:
            next_slot = load_slots(line, start + BLOCK_T + columns, limit)
        if PREFETCH:
            wanted = (asked_slot >= 0) & (asked_slot <= last_slot) & (line_of_row < 6)
            ahead = row_offset(asked_slot, page_size, page_stride, TOKEN_STRIDE, PACKED)
            prefetch(kv_ptr + (ahead + line_of_row * 128), wanted)
            asked_slot = load_slots(line, start + 2 * BLOCK_T + asked, limit)
        offset = row_offset(slot, page_size, page_stride, TOKEN_STRIDE, PACKED)
        rows = kv_ptr + offset
        mask = ok[:, None]

        if QUANTISED:
            rope_ptr = (rows + 528).to(tl.pointer_type(tl.bfloat16))[:, None] + rope_dims
            # Where registers are short the RoPE product comes first and frees its own (250 us
            # against 274 at 64 heads), elsewhere last (135 against 142 at 16 heads).
            if VALUE_BLOCKS == 2:
                logits = rope_logits(q_rope, rope_ptr, mask, zero)
            k0 = interleave(load_e4m3(rows[:, None] + dims0, mask, HARDWARE_FP8))
            k1 = interleave(load_e4m3(rows[:, None] + dims1, mask, HARDWARE_FP8))
            k2 = interleave(load_e4m3(rows[:, None] + dims2, mask, HARDWARE_FP8))
            k3 = interleave(load_e4m3(rows[:, None] + dims3, mask, HARDWARE_FP8))
            scale0, scale1, scale2, scale3 = load_scales(rows, mask, value_block, BLOCK_T)
            if VALUE_BLOCKS == 1:
                logits = rope_logits(q_rope, rope_ptr, mask, zero)
            logits += dot(q0, tl.trans(k0), zero) * scale0[None, :]
            logits += dot(q1, tl.trans(k1), zero) * scale1[None, :]
            logits += dot(q2, tl.trans(k2), zero) * scale2[None, :]
            logits += dot(q3, tl.trans(k3), zero) * scale3[None, :]
        else:
            values = rows.to(tl.pointer_type(tl.bfloat16))[:, None]
            k0 = tl.load(values + dims0, mask=mask, other=0.0)
            k1 = tl.load(values + dims1, mask=mask, other=0.0)
            k2 = tl.load(values + dims2, mask=mask, other=0.0)
            k3 = tl.load(values + dims3, mask=mask, other=0.0)
            logits = dot(q0, tl.trans(k0), zero)
            logits = dot(q1, tl.trans(k1), logits)
            logits = dot(q2, tl.trans(k2), logits)
            logits = dot(q3, tl.trans(k3), logits)
            if D_ROPE > 0:
                k_rope = tl.load(values + (rope_dims + 512), mask=mask, other=0.0)
                logits = dot(q_rope, tl.trans(k_rope), logits)

        logits = tl.where(ok[None, :], logits * scale_log2, float("-inf"))
        peak = tl.maximum(peak, tl.max(logits, 1))
        # The peak rounded up to an integer: rescaling is by powers of two, exact, and the heaviest
        # token's p is not 1 in every row, where scales of one mantissa would all round one way.
        new_base = tl.ceil(peak)
        # With nothing valid so far it is -inf; subtracting 0 instead keeps exp2 at 0.
        shift = tl.where(new_base == float("-inf"), 0.0, new_base)
        decay = tl.exp2(base - shift)
        p = tl.exp2(logits - shift[:, None])
        base = new_base
        total = total * decay + tl.sum(p, 1)
        if QUANTISED:
            p0, total0 = tile_weights(p, scale0, total0 * decay)
            p1, total1 = tile_weights(p, scale1, total1 * decay)
            acc0 = dot(p0, k0, acc0 * decay[:, None])
            acc1 = dot(p1, k1, acc1 * decay[:, None])
            if VALUE_BLOCKS == 1:
                p2, total2 = tile_weights(p, scale2, total2 * decay)
                p3, total3 = tile_weights(p, scale3, total3 * decay)
                acc2 = dot(p2, k2, acc2 * decay[:, None])
                acc3 = dot(p3, k3, acc3 * decay[:, None])
        else:
            weights = to_bf16(p)
            total0 = total0 * decay + tl.sum(weights.to(tl.float32), 1)
            acc0 = dot(weights, k0, acc0 * decay[:, None])
            acc1 = dot(weights, k1, acc1 * decay[:, None])
            if VALUE_BLOCKS == 1:
                acc2 = dot(weights, k2, acc2 * decay[:, None])
                acc3 = dot(weights, k3, acc3 * decay[:, None])

    if not QUANTISED:
        total1 = total0
        if VALUE_BLOCKS == 1:
            total2 = total0
            total3 = total0
    head_ok = head < heads
    lse = base + tl.log2(total)
    factor = tl.full([BLOCK_H], 1.0, tl.float32)
    if not SPLIT:
        lse = lse * 0.6931471805599453
        if sink_ptr is not None:
            factor = sink_factor(lse, tl.load(sink_ptr + head, mask=head_ok, other=0.0))
    row = (split.to(tl.int64) * tokens + token) * heads + head
    owner = head < tl.where(value_block == 0, heads, 0)
    tl.store(lse_ptr + row, lse, mask=owner)
    if max_ptr is not None:
        tl.store(max_ptr + row, peak * 0.6931471805599453, mask=owner)
    out = out_ptr + row[:, None] * 512
    store_tile(out + out_dims0, acc0, total0, factor, q_mask)
    store_tile(out + out_dims1, acc1, total1, factor, q_mask)
    if VALUE_BLOCKS == 1:
        store_tile(out + out_dims2, acc2, total2, factor, q_mask)
        store_tile(out + out_dims3, acc3, total3, factor, q_mask)


@triton.jit(do_not_specialize=["rows", "heads", "splits"])
def combine(
    parts_ptr,  # [splits, rows, 512] float32
    parts_lse_ptr,  # [splits, rows] float32, log2
    sink_ptr,  # [heads] float32, or None
    out_ptr,  # [rows, 512] bf16
    lse_ptr,  # [rows] float32, natural
    rows,  # b * s_q * heads
    heads,
    splits,
    MAX_SPLITS: tl.constexpr,  # a power of two >= splits
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of one (query token, head), weighted by their exponential sums."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, MAX_SPLITS).to(tl.int64)
    ok = split < splits
    lse = tl.load(parts_lse_ptr + split * rows + row, mask=ok, other=float("-inf"))
    peak = tl.max(lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - base)
    total = tl.sum(weight, 0)
    merged = (base + tl.log2(total)) * 0.6931471805599453
    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    if sink_ptr is not None:
        factor = factor * sink_factor(merged, tl.load(sink_ptr + row % heads))
    # A split with nothing valid has weight 0 and zeros as its part.
    parts = parts_ptr + (split * rows + row)[:, None] * 512 + dims[None, :]
    part = tl.load(parts, mask=ok[:, None], other=0.0)
    out = tl.sum(part * (weight * factor)[:, None], 0)
    tl.store(out_ptr + row * 512 + dims, to_bf16(out))
    tl.store(lse_ptr + row, merged, mask=tl.program_id(1) == 0)
