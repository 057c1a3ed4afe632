"""The Hopper kernel for sparse decode with few heads over v32_fp8 caches, in Gluon.

One program attends 16 heads of one query token to one split of its index list. It is built around
a ring of raw rows in shared memory:

- a producer (4 warps, sm90_few_heads_fill_kernel) turns slots into addresses, a chunk of tiles at a
  time, and copies rows into the ring with cp.async, a tile of 32 tokens a stage;
- two consumers (4 warps each) take the tiles in turns, each with a softmax state of its own, which
  are merged through shared memory at the end. They share nothing in the loop.

In a consumer each warp owns one group of 128 dims, of K and of the values. e4m3 goes to fp16 in
registers, which is exact, and the fp32 scales, one per token and group, stay outside the products:

    S = sum_g scale_g * (Q_g K_g^T) + Q_rope K_rope^T        out_g = (P_g * scale_g) K_g / L_g

The warps add up their parts of S through shared memory and then each compute the softmax, with a
base of their own for each row: P_g = 2^(S - base_g), base_g an integer such that
|P_g * scale_g| stays within fp16's range. An accumulator is rescaled, exactly, only when its base
moves. L_g sums the weights as they were rounded, so that weights that all round one way leave no
gain error.

Invalid entries are never loaded: their rows are zero-filled and their logits -inf.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..gluon_compat import barrier, reinterpret
from ..sm90_pairs_kernel import exp2, log2, sink_factor
from .sm90_few_heads_fill_kernel import BLOCK_T, CHUNK_TILES, produce, resolve, share_rows

BLOCK_H = gl.constexpr(16)  # heads per program
# Weights are at most 2^START when a base is set, and it moves when they pass 2^(START + GROWTH).
START = gl.constexpr(12.0)
GROWTH = gl.constexpr(3.0)
# Scales below it count as 2^-101 where a base is chosen: sums of P stay finite.
FLOOR = gl.constexpr(3.9e-31)

# Products: the four groups are a batch dim over the four warps.
_MMA = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
MMA = gl.constexpr(_MMA)
Q_LATENT = gl.constexpr(gl.DotOperandLayout(0, _MMA, 4))
K_LATENT = gl.constexpr(gl.DotOperandLayout(1, _MMA, 4))
Q_ROPE = gl.constexpr(gl.DotOperandLayout(0, _MMA, 2))
K_ROPE = gl.constexpr(gl.DotOperandLayout(1, _MMA, 2))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _MMA, 2))
VALUES = gl.constexpr(gl.DotOperandLayout(1, _MMA, 2))
ROWS = gl.constexpr(gl.SliceLayout(2, _MMA))  # [4, heads]
COLUMNS = gl.constexpr(gl.SliceLayout(1, _MMA))  # [4, tokens]
HEADS = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, _MMA)))  # [heads]
# The exchange of S: its parts [4, heads, tokens], which each warp adds up for a quarter of the
# tokens, and the sum [heads, tokens], which all warps read. Lanes and vectors are those of the
# product's layout, so that threads move 16 bytes at a time without bank conflicts and P needs no
# conversion to be an operand.
_VECTOR = [[0, 1], [8, 0]]
_LANES = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
_TOKENS = [[0, 8], [0, 16]]
_GROUPS = [[1, 0, 0], [2, 0, 0]]
_VECTOR_3 = [[0, *x] for x in _VECTOR]
_LANES_3 = [[0, *x] for x in _LANES]
_TOKENS_3 = [[0, *x] for x in _TOKENS]
PARTS_SHARED = gl.constexpr(gl.SharedLinearLayout(_VECTOR_3 + _LANES_3 + _TOKENS_3 + _GROUPS))
_QUARTER = gl.DistributedLinearLayout(
    _VECTOR_3 + _GROUPS, _LANES_3, _TOKENS_3, block_bases=[], shape=[4, 16, 32]
)
QUARTER = gl.constexpr(_QUARTER)
QUARTER_HEADS = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(0, _QUARTER)))
QUARTER_TOKENS = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(0, _QUARTER)))
SUM_SHARED = gl.constexpr(gl.SharedLinearLayout(_VECTOR + _LANES + _TOKENS))
SUM = gl.constexpr(
    gl.DistributedLinearLayout(
        _VECTOR + _TOKENS, _LANES, [[0, 0], [0, 0]], block_bases=[], shape=[16, 32]
    )
)


@gluon.jit
def reciprocal(x):
    """1 / x, and 0 where x is 0 or so small that sums of it might not be finite."""
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.where(gl.abs(x) > 1e-37, inverse, 0.0)


@gluon.jit
def unpack_values(pairs):
    """Two tokens' e4m3 pairs (dims 2n, 2n + 1) as fp16 of dim 2n and of dim 2n + 1."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 lo, hi;
        .reg .b32 x;
        prmt.b32 x, $2, 0, 0x3120;
        mov.b32 {lo, hi}, x;
        cvt.rn.f16x2.e4m3x2 $0, lo;
        cvt.rn.f16x2.e4m3x2 $1, hi;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def round_weights(x):
    """x rounded to fp16's 11 bits, whatever its exponent, in float32."""
    above = gl.fma(x, gl.full_like(x, 8192.0), x)
    return gl.fma(x, gl.full_like(x, -8192.0), above)


