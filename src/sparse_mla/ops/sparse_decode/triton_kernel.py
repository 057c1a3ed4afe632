"""The portable Triton kernels: attention over selected tokens, and the merge of split results.

One program attends BLOCK_H heads of one query token to one split of its index lists, BLOCK_T
tokens at a time, with a running softmax in float32 (log2 domain). Where there is an extra cache
its list follows the main one's: two loops over the same running state.

Keys go to the tensor cores as bf16, which holds them exactly (`triton_rows_kernel`). What scales
are in float32 is applied outside the products, to S and to P: of a tile of 128 dims,

    S = sum_g scale_g * (Q_g K_g^T)        out_g = (P * scale_g) K_g

or of the whole token, so that the only roundings are P * scale to bf16 and the output to bf16.
bf16 has float32's range: no scale can overflow it. Each tile is normalised by the sum of its own
rounded weights, so that weights that all round the same way (a flat row, equal scales) leave no
gain error.

Invalid entries are masked at the load: never read, their bytes and scales count as zero.

`triton_wgmma_kernel` does the same for scales of 128 dims on Hopper with the operands swapped.
"""

import triton
import triton.language as tl

from .triton_rows_kernel import (
    INTERPRET,
    any_quantised,
    any_scaled_outside,
    column_dims,
    decode_e4m3,
    footer_offset,
    has_factor,
    lines_of_row,
    load_factors,
    load_rope,
    load_scales,
    load_slots,
    load_tile,
    page_of,
    prefetch,
    rope_dims,
    rope_in_latent,
    rope_in_values,
    row_offset,
    scaled_outside,
    tile_columns,
    to_bf16,
)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 accumulation; bf16 operands, upcast where interpreted."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, acc)


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
def round_weights(exact):
    """float32 weights rounded to bf16, and what they are now in float32."""
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
    return weights, rounded


@triton.jit
def tile_weights(p, scale):
    """P * scale rounded to bf16, and the sums of the weights that this rounding stands for.

    A scale of 0, or one whose reciprocal is no normal number, leaves P as it is in the sum: the
    token's weight counts whatever its values in this tile are.
    """
    weights, rounded = round_weights(p * scale[None, :])
    inverse = reciprocal(scale)[None, :]
    return weights, tl.sum(tl.where(inverse == 0.0, p, rounded * inverse), 1)


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


