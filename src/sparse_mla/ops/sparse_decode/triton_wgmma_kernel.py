"""The portable Triton kernel for e4m3 with float32 scales where products have 64 rows (Hopper).

Tokens are the rows of the first product and dims those of the second, heads their columns:

    S^T = K Q^T  [tokens, heads]        O^T = K^T (P * scale)^T  [dims, heads]

so that a program with few heads still fills 64 rows, and 32 heads times 512 dims of float32 fit
the registers of four warps: two programs share an SM and each decodes a row once.

e4m3 goes to the tensor cores as fp16, which holds it exactly, as it holds a query scaled by a
power of two per head. The scales multiply S and P in float32, tile by tile of 128 dims. Two
roundings remain, of P * scale to fp16 and of the output. The first goes up or down by chance, with
probabilities that make it exact on average: weights that are all alike, as in a flat row with
equal scales, leave no gain error. The chance is a function of the entry's place in the list and
of the head: same inputs, same bits.

P is kept at most 2^PEAK over the token's largest scale. Its base moves only when a weight would
pass that (5 of 32 steps on Gaussian data), by a power of two.
"""

import triton
import triton.language as tl

from .triton_kernel import dot, sink_factor, store_tile
from .triton_rows_kernel import (
    INTERPRET,
    column_dims,
    interleave,
    load_slots,
    page_of,
    prefetch,
    rope_dims,
    row_offset,
)

# log2 of the largest weight; fp16 ends at 2^16, full precision at 2^-14.
PEAK = tl.constexpr(13.0)
# How far below it the base is set when it moves; larger moves less often.
MARGIN = tl.constexpr(6.0)
# P is bounded by the largest of a token's scales. Where another of them is smaller by more powers
# of two than this, weights of its group would leave fp16's range: 2^(PEAK - MARGIN - 16) for the
# heaviest token keeps 11 bits for 5 powers of two below it.
SPREAD = tl.constexpr(16)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def load_words(rows, at: tl.constexpr, mask):
    """[T, 32]: 128 bytes at offset `at` of each row as int32, 0 where masked.

    One type and shape for e4m3 and bf16: their loads share the rows' addresses.
    """
    words = (rows + at).to(tl.pointer_type(tl.int32))[:, None] + tl.arange(0, 32)[None, :]
    return tl.load(words, mask=mask, other=0)


@triton.jit
def byte_to_fp16(byte):
    """An e4m3 code in an int32 as fp16, exact; for the interpreter."""
    magnitude = byte & 0x7F
    # The bits shifted into a float32 are the value times 2^-120 (bias 7 against 127).
    value = (((byte & 0x80) << 24) | (magnitude << 20)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude == 0x7F, float("nan"), value * 1.329227995784916e36)
    return value.to(tl.float16)


@triton.jit
def to_fp16(words):
    """[T, 32] words of four e4m3 codes as fp16 [T, 128], exact."""
    if INTERPRET:
        a = byte_to_fp16(words)
        b = byte_to_fp16(words >> 8)
        c = byte_to_fp16(words >> 16)
        d = byte_to_fp16(words >> 24)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b16 lo, hi;
            .reg .b32 x, y;
            mov.b32 {lo, hi}, $4;
            cvt.rn.f16x2.e4m3x2 x, lo;
            cvt.rn.f16x2.e4m3x2 y, hi;
            mov.b32 {$0, $1}, x;
            mov.b32 {$2, $3}, y;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=False,
            pack=1,
        )
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [words.shape[0], 128])


@triton.jit
def to_bf16_pairs(words):
    """[T, 32] words of two bf16 as bf16 [T, 64]."""
    if INTERPRET:
        a = (words << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)
        b = (words & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        a, b = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=False,
            pack=1,
        )
    return tl.reshape(tl.join(a, b), [words.shape[0], 64])