def _rescale_asm(count):
    """PTX: two times count values times their factors, skipped by warps whose factors are all 1."""
    outputs = ",".join(["=f"] * (2 * count))
    inputs = ",".join(str(i) for i in range(2 * count)) + "," + ",".join(["f"] * count)
    # Elements 0 and 2 are of the thread's two rows.
    lines = [
        "{ .reg .pred moved, some;",
        f"setp.neu.f32 moved, ${4 * count}, 0f3F800000;",
        f"setp.neu.or.f32 moved, ${4 * count + 2}, 0f3F800000, moved;",
        "vote.sync.any.pred some, moved, 0xffffffff;",
        "@!some bra.uni DONE;",
    ]
    lines += [f"mul.f32 ${i}, ${i}, ${4 * count + i % count};" for i in range(2 * count)]
    return "\n".join([*lines, "DONE: }"]), f"{outputs},{inputs}"


_ASM, _OPERANDS = _rescale_asm(32)
RESCALE_ASM = gl.constexpr(_ASM)
RESCALE_OPERANDS = gl.constexpr(_OPERANDS)


@gluon.jit
def rescale(acc0, acc1, factor):
    """acc0 and acc1 [4, BLOCK_H, 64] times factor [4, BLOCK_H]."""
    return gl.inline_asm_elementwise(
        RESCALE_ASM,
        RESCALE_OPERANDS,
        [acc0, acc1, gl.full_like(acc0, 0.0) + gl.expand_dims(factor, 2)],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=32,
    )