@triton.jit
def attend_source(
    state,  # running softmax and accumulators, see below
    query,  # four tiles of 128 dims, in the program's order, and the RoPE part if there is one
    kv_ptr,  # cache bytes, uint8
    line,  # the index list
    first,  # the entries of it to attend
    limit,
    tensor_scale_ptr,  # [1] float32, or None
    page_magic,  # see page_of
    page_shift,
    page_gap,  # page stride less the token strides of a page, bytes
    table_gap,  # the same for entries of the scale table, or None
    table,  # bytes from a page's start to its scale table, or None
    last_slot,  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    value_block,
    scale_log2,  # softmax scale * log2(e)
    LAYOUT: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,  # bytes
    PACKED: tl.constexpr,  # rows follow each other from page to page
    PER_TILE: tl.constexpr,  # tiles have sums of their own, for this source or another
    INTERLEAVED: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add entries first..limit - 1 of one cache to the state."""
    peak, base, total, total0, total1, total2, total3, acc0, acc1, acc2, acc3 = state
    q0, q1, q2, q3, q_rope = query
    columns = tl.arange(0, BLOCK_T)
    zero = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
    # Tiles of 128 dims in this program's order: those whose output it owns come first.
    tile0 = value_block * 2
    tile2 = 2 - tile0
    MIXED: tl.constexpr = rope_in_values(LAYOUT)
    SCALED: tl.constexpr = scaled_outside(LAYOUT)
    FACTOR: tl.constexpr = has_factor(LAYOUT)
    ROPE: tl.constexpr = rope_dims(LAYOUT) > 0
    tensor_scale = 1.0
    if LAYOUT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)

    columns0 = tile_columns(tile0, LAYOUT, False, INTERLEAVED)
    columns1 = tile_columns(tile0 + 1, LAYOUT, False, INTERLEAVED)
    columns2 = tile_columns(tile2, LAYOUT, False, INTERLEAVED)
    columns3 = tile_columns(tile2 + 1, LAYOUT, MIXED, INTERLEAVED)

    # Slots are loaded ahead: rows wait for slots, and slots come from far memory. Two steps with
    # 16 heads (131 us against 134), one step where registers are short (64 heads: 241 against 248).
    TWO_AHEAD: tl.constexpr = BLOCK_H == 16
    next_slot = load_slots(line, first + columns, limit)
    if TWO_AHEAD:
        later_slot = load_slots(line, first + BLOCK_T + columns, limit)
    PREFETCH: tl.constexpr = LAYOUT.quantised and BLOCK_H == 64
    if PREFETCH:
        # Programs that share a token ask for a part of the next step's rows each, up to 8 lines a
        # row; the last of them is that of the scales where those are apart.
        ASKED: tl.constexpr = BLOCK_T // VALUE_BLOCKS
        asked = tl.arange(0, ASKED * 8)
        line_of_row = asked % 8
        asked = asked // 8 + value_block * ASKED
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
            wanted = (asked_slot >= 0) & (asked_slot <= last_slot)
            asked_page = page_of(asked_slot, page_magic, page_shift)
            ahead = row_offset(asked_slot, asked_page, page_gap, TOKEN_STRIDE, PACKED)
            ahead += line_of_row * 128
            in_row = line_of_row < lines_of_row(LAYOUT)
            if LAYOUT.planar:
                footer = footer_offset(asked_slot, asked_page, table_gap, table, LAYOUT)
                ahead = tl.where(line_of_row == 7, footer, ahead)
                in_row = in_row | (line_of_row == 7)
            prefetch(kv_ptr + ahead, wanted & in_row)
            asked_slot = load_slots(line, start + 2 * BLOCK_T + asked, limit)
        page = page_of(slot, page_magic, page_shift)
        rows = kv_ptr + row_offset(slot, page, page_gap, TOKEN_STRIDE, PACKED)
        scales = rows
        if LAYOUT.planar:
            scales = kv_ptr + footer_offset(slot, page, table_gap, table, LAYOUT)
        mask = ok[:, None]

        # Where registers are short the RoPE product comes first and frees its own (250 us against
        # 274 at 64 heads), elsewhere last (135 against 142 at 16 heads).
        ROPE_FIRST: tl.constexpr = SCALED and VALUE_BLOCKS == 2
        if ROPE and ROPE_FIRST:
            logits = dot(q_rope, tl.trans(load_rope(rows, mask, LAYOUT)), zero)
        k0 = load_tile(
            rows, scales, mask, tile0, columns0, LAYOUT, False, INTERLEAVED, HARDWARE_FP8
        )
        k1 = load_tile(
            rows, scales, mask, tile0 + 1, columns1, LAYOUT, False, INTERLEAVED, HARDWARE_FP8
        )
        k2 = load_tile(
            rows, scales, mask, tile2, columns2, LAYOUT, False, INTERLEAVED, HARDWARE_FP8
        )
        k3 = load_tile(
            rows, scales, mask, tile2 + 1, columns3, LAYOUT, MIXED, INTERLEAVED, HARDWARE_FP8
        )
        if SCALED:
            scale0, scale1, scale2, scale3 = load_scales(rows, mask, value_block, LAYOUT)
            if ROPE and not ROPE_FIRST:
                logits = dot(q_rope, tl.trans(load_rope(rows, mask, LAYOUT)), zero)
            if not ROPE:
                logits = zero
            logits += dot(q0, tl.trans(k0), zero) * scale0[None, :]
            logits += dot(q1, tl.trans(k1), zero) * scale1[None, :]
            logits += dot(q2, tl.trans(k2), zero) * scale2[None, :]
            logits += dot(q3, tl.trans(k3), zero) * scale3[None, :]
        else:
            logits = dot(q0, tl.trans(k0), zero)
            logits = dot(q1, tl.trans(k1), logits)
            logits = dot(q2, tl.trans(k2), logits)
            logits = dot(q3, tl.trans(k3), logits)
            if ROPE:
                k_rope = load_rope(rows, mask, LAYOUT)
            if rope_in_latent(LAYOUT):
                k_rope = decode_e4m3(k_rope, HARDWARE_FP8)
                logits = dot(q_rope, tl.trans(k_rope), logits)
            if FACTOR:
                factor = load_factors(rows, ok, tensor_scale, LAYOUT)
                logits *= factor[None, :]
            if ROPE and not rope_in_latent(LAYOUT):
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
        if SCALED:
            p0, sum0 = tile_weights(p, scale0)
            p1, sum1 = tile_weights(p, scale1)
        else:
            if FACTOR:
                p0, sum0 = tile_weights(p, factor)
            else:
                p0, rounded = round_weights(p)
                sum0 = tl.sum(rounded, 1)
            p1, sum1 = p0, sum0
        total0 = total0 * decay + sum0
        if PER_TILE:
            total1 = total1 * decay + sum1
        acc0 = dot(p0, k0, acc0 * decay[:, None])
        acc1 = dot(p1, k1, acc1 * decay[:, None])
        if VALUE_BLOCKS == 1:
            if SCALED:
                p2, sum2 = tile_weights(p, scale2)
                p3, sum3 = tile_weights(p, scale3)
            else:
                p2, sum2 = p0, sum0
                p3, sum3 = p0, sum0
            if PER_TILE:
                total2 = total2 * decay + sum2
                total3 = total3 * decay + sum3
            acc2 = dot(p2, k2, acc2 * decay[:, None])
            acc3 = dot(p3, k3, acc3 * decay[:, None])
    return peak, base, total, total0, total1, total2, total3, acc0, acc1, acc2, acc3


@triton.jit(
    do_not_specialize=[
        "heads",
        "head_blocks",
        "s_q",
        "splits",
        "split_size",
        "topk",
        "page_magic",
        "page_shift",
        "extra_topk",
        "extra_page_magic",
        "extra_page_shift",
    ]
)
def attend(
    q_ptr,  # [b, s_q, heads, D_QK] bf16, strides q_stride_*
    sink_ptr,  # [heads] float32, or None; only when unsplit
    out_ptr,  # [splits, b * s_q, heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b * s_q, heads] float32: natural when unsplit, else log2
    max_ptr,  # [b * s_q, heads] float32 natural, or None; only when unsplit
    wild_ptr,  # [splits, b * s_q, head_blocks] int32: only what is not 0; or None: all
    q_stride_b,
    q_stride_s,
    q_stride_h,
    s_q,
    heads,
    head_blocks,
    splits,
    split_size,  # entries per split, a multiple of BLOCK_T
    scale_log2,
    kv_ptr,  # the cache, as of attend_source
    indices_ptr,  # [b, s_q, topk] int32, strides indices_stride_*
    lengths_ptr,  # [b] int32, or None
    tensor_scale_ptr,
    indices_stride_b,
    indices_stride_s,
    topk,
    page_magic,
    page_shift,
    page_gap,
    table_gap,
    table,
    last_slot,
    extra_kv_ptr,  # the extra cache likewise; None where there is none
    extra_indices_ptr,
    extra_lengths_ptr,
    extra_tensor_scale_ptr,
    extra_indices_stride_b,
    extra_indices_stride_s,
    extra_topk,
    extra_page_magic,
    extra_page_shift,
    extra_page_gap,
    extra_table_gap,
    extra_table,
    extra_last_slot,
    LAYOUT: tl.constexpr,  # KVLayout
    TOKEN_STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    EXTRA_LAYOUT: tl.constexpr,  # KVLayout, or None
    EXTRA_TOKEN_STRIDE: tl.constexpr,
    EXTRA_PACKED: tl.constexpr,
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
    if wild_ptr is not None:
        at = (split.to(tl.int64) * tokens + token) * head_blocks + head_block
        if tl.load(wild_ptr + at) == 0:
            return
    b = (token // s_q).to(tl.int64)
    s = (token % s_q).to(tl.int64)

    INTERLEAVED: tl.constexpr = any_quantised(LAYOUT, EXTRA_LAYOUT)
    PER_TILE: tl.constexpr = any_scaled_outside(LAYOUT, EXTRA_LAYOUT)
    head = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    q_mask = (head < heads)[:, None]
    tile0 = value_block * 2
    tile2 = 2 - tile0
    dims = column_dims(INTERLEAVED)
    dims0 = dims + tile0 * 128
    dims1 = dims + (tile0 * 128 + 128)
    dims2 = dims + tile2 * 128
    dims3 = dims + (tile2 * 128 + 128)

    q_rows = q_ptr + b * q_stride_b + s * q_stride_s + head[:, None].to(tl.int64) * q_stride_h
    q0 = tl.load(q_rows + dims0, mask=q_mask, other=0.0)
    q1 = tl.load(q_rows + dims1, mask=q_mask, other=0.0)
    q2 = tl.load(q_rows + dims2, mask=q_mask, other=0.0)
    q3 = tl.load(q_rows + dims3, mask=q_mask, other=0.0)
    q_rope = q3
    if rope_dims(LAYOUT) > 0:
        q_rope = tl.load(q_rows + (512 + tl.arange(0, 64))[None, :], mask=q_mask, other=0.0)

    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    none = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, 128], tl.float32)
    query = (q0, q1, q2, q3, q_rope)
    state = (peak, peak, none, none, none, none, none, acc, acc, acc, acc)

    first = split * split_size
    limit = topk
    if lengths_ptr is not None:
        limit = tl.maximum(tl.minimum(tl.load(lengths_ptr + b), topk), 0)
    state = attend_source(
        state,
        query,
        kv_ptr,
        indices_ptr + b * indices_stride_b + s * indices_stride_s,
        first,
        tl.minimum(limit, first + split_size),
        tensor_scale_ptr,
        page_magic,
        page_shift,
        page_gap,
        table_gap,
        table,
        last_slot,
        value_block,
        scale_log2,
        LAYOUT,
        TOKEN_STRIDE,
        PACKED,
        PER_TILE,
        INTERLEAVED,
        HARDWARE_FP8,
        BLOCK_H,
        BLOCK_T,
        VALUE_BLOCKS,
        STAGES,
    )
    if EXTRA_LAYOUT is not None:
        # Splits cut the two lists as if they were one, the main one in whole blocks.
        first -= tl.cdiv(topk, BLOCK_T) * BLOCK_T
        limit = extra_topk
        if extra_lengths_ptr is not None:
            limit = tl.maximum(tl.minimum(tl.load(extra_lengths_ptr + b), extra_topk), 0)
        state = attend_source(
            state,
            query,
            extra_kv_ptr,
            extra_indices_ptr + b * extra_indices_stride_b + s * extra_indices_stride_s,
            tl.maximum(first, 0),
            tl.minimum(limit, first + split_size),
            extra_tensor_scale_ptr,
            extra_page_magic,
            extra_page_shift,
            extra_page_gap,
            extra_table_gap,
            extra_table,
            extra_last_slot,
            value_block,
            scale_log2,
            EXTRA_LAYOUT,
            EXTRA_TOKEN_STRIDE,
            EXTRA_PACKED,
            PER_TILE,
            INTERLEAVED,
            HARDWARE_FP8,
            BLOCK_H,
            BLOCK_T,
            VALUE_BLOCKS,
            STAGES,
        )
    peak, base, total, total0, total1, total2, total3, acc0, acc1, acc2, acc3 = state

    if not PER_TILE:
        total1, total2, total3 = total0, total0, total0
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
    store_tile(out + dims0, acc0, total0, factor, q_mask)
    store_tile(out + dims1, acc1, total1, factor, q_mask)
    if VALUE_BLOCKS == 1:
        store_tile(out + dims2, acc2, total2, factor, q_mask)
        store_tile(out + dims3, acc3, total3, factor, q_mask)


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