@triton.jit
def round_by_chance(weights, chance):
    """float32 to fp16, away from 0 where `chance` and the 13 bits that are dropped carry."""
    if INTERPRET:
        bits = (weights.to(tl.int32, bitcast=True) + chance) & -0x2000
        rounded = bits.to(tl.float32, bitcast=True).to(tl.float16)
    else:
        rounded = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            add.u32 a, $1, $3;
            add.u32 b, $2, $4;
            cvt.rz.f16x2.f32 $0, b, a;
            }""",
            "=r,r,r,r,r",
            [weights, chance],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return rounded


@triton.jit
def exponent_bits(x):
    """The exponent of a float32, in place: the bits of the power of two at or below |x|."""
    return x.to(tl.int32, bitcast=True) & 0x7F800000


@triton.jit
def load_scales(ptr, mask, BLOCK_T: tl.constexpr):
    """The tokens' four fp32 scales, [T] each; 0 where masked."""
    at = ptr.to(tl.pointer_type(tl.float32))[:, None] + tl.arange(0, 4)[None, :]
    scales = tl.load(at, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(scales, [BLOCK_T, 2, 2]))
    scale0, scale2 = tl.split(even)
    scale1, scale3 = tl.split(odd)
    return scale0, scale1, scale2, scale3


@triton.jit
def largest(a, b, c, d):
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit
def spread_of(a, b, c, d, unit):
    """Ratio of a token's largest and smallest scales, in exponent bits.

    A scale of 0 has no weights to lose and does not count, unless `unit` is above 1: it may then be
    a number that was brought below the smallest.
    """
    high = exponent_bits(largest(a, b, c, d))
    none = tl.where(unit == 1.0, high, 0)
    low = tl.minimum(size_of(a, none), size_of(b, none))
    return high - tl.minimum(low, tl.minimum(size_of(c, none), size_of(d, none)))


@triton.jit
def size_of(scale, none):
    bits = exponent_bits(scale)
    return tl.where(bits == 0, none, bits)