@gluon.jit
def thread_sums(x):
    """[4, BLOCK_H, BLOCK_T] -> [4, BLOCK_H, 4]: sums over the columns that one thread holds."""
    return gl.sum(gl.sum(x.reshape([4, BLOCK_H, BLOCK_T // 8, 4, 2]), 4), 2)


@gluon.jit
def load_query(q_ptr, head_stride, heads):
    """Q as register fragments, each row times a power of two that brings its maximum to 2^7..2^8.

    Returns the latent part [4, BLOCK_H, 128] fp16, the RoPE part [4, BLOCK_H, 16] bf16 and the
    inverse factors [BLOCK_H]. bf16 keeps all its bits in fp16 down to 2^-24 of a row's maximum.
    """
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, gl.SliceLayout(2, Q_LATENT)))
    group = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, Q_LATENT)))
    dim = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, Q_LATENT)))
    row = q_ptr + head.to(gl.int64) * head_stride
    at = row[None, :, None] + (group[:, None, None] * 128 + dim[None, None, :])
    latent = gl.load(at, mask=(head < heads)[None, :, None], other=0.0)
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, gl.SliceLayout(2, Q_ROPE)))
    group = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, Q_ROPE)))
    dim = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, Q_ROPE)))
    row = q_ptr + head.to(gl.int64) * head_stride
    at = row[None, :, None] + (group[:, None, None] * 16 + dim[None, None, :] + 512)
    rope = gl.load(at, mask=(head < heads)[None, :, None], other=0.0)

    peak = gl.max(gl.max(gl.abs(latent.to(gl.float32)), 2), 0)
    rope_peak = gl.max(gl.max(gl.abs(rope.to(gl.float32)), 2), 0)
    peak = gl.convert_layout(peak, HEADS)
    peak = gl.maximum(peak, gl.convert_layout(rope_peak, HEADS))
    # The maximum's exponent field E becomes 127 + 7; at most 253, so that the inverse is normal.
    exponent = gl.minimum(261 - (peak.to(gl.int32, bitcast=True) >> 23), 253)
    factor = (exponent << 23).to(gl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    by = gl.convert_layout(factor, gl.SliceLayout(0, gl.SliceLayout(2, Q_LATENT)))
    latent = (latent.to(gl.float32) * by[None, :, None]).to(gl.float16)
    by = gl.convert_layout(factor, gl.SliceLayout(0, gl.SliceLayout(2, Q_ROPE)))
    rope = (rope.to(gl.float32) * by[None, :, None]).to(gl.bfloat16)
    return latent, rope, inverse


@gluon.jit
def group_logits(q, q_rope, latent, rope, scales):
    """The groups' parts of a tile's logits, [4, BLOCK_H, BLOCK_T]."""
    zero = gl.zeros([4, BLOCK_H, BLOCK_T], gl.float32, layout=MMA)
    k = latent.permute((0, 2, 1)).load(K_LATENT).to(gl.float16)
    s = mma_v2(q, k, zero)
    s = s * gl.expand_dims(scales.permute((1, 0)).load(COLUMNS), 1)
    return mma_v2(q_rope, rope.permute((0, 2, 1)).load(K_ROPE), s)


@gluon.jit
def publish(s, stage, parts, all_scales, column_scale, column_size, column_inverse):
    """Share a tile's parts of S with the consumer's other warps, and what is made of its scales.

    column_*: [4, BLOCK_T], computed by one lane per token.
    """
    BY_LANE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    scales = all_scales.index(stage).permute((1, 0)).load(BY_LANE)
    column_scale.store(scales)
    column_size.store(log2(gl.maximum(gl.abs(scales), FLOOR)))
    column_inverse.store(reciprocal(scales))
    parts.store(s)


@gluon.jit
def softmax(
    parts, whole, bias, column_scale, column_size, column_inverse, row_scale, base, total, error,
    peak, WANT_MAX: gl.constexpr,
):  # fmt: skip
    """One tile's weights P * scale [4, BLOCK_H, BLOCK_T] fp16 and the running state moved on.

    Returns weights, decay (of accumulators), base, total, error, peak.
    """
    s = gl.sum(parts.load(QUARTER), 0)
    whole.store(s * row_scale[:, None] + bias[None, :])
    s = gl.convert_layout(whole.load(SUM), gl.SliceLayout(0, MMA), assert_trivial=True)
    if WANT_MAX:
        peak = gl.maximum(peak, gl.max(s, 1))
    s = gl.expand_dims(s, 0)
    need = gl.max(s + gl.expand_dims(column_size.load(COLUMNS), 1), 2)
    moved = gl.where(need > base + (START + GROWTH), gl.ceil(need) - START, base)
    # With nothing valid so far it is -inf; subtracting 0 instead keeps exp2 at 0.
    shift = gl.where(moved == float("-inf"), 0.0, moved)
    decay = exp2(base - shift)
    scales = gl.expand_dims(column_scale.load(COLUMNS), 1)
    p, scales = gl.broadcast(exp2(s - gl.expand_dims(shift, 2)), scales)
    exact = p * scales
    rounded = round_weights(exact)
    change = (rounded - exact) * gl.expand_dims(column_inverse.load(COLUMNS), 1)
    SUMS: gl.constexpr = total.type.layout
    fading = gl.convert_layout(decay, gl.SliceLayout(2, SUMS), assert_trivial=True)
    fading = gl.expand_dims(fading, 2)
    total = total * fading + thread_sums(p)
    error = error * fading + thread_sums(change)
    weights = gl.convert_layout(rounded.to(gl.float16), WEIGHTS)
    return weights, decay, moved, total, error, peak


@gluon.jit
def consume(
    which: gl.constexpr, q_ptr, head_stride, heads, tiles, scale_log2, latent8, latent16, rope,
    scales, bias, parts, whole, column_scale, column_size, column_inverse, full, empty,
    STAGES: gl.constexpr, WANT_MAX: gl.constexpr,
):  # fmt: skip
    """Attend to every second tile, from tile `which` on; returns the softmax state.

    acc0, acc1 [4, BLOCK_H, 64]: the groups' even and odd dims; base [4, BLOCK_H]; total, error
    [4, BLOCK_H, 4]: sums of P, and of (rounded weight - weight) / scale; peak [BLOCK_H].
    """
    q, q_rope, row_scale = load_query(q_ptr, head_stride, heads)
    row_scale = gl.convert_layout(row_scale * scale_log2, QUARTER_HEADS)
    zero = gl.zeros([4, BLOCK_H, BLOCK_T], gl.float32, layout=MMA)
    base = gl.full([4, BLOCK_H], float("-inf"), gl.float32, layout=ROWS)
    total = thread_sums(zero)
    error = total
    peak = gl.full([BLOCK_H], float("-inf"), gl.float32, gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    acc0 = gl.zeros([4, BLOCK_H, 64], gl.float32, layout=MMA)
    acc1 = gl.zeros([4, BLOCK_H, 64], gl.float32, layout=MMA)
    count = (tiles + 1 - which) // 2
    stage = which
    phase = 0
    mbarrier.wait(full.index(stage), phase)
    s = group_logits(q, q_rope, latent8.index(stage), rope.index(stage), scales.index(stage))
    for i in range(count):
        publish(s, stage, parts, scales, column_scale, column_size, column_inverse)
        next_stage = stage + 2
        wrap = next_stage >= STAGES
        next_stage = gl.where(wrap, next_stage - STAGES, next_stage)
        phase = gl.where(wrap, phase ^ 1, phase)
        mask = bias.index((2 * i + which) % (2 * CHUNK_TILES)).load(QUARTER_TOKENS)
        weights, decay, base, total, error, peak = softmax(
            parts, whole, mask, column_scale, column_size, column_inverse, row_scale, base, total,
            error, peak, WANT_MAX,
        )  # fmt: skip
        # The next tile's logits before this tile's values: their products overlap.
        if i + 1 < count:
            mbarrier.wait(full.index(next_stage), phase)
            s = group_logits(
                q,
                q_rope,
                latent8.index(next_stage),
                rope.index(next_stage),
                scales.index(next_stage),
            )
        even, odd = unpack_values(latent16.index(stage).load(VALUES))
        acc0, acc1 = rescale(acc0, acc1, decay)
        acc0 = mma_v2(weights, even, acc0)
        acc1 = mma_v2(weights, odd, acc1)
        # After the barrier every warp has read the stage and the parts. Each thread arrives by the
        # copies' instruction, with no copy of its own to wait for: a plain arrival is fenced by
        # barriers on both sides.
        barrier()
        async_copy.mbarrier_arrive(empty.index(stage), increment_count=False)
        stage = next_stage
    return acc0, acc1, base, total, error, peak


@gluon.jit
def consume_first(
    q_ptr, head_stride, heads, tiles, scale_log2, latent8, latent16, rope, scales, bias, parts,
    whole, column_scale, column_size, column_inverse, full, empty, done, STAGES: gl.constexpr,
    WANT_MAX: gl.constexpr,
):  # fmt: skip
    state = consume(
        0, q_ptr, head_stride, heads, tiles, scale_log2, latent8, latent16, rope, scales, bias,
        parts, whole, column_scale, column_size, column_inverse, full, empty, STAGES, WANT_MAX,
    )  # fmt: skip
    barrier()
    mbarrier.arrive(done, count=1)
    return state


@gluon.jit
def consume_second(
    q_ptr, head_stride, heads, tiles, scale_log2, latent8, latent16, rope, scales, bias, parts,
    whole, column_scale, column_size, column_inverse, full, empty, done, saved_acc, saved_base,
    saved_sums, saved_peak, STAGES: gl.constexpr, WANT_MAX: gl.constexpr,
):  # fmt: skip
    acc0, acc1, base, total, error, peak = consume(
        1, q_ptr, head_stride, heads, tiles, scale_log2, latent8, latent16, rope, scales, bias,
        parts, whole, column_scale, column_size, column_inverse, full, empty, STAGES, WANT_MAX,
    )  # fmt: skip
    # The ring is free for the state once the first consumer has read its last tile.
    mbarrier.wait(done, 0)
    saved_acc.index(0).store(acc0)
    saved_acc.index(1).store(acc1)
    saved_base.store(base)
    saved_sums.index(0).store(total)
    saved_sums.index(1).store(error)
    if WANT_MAX:
        saved_peak.store(peak)


@gluon.jit(do_not_specialize=["heads", "head_blocks", "s_q", "topk", "splits", "split_size"])
def attend(
    q_ptr,  # [b, s_q, heads, 576] bf16, strides q_stride_*
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
    page_stride,  # bytes, a multiple of 16
    page_size,
    last_slot,  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    s_q,
    heads,
    head_blocks,
    topk,
    splits,
    split_size,  # entries per split
    scale_log2,  # softmax scale * log2(e)
    TOKEN_STRIDE: gl.constexpr,  # bytes, a multiple of 16
    PACKED: gl.constexpr,  # page_stride == page_size * TOKEN_STRIDE
    SPLIT: gl.constexpr,
    # Even, so that a stage is always the same consumer's: a wait for another's tile could be
    # answered by the phase before it. At most CHUNK_TILES.
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    pid = gl.program_id(0)
    head_block = pid % head_blocks
    split = (pid // head_blocks) % splits
    token = pid // (head_blocks * splits)
    tokens = gl.num_programs(0) // (head_blocks * splits)
    b = (token // s_q).to(gl.int64)
    s = (token % s_q).to(gl.int64)

    limit = topk
    if lengths_ptr is not None:
        limit = gl.maximum(gl.minimum(gl.load(lengths_ptr + b), topk), 0)
    first = split * split_size
    limit = gl.minimum(limit, first + split_size)
    # Each consumer takes at least one tile, however empty.
    tiles = gl.maximum(gl.cdiv(limit - first, BLOCK_T), 2)
    line = indices_ptr + b * indices_stride_b + s * indices_stride_s
    first_rows = resolve(
        line, first, limit, last_slot, page_stride, page_size, TOKEN_STRIDE, PACKED
    )
    first_head = head_block * BLOCK_H
    heads_here = heads - first_head
    q_block = q_ptr + b * q_stride_b + s * q_stride_s + first_head.to(gl.int64) * q_stride_h
    words = kv_ptr.to(gl.pointer_type(gl.int32))

    # The ring. latent: [group, token, dim], so that a group's bytes are rows of 128.
    latent8 = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES, 4, BLOCK_T, 128], gl.NVMMASharedLayout(128, 8, 3)
    )
    latent16 = reinterpret(
        latent8, gl.int16, [STAGES, 4, BLOCK_T, 64], gl.NVMMASharedLayout(128, 16, 3)
    )
    latent32 = reinterpret(
        latent8, gl.int32, [STAGES, 4, BLOCK_T, 32], gl.NVMMASharedLayout(128, 32, 3)
    )
    rope = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES, 4, BLOCK_T, 16], gl.NVMMASharedLayout(32, 16, 3)
    )
    rope32 = reinterpret(rope, gl.int32, [STAGES, 4, BLOCK_T, 8], gl.NVMMASharedLayout(32, 32, 3))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_T, 4], PLAIN)
    scales32 = reinterpret(scales, gl.int32, [STAGES, BLOCK_T, 4], PLAIN)
    rows = gl.allocate_shared_memory(gl.int64, [CHUNK_TILES, BLOCK_T], PLAIN)
    bias = gl.allocate_shared_memory(gl.float32, [2, CHUNK_TILES, BLOCK_T], PLAIN)
    bias_of = reinterpret(bias, gl.float32, [2 * CHUNK_TILES, BLOCK_T], LINE)
    # Each consumer's own.
    parts0 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_H, BLOCK_T], PARTS_SHARED)
    parts1 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_H, BLOCK_T], PARTS_SHARED)
    whole0 = gl.allocate_shared_memory(gl.float32, [BLOCK_H, BLOCK_T], SUM_SHARED)
    whole1 = gl.allocate_shared_memory(gl.float32, [BLOCK_H, BLOCK_T], SUM_SHARED)
    scale0 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_T], PLAIN)
    scale1 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_T], PLAIN)
    size0 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_T], PLAIN)
    size1 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_T], PLAIN)
    inverse0 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_T], PLAIN)
    inverse1 = gl.allocate_shared_memory(gl.float32, [4, BLOCK_T], PLAIN)
    # The second consumer's state, at the end: in the ring, and where it alone reads and writes.
    saved_acc = reinterpret(
        latent8, gl.float32, [2, 4, BLOCK_H, 64], gl.SwizzledSharedLayout(2, 1, 16, [2, 1, 0])
    )
    saved_sums = reinterpret(
        parts1, gl.float32, [2, 4, BLOCK_H, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    saved_base = reinterpret(size1, gl.float32, [4, BLOCK_H], PLAIN)
    saved_peak = reinterpret(inverse1, gl.float32, [BLOCK_H], LINE)

    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # The producer's 128 threads when their copies land, and one of them for the masks.
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=128)
    mbarrier.init(done, count=1)
    share_rows(first_rows, rows, bias, 0)
    WANT_MAX: gl.constexpr = max_ptr is not None
    acc0, acc1, base, total, error, peak = gl.warp_specialize(
        [
            (
                consume_first,
                (q_block, q_stride_h, heads_here, tiles, scale_log2, latent8, latent16, rope,
                 scales, bias_of, parts0, whole0, scale0, size0, inverse0, full, empty, done,
                 STAGES, WANT_MAX),
            ),
            (
                consume_second,
                (q_block, q_stride_h, heads_here, tiles, scale_log2, latent8, latent16, rope,
                 scales, bias_of, parts1, whole1, scale1, size1, inverse1, full, empty, done,
                 saved_acc, saved_base, saved_sums, saved_peak, STAGES, WANT_MAX),
            ),
            (
                produce,
                (words, line, first, limit, tiles, last_slot, page_stride, page_size, latent32,
                 rope32, scales32, rows, bias, full, empty, TOKEN_STRIDE, PACKED, STAGES),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip

    # Merge the two states; rescaling is by powers of two, exact.
    other_base = saved_base.load(ROWS)
    merged = gl.maximum(base, other_base)
    shift = gl.where(merged == float("-inf"), 0.0, merged)
    near = exp2(base - shift)
    far = exp2(other_base - shift)
    SUMS: gl.constexpr = total.type.layout
    near_sums = gl.expand_dims(gl.convert_layout(near, gl.SliceLayout(2, SUMS)), 2)
    far_sums = gl.expand_dims(gl.convert_layout(far, gl.SliceLayout(2, SUMS)), 2)
    total = gl.sum(total * near_sums + saved_sums.index(0).load(SUMS) * far_sums, 2)
    error = gl.sum(error * near_sums + saved_sums.index(1).load(SUMS) * far_sums, 2)
    total = gl.convert_layout(total, ROWS)
    divisor = total + gl.convert_layout(error, ROWS)

    # Every group knows the sum of P; the first one's is stored.
    group = gl.arange(0, 4, layout=gl.SliceLayout(1, ROWS))[:, None]
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, ROWS))[None, :]
    here = head < heads_here
    lse = merged + gl.log2(total)
    factor = gl.full_like(lse, 1.0)
    if not SPLIT:
        lse = lse * 0.6931471805599453
        if sink_ptr is not None:
            factor = sink_factor(lse, gl.load(sink_ptr + first_head + head, mask=here, other=0.0))
    row = (split.to(gl.int64) * tokens + token) * heads + first_head
    gl.store(lse_ptr + row + head + group * 0, lse, mask=here & (group == 0))
    if WANT_MAX:
        peak = gl.maximum(peak, saved_peak.load(peak.type.layout))
        peak_head = gl.arange(0, BLOCK_H, layout=peak.type.layout)
        at = max_ptr + row + peak_head
        gl.store(at, peak * 0.6931471805599453, mask=peak_head < heads_here)
    factor = gl.where(divisor == 0.0, 0.0, factor / divisor)
    near = gl.expand_dims(near * factor, 2)
    far = gl.expand_dims(far * factor, 2)
    even = acc0 * near + saved_acc.index(0).load(MMA) * far
    odd = acc1 * near + saved_acc.index(1).load(MMA) * far
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    out = gl.join(even.to(dtype), odd.to(dtype)).reshape([4, BLOCK_H, 128])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    out = gl.convert_layout(gl.permute(out, (1, 0, 2)).reshape([BLOCK_H, 512]), OUT)
    out_head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, OUT))
    dim = gl.arange(0, 512, layout=gl.SliceLayout(0, OUT))
    at = out_ptr + row * 512 + out_head[:, None] * 512 + dim[None, :]
    gl.store(at, out, mask=(out_head < heads_here)[:, None])