@triton.jit
def thread_sums(p):
    """[T, H] to [T / 16, 8, H]: the sums of what a thread holds, without an exchange."""
    return tl.sum(tl.reshape(p, [p.shape[0] // 16, 2, 8, p.shape[1]]), 1)


@triton.jit
def log2_sum(base, total):
    """base + log2(total); the exponent is added to base, an integer, without rounding."""
    bits = total.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exact = base + exponent + tl.log2(mantissa)
    return tl.where(total > 0.0, exact, base + tl.log2(total))


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
    ]
)
def attend_tokens_first(
    q_ptr,  # arguments as of triton_kernel.attend
    sink_ptr,
    out_ptr,
    lse_ptr,
    max_ptr,
    wild_ptr,  # [splits, b * s_q, head_blocks] int32: 1 where `attend` must do it again
    q_stride_b,
    q_stride_s,
    q_stride_h,
    s_q,
    heads,
    head_blocks,
    splits,
    split_size,
    scale_log2,
    kv_ptr,
    indices_ptr,
    lengths_ptr,
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
    LAYOUT: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`triton_kernel.attend` for a cache with a scale per 128 dims. BLOCK_T: multiples of 64."""
    pid = tl.program_id(0)
    head_block = pid % head_blocks
    split = (pid // head_blocks) % splits
    token = pid // (head_blocks * splits)
    tokens = tl.num_programs(0) // (head_blocks * splits)
    b = (token // s_q).to(tl.int64)
    s = (token % s_q).to(tl.int64)

    head = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    head_ok = head < heads
    q_mask = head_ok[:, None]
    dims = column_dims(True)
    ROPE: tl.constexpr = rope_dims(LAYOUT) > 0
    columns = tl.arange(0, BLOCK_T)

    q_rows = q_ptr + b * q_stride_b + s * q_stride_s + head[:, None].to(tl.int64) * q_stride_h
    q0 = tl.load(q_rows + dims, mask=q_mask, other=0.0).to(tl.float32)
    q1 = tl.load(q_rows + (dims + 128), mask=q_mask, other=0.0).to(tl.float32)
    q2 = tl.load(q_rows + (dims + 256), mask=q_mask, other=0.0).to(tl.float32)
    q3 = tl.load(q_rows + (dims + 384), mask=q_mask, other=0.0).to(tl.float32)
    top = tl.max(largest(q0, q1, q2, q3), 1)
    if ROPE:
        rope = q_rows + (512 + tl.arange(0, 64))[None, :]
        q_rope = tl.load(rope, mask=q_mask, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(q_rope), 1))
    # A head's query times a power of two: at most 2^15, what fp16 holds, and exact for all that
    # matters beside its largest. 15 and 254 keep the power itself a normal float32.
    exponent = tl.minimum(tl.maximum(exponent_bits(top) >> 23, 15), 254)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    head_scale = scale_log2 * ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    q0 = tl.trans((q0 * up).to(tl.float16))
    q1 = tl.trans((q1 * up).to(tl.float16))
    q2 = tl.trans((q2 * up).to(tl.float16))
    q3 = tl.trans((q3 * up).to(tl.float16))
    if ROPE:
        q_rope = tl.trans((q_rope * up).to(tl.bfloat16))

    limit = topk
    if lengths_ptr is not None:
        limit = tl.maximum(tl.minimum(tl.load(lengths_ptr + b), topk), 0)
    first = split * split_size
    limit = tl.minimum(limit, first + split_size)
    line = indices_ptr + b * indices_stride_b + s * indices_stride_s

    base = tl.full([BLOCK_H], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T // 16, 8, BLOCK_H], tl.float32)
    acc0 = tl.zeros([128, BLOCK_H], tl.float32)
    acc1 = tl.zeros([128, BLOCK_H], tl.float32)
    acc2 = tl.zeros([128, BLOCK_H], tl.float32)
    acc3 = tl.zeros([128, BLOCK_H], tl.float32)
    zero = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    none = tl.zeros([BLOCK_T, 128], tl.float16)
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    wild_ptr += (split.to(tl.int64) * tokens + token) * head_blocks + head_block
    tl.store(wild_ptr, 0)
    head_chance = head * 0x3504F334  # 2^32 (sqrt(2) - 1) / 2

    # All loads at the top of a step where registers allow (16 heads: 120 us against 125).
    EARLY: tl.constexpr = BLOCK_H == 16
    next_slot = load_slots(line, first + columns, limit)
    # The rows of the next step, six lines each; half of them where another block of heads has the
    # rest (64 heads: 200 us; 207 with all, 220 with none. 16 heads: 117 with all, 125 with none).
    ASKED: tl.constexpr = BLOCK_T if EARLY else BLOCK_T // 2
    asked = tl.arange(0, ASKED * 8)
    line_of_row = asked % 8
    asked = (asked // 8 + head_block % 2 * ASKED) % BLOCK_T
    asked_slot = load_slots(line, first + BLOCK_T + asked, limit)
    # Hoisted out of the loop the matrix descriptors would take more registers than there are.
    for start in tl.range(first, limit, BLOCK_T, num_stages=STAGES, disable_licm=True):
        ok = (next_slot >= 0) & (next_slot <= last_slot)
        slot = tl.where(ok, next_slot, 0)
        next_slot = load_slots(line, start + BLOCK_T + columns, limit)
        wanted = (asked_slot >= 0) & (asked_slot <= last_slot) & (line_of_row < 6)
        asked_page = page_of(asked_slot, page_magic, page_shift)
        ahead = row_offset(asked_slot, asked_page, page_gap, TOKEN_STRIDE, PACKED)
        prefetch(kv_ptr + (ahead + line_of_row * 128), wanted)
        asked_slot = load_slots(line, start + 2 * BLOCK_T + asked, limit)
        page = page_of(slot, page_magic, page_shift)
        rows = kv_ptr + row_offset(slot, page, page_gap, TOKEN_STRIDE, PACKED)
        mask = ok[:, None]

        words0 = load_words(rows, 0, mask)
        if ROPE:
            rope_words = load_words(rows, LAYOUT.rope.offset, mask)
        scale0, scale1, scale2, scale3 = load_scales(rows + LAYOUT.scales.offset, mask, BLOCK_T)
        words1 = load_words(rows, 128, mask)
        if EARLY:
            words2 = load_words(rows, 256, mask)
            words3 = load_words(rows, 384, mask)
        k0 = interleave(to_fp16(words0))
        # Loops of one trip. The compiler hands a product's first operand over in shared memory
        # only if it is loaded as it is or a loop's argument; K would else be stored once for each
        # product and kept in registers in between (1.2 KB of spills). A tile each, so that none
        # waits for the next in registers.
        once = (start < limit).to(tl.int32)
        for _0 in tl.range(0, once, disable_licm=True):
            unit = exponent_bits(largest(scale0, scale1, scale2, scale3))
            # log2 of the power of two above the scales, P's bound; from 2^-99 to 2^127
            size = (tl.minimum(tl.maximum(unit, 0x0D800000), 0x7E800000) >> 23) - 126.0
            # Scales above 1 are brought below 2 until the head's factor has made S small.
            unit = tl.minimum(tl.maximum(unit, 0x3F800000), 0x7E800000)
            less = (0x7F000000 - unit).to(tl.float32, bitcast=True)
            unit = unit.to(tl.float32, bitcast=True)
            scale0 *= less
            scale1 *= less
            scale2 *= less
            scale3 *= less
            logits = zero
            if ROPE:
                logits = dot(to_bf16_pairs(rope_words), q_rope, zero) * less[:, None]
            logits += dot(k0, q0, zero) * scale0[:, None]
            k1 = interleave(to_fp16(words1))
            for _1 in tl.range(0, once, disable_licm=True):
                if not EARLY:
                    words2 = load_words(rows, 256, mask)
                logits += dot(k1, q1, zero) * scale1[:, None]
                k2 = interleave(to_fp16(words2))
                for _2 in tl.range(0, once, disable_licm=True):
                    if not EARLY:
                        words3 = load_words(rows, 384, mask)
                    logits += dot(k2, q2, zero) * scale2[:, None]
                    k3 = interleave(to_fp16(words3))
                    for _3 in tl.range(0, once, disable_licm=True):
                        logits += dot(k3, q3, zero) * scale3[:, None]
                        logits = logits * head_scale[None, :] * unit[:, None]
                        logits = tl.where(mask, logits, float("-inf"))
                        if max_ptr is not None:
                            peak = tl.maximum(peak, tl.max(logits, 0))
                        if tl.max(tl.max(logits - base[None, :], 1) + size) > PEAK:
                            # Weights are lost only where a token of uneven scales moves the base.
                            spread = spread_of(scale0, scale1, scale2, scale3, unit)
                            if tl.max(spread, 0) > (SPREAD << 23):
                                tl.store(wild_ptr, 1)
                            heaviest = tl.max(logits + size[:, None], 0) - PEAK
                            raised = tl.ceil(heaviest) + MARGIN
                            new_base = tl.where(heaviest > base, raised, base)
                            decay = tl.exp2(base - new_base)
                            base = new_base
                            total *= decay[None, None, :]
                            acc0 *= decay[None, :]
                            acc1 *= decay[None, :]
                            acc2 *= decay[None, :]
                            acc3 *= decay[None, :]
                        p = tl.exp2(logits - base[None, :])
                        total += thread_sums(p)
                        # 13 bits, evenly spread along the list and over heads.
                        chance = ((start + columns) * -0x61C88647)[:, None] + head_chance[None, :]
                        chance = (chance.to(tl.uint32) >> 19).to(tl.int32)
                        p0 = round_by_chance(p * (scale0 * unit)[:, None], chance)
                        acc0 = dot(tl.trans(k0), p0, acc0)
                        p1 = round_by_chance(p * (scale1 * unit)[:, None], chance)
                        acc1 = dot(tl.trans(k1), p1, acc1)
                        p2 = round_by_chance(p * (scale2 * unit)[:, None], chance)
                        acc2 = dot(tl.trans(k2), p2, acc2)
                        p3 = round_by_chance(p * (scale3 * unit)[:, None], chance)
                        acc3 = dot(tl.trans(k3), p3, acc3)
                        k3 = none
                    k2 = none
                k1 = none
            k0 = none

    total = tl.sum(tl.sum(total, 0), 0)
    lse = log2_sum(base, total)
    factor = tl.full([BLOCK_H], 1.0, tl.float32)
    if not SPLIT:
        lse = lse * 0.6931471805599453
        if sink_ptr is not None:
            factor = sink_factor(lse, tl.load(sink_ptr + head, mask=head_ok, other=0.0))
    row = (split.to(tl.int64) * tokens + token) * heads + head
    tl.store(lse_ptr + row, lse, mask=head_ok)
    if max_ptr is not None:
        tl.store(max_ptr + row, peak * 0.6931471805599453, mask=head_ok)
    out = out_ptr + row[:, None] * 512
    store_tile(out + dims, tl.trans(acc0), total, factor, q_mask)
    store_tile(out + (dims + 128), tl.trans(acc1), total, factor, q_mask)
    store_tile(out + (dims + 256), tl.trans(acc2), total, factor, q_mask)
    store_tile(out + (dims + 384), tl.trans(acc3), total, factor, q_mask)
