"""The Hopper kernel for many heads and bounded scales: 64 heads of one query token per program.

It answers programs whose scales lie within 17 binades of each other (`LOWEST_SCALE` and
`HIGHEST_SCALE`), as quantised activations' do, and says in `wild` which have others: what it wrote
for those is void, and sm90_many_heads_kernel, made for any scales, redoes them.

Four groups of four warps share the work on tiles of 64 tokens, two tiles (a pair) at a time:

    left     logits and softmax of the even tile, O[:, :256] += P0 V0 + P1 V1
    right    logits and softmax of the odd tile, O[:, 256:] += P0 V0 + P1 V1
    fill     twice: half of the tokens each, rows to unscaled fp16 in shared memory
             (sm90_bounded_scales_fill_kernel)

As in the kernel for V4's caches `right` applies the even tile's weights before it has its own
tile's logits, which frees the even tile early.

Arithmetic. e4m3 is exact in fp16; logits use the exact fp32 scales s0..s3 of each token, in the
accumulators, between products (S_g = Q_g K_g^T):

    S = (((S_0 s0/s1 + S_1) s1/s2 + S_2) s2/s3 + S_3) s3 + S_rope

The values' side takes one fp16 P for all groups: w_g = fp16(P * scale_g), scale_g in fp16, rounded
stochastically by token; P is relative to a power of two times a fraction that differs by head.
Scales of one mantissa and equal logits then leave no gain error, and rescaling stays exact. P is
handed over unscaled; each consumer applies the scales of its own two groups. The running base goes
from hand to hand with it.
Queries are scaled by a power of two per row into fp16, which holds the 8 bits of bf16 exactly over
22 binades below the row's maximum.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_compat import async_load, barrier, reinterpret
from ..sm90_pairs_kernel import LN2, exp2, launch_dependents, opaque_zero
from .sm90_bounded_scales_fill_kernel import (
    RAW,
    RAW_SLOTS,
    S0_OVER_S1,
    S1_OVER_S2,
    S2_OVER_S3,
    S3,
    Shared,
    fill,
    pair_count,
)
from .sm90_many_heads_fill_kernel import F16, VECTOR
from .sm90_many_heads_shared_kernel import (
    LOWEST,
    O_MMA,
    O_ROW,
    P_OPERAND,
    S_COLUMN,
    S_MMA,
    S_ROW,
    SUMS,
    SUMS_ROW,
    WIDE,
    WIDE_F32,
    log2,
    query_power,
    sink_share,
    thread_sums,
)

# Programs that an H100 or H200 has room for at once.
ONE_WAVE = gl.constexpr(132)

# Queries in shared memory: eight lanes read a row of a panel.
QUERY = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 64], [0, 128], [16, 0], [32, 0]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        warp_bases=[[4, 0], [8, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
QUERY_ROW = gl.constexpr(gl.SliceLayout(1, QUERY))
# The RoPE part, an operand in registers.
Q_ROPE = gl.constexpr(gl.DotOperandLayout(0, S_MMA, 2))
ROPE_ROW = gl.constexpr(gl.SliceLayout(1, Q_ROPE))
# Values by token of the columns of S that a thread holds: 16 in a row.
BY_THREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], [8]],
        lane_bases=[[16], [32], [0], [0], [0]],
        warp_bases=[[0], [0]],
        block_bases=[],
        shape=[64],
    )
)
# P is exchanged as each thread holds it: 32 values, four vectors of 16 bytes.
P_VECTORS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], [1024], [2048]],
        lane_bases=[[8], [16], [32], [64], [128]],
        warp_bases=[[256], [512]],
        block_bases=[],
        shape=[4096],
    )
)


@gluon.jit
def copy_query(q, stride_h, heads, target, HALF: gl.constexpr):
    """Start copying [64, 256] of the latent part; 0 past the last head."""
    row = gl.arange(0, 64, layout=QUERY_ROW)
    dims = gl.arange(0, 256, layout=gl.SliceLayout(0, QUERY)) + HALF * 256
    at = (row[:, None].to(gl.int64) * stride_h) * 8 + dims[None, :]
    at = gl.max_contiguous(gl.multiple_of(at, [1, 8]), [1, 8])
    async_load(target, q + at, mask=(row < heads)[:, None])
    async_copy.commit_group()


@gluon.jit
def query(q, stride_h, heads, shared, HALF: gl.constexpr):
    """Put this consumer's half of Q, scaled, into shared memory.

    Returns the RoPE part, scaled, as an operand, and the power of two per row [64].
    """
    q_half = shared.q_left if HALF == 0 else shared.q_right
    raw = reinterpret(q_half, gl.bfloat16, [1, 64, 256], F16).index(0)
    copy_query(q, stride_h, heads, raw, HALF)
    row = gl.arange(0, 64, layout=ROPE_ROW)
    dims = 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, Q_ROPE))
    at = (row[:, None].to(gl.int64) * stride_h) * 8 + dims[None, :]
    at = gl.max_contiguous(gl.multiple_of(at, [1, 2]), [1, 2])
    rope = gl.load(q + at, mask=(row < heads)[:, None], other=0.0)
    shared.sums.index(2 + HALF).store(gl.max(gl.abs(rope.to(gl.float32)), 1))
    async_copy.wait_group(0)
    barrier()
    latent = raw.load(QUERY)
    top = gl.max(gl.abs(latent.to(gl.float32)), 1)
    top = gl.maximum(top, shared.sums.index(2 + HALF).load(QUERY_ROW))
    shared.sums.index(HALF).store(top)
    barrier()
    mbarrier.arrive(shared.q_met, count=1)
    mbarrier.wait(shared.q_met, 0)
    power = query_power(gl.maximum(top, shared.sums.index(1 - HALF).load(QUERY_ROW)))
    q_half.index(0).store((latent.to(gl.float32) * power[:, None]).to(gl.float16))
    shared.sums.index(2 + HALF).store(power)
    fence_async_shared()
    barrier()
    mbarrier.arrive(shared.q_full, count=1)
    rope_power = shared.sums.index(2 + HALF).load(ROPE_ROW)
    rope = (rope.to(gl.float32) * rope_power[:, None]).to(gl.bfloat16)
    return rope, shared.sums.index(2 + HALF).load(S_ROW)


@gluon.jit
def by_thread(table, ROW: gl.constexpr):
    """A table's row, values by token, as columns of S."""
    values = reinterpret(table, table.dtype, [8, 64], VECTOR).index(ROW).load(BY_THREAD)
    values = values.reshape([4, 8, 2]).permute((1, 0, 2)).reshape([64])
    return gl.convert_layout(values, S_COLUMN, assert_trivial=True)[None, :]


@gluon.jit
def multiply(q, k, s):
    """Start adding q k^T to s."""
    return warpgroup_mma(q, k.permute((1, 0)), warpgroup_mma_init(s), is_async=True)


@gluon.jit
def tile_logits(shared, rope, HALF: gl.constexpr, zero, phase, factor):
    """Logits of a tile of the pair in the log2 domain, [64, 64], -inf for masked tokens.

    Each scale is loaded before the product that it waits for: later it would queue behind the
    products' operands.
    """
    mbarrier.wait(shared.left_full.index(HALF), phase)
    ratio = by_thread(shared.tables, 4 * HALF + S0_OVER_S1)
    q = shared.q_left.index(zero)
    k = shared.k_left.index(HALF + zero)
    s = warpgroup_mma(
        q.slice(0, 128, dim=1),
        k.slice(0, 128, dim=1).permute((1, 0)),
        gl.full([64, 64], 0.0, gl.float32, layout=S_MMA),
        use_acc=False,
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[s]) * ratio
    ratio = by_thread(shared.tables, 4 * HALF + S1_OVER_S2)
    s = multiply(q.slice(128, 128, dim=1), k.slice(128, 128, dim=1), s)
    s = warpgroup_mma_wait(0, deps=[s]) * ratio
    ratio = by_thread(shared.tables, 4 * HALF + S2_OVER_S3)
    mbarrier.wait(shared.right_full.index(HALF), phase)
    q = shared.q_right.index(zero)
    k = shared.k_right.index(HALF + zero)
    s = multiply(q.slice(0, 128, dim=1), k.slice(0, 128, dim=1), s)
    s = warpgroup_mma_wait(0, deps=[s]) * ratio
    ratio = by_thread(shared.tables, 4 * HALF + S3)
    s = multiply(q.slice(128, 128, dim=1), k.slice(128, 128, dim=1), s)
    s = warpgroup_mma_wait(0, deps=[s]) * gl.abs(ratio)
    s = multiply(rope, shared.k_rope.index(HALF + zero), s)
    s = warpgroup_mma_wait(0, deps=[s])
    # The scale of an invalid token is negative. Its logit may be anything, as K is 0, not Q.
    return gl.where(ratio < 0.0, float("-inf"), s * factor[:, None])


@gluon.jit
def softmax(s, top, base, fraction):
    """The base raised for a tile with maxima `top`, and p relative to 2^base: sums and fp16.

    p reaches 2^7.
    """
    raised = gl.maximum(gl.ceil(top + fraction) - (fraction + 7.0), LOWEST)
    base = gl.maximum(base, raised)
    p = exp2(s - base[:, None])
    return base, thread_sums(p), p.to(gl.float16)


@gluon.jit
def store_p(p, target):
    """Store p [64, 64] fp16 so that a thread's 32 values are 4 vectors of 16 bytes."""
    parts = p.reshape([4, 2, 8, 4, 2, 4, 2]).permute((3, 0, 2, 5, 4, 1, 6))
    reinterpret(target, gl.float16, [4096], VECTOR).store(parts.reshape([4096]))


@gluon.jit
def load_p(source):
    """What `store_p` stored, in the threads that stored it."""
    parts = reinterpret(source, gl.float16, [4096], VECTOR).load(P_VECTORS)
    parts = parts.reshape([4, 4, 8, 4, 2, 2, 2]).permute((1, 5, 2, 0, 4, 3, 6))
    return gl.convert_layout(parts.reshape([64, 64]), S_MMA, assert_trivial=True)


@gluon.jit
def weigh(p, scale):
    """p [64, n] times a group's scales [1, n], fp16, as an operand."""
    p, scale = gl.broadcast(p, scale)
    weights = gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [p, scale], dtype=gl.float16, is_pure=True, pack=2
    )
    return gl.convert_layout(weights, P_OPERAND)


@gluon.jit
def add_values(p, decay, shared, TILE: gl.constexpr, zero, acc0, acc1, HALF: gl.constexpr):
    """Start adding a tile's values of this consumer's two groups, after rescaling by `decay`."""
    values = shared.k_left if HALF == 0 else shared.k_right
    values = values.index(TILE + zero)
    w0 = weigh(p, by_thread(shared.weights, 4 * TILE + 2 * HALF))
    w1 = weigh(p, by_thread(shared.weights, 4 * TILE + 2 * HALF + 1))
    decay = gl.convert_layout(decay, O_ROW)[:, None]
    acc0 = warpgroup_mma_init(acc0 * decay)
    acc1 = warpgroup_mma_init(acc1 * decay)
    acc0 = warpgroup_mma(w0, values.slice(0, 128, dim=1), acc0, is_async=True)
    acc1 = warpgroup_mma(w1, values.slice(128, 128, dim=1), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def decay_sums(total, decay):
    return total * gl.convert_layout(decay, SUMS_ROW)[:, None]


@gluon.jit
def publish(shared, p, base, HALF: gl.constexpr, zero):
    """Hand a tile's P and the running base to the other consumer, which reads them with ordinary
    loads, so that no proxy fence is needed."""
    shared.base.index(HALF).store(base)
    store_p(p, shared.k_rope.index(HALF + zero))
    barrier()
    mbarrier.arrive(shared.p_full.index(HALF), count=1)


@gluon.jit
def store_output(acc0, acc1, factor, shared, out, heads, HALF: gl.constexpr):
    """The consumer's half of the output through its half of K to 16-byte stores."""
    dtype: gl.constexpr = out.dtype.element_ty
    bits: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = WIDE if bits == 16 else WIDE_F32
    values = shared.k_left if HALF == 0 else shared.k_right
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, bits, 2)
    staging = reinterpret(values, dtype, [32 // bits, 64, 256], swizzled).index(0)
    factor = gl.convert_layout(factor, O_ROW)[:, None]
    staging.slice(0, 128, dim=1).store((acc0 * factor).to(dtype))
    staging.slice(128, 128, dim=1).store((acc1 * factor).to(dtype))
    barrier()
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, 256, layout=gl.SliceLayout(0, layout)) + HALF * 256
    at = row[:, None] * 512 + dims[None, :]
    gl.store(out + at, staging.load(layout), mask=(row < heads)[:, None])


@gluon.jit
def attend_half(
    q, stride_h, sink, out, lse, max_logits, heads, limit, scale_log2, shared,
    SPLIT: gl.constexpr, HAS_SINK: gl.constexpr, WANT_MAX: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A consumer: logits and softmax of one tile of each pair, half of the output's columns."""
    values_free = shared.left_free if HALF == 0 else shared.right_free
    pairs = pair_count(limit)
    rope, power = query(q, stride_h, heads, shared, HALF)
    factor = scale_log2 / power
    row = gl.arange(0, 64, layout=S_ROW)
    # Differs by head, so that equal logits do not all round the same way.
    fraction = ((row * 37) & 63).to(gl.float32) * (1.0 / 64)
    peak = gl.full([64], float("-inf"), gl.float32, layout=S_ROW)
    base = gl.full([64], LOWEST, gl.float32, layout=S_ROW)
    total = gl.full([64, 4], 0.0, gl.float32, layout=SUMS)
    acc0 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    acc1 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    mbarrier.wait(shared.q_full, 0)
    for j in range(pairs):
        zero = opaque_zero(j)
        phase = j & 1
        if HALF == 0:
            s = tile_logits(shared, rope, 0, zero, phase, factor)
            top = gl.max(s, 1)
            if WANT_MAX:
                peak = gl.maximum(peak, top)
            even_base, part, p = softmax(s, top, base, fraction)
            publish(shared, p, even_base, 0, zero)
            decay = exp2(base - even_base)
            acc0, acc1 = add_values(p, decay, shared, 0, zero, acc0, acc1, HALF)
            total = decay_sums(total, decay) + part
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
            barrier()
            mbarrier.arrive(values_free.index(0), count=1)

            mbarrier.wait(shared.p_full.index(1), phase)
            base = shared.base.index(1).load(S_ROW)
            decay = exp2(even_base - base)
            total = decay_sums(total, decay)
            p = load_p(shared.k_rope.index(1 + zero))
            acc0, acc1 = add_values(p, decay, shared, 1, zero, acc0, acc1, HALF)
        else:
            mbarrier.wait(shared.p_full.index(0), phase)
            even_base = shared.base.index(0).load(S_ROW)
            decay = exp2(base - even_base)
            p = load_p(shared.k_rope.index(zero))
            acc0, acc1 = add_values(p, decay, shared, 0, zero, acc0, acc1, HALF)
            total = decay_sums(total, decay)
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
            barrier()
            mbarrier.arrive(values_free.index(0), count=1)

            s = tile_logits(shared, rope, 1, zero, phase, factor)
            top = gl.max(s, 1)
            if WANT_MAX:
                peak = gl.maximum(peak, top)
            base, part, p = softmax(s, top, even_base, fraction)
            publish(shared, p, base, 1, zero)
            decay = exp2(even_base - base)
            total = decay_sums(total, decay) + part
            acc0, acc1 = add_values(p, decay, shared, 1, zero, acc0, acc1, HALF)
        acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        barrier()
        mbarrier.arrive(values_free.index(1), count=1)

    total = gl.convert_layout(gl.sum(total, 1), S_ROW)
    shared.sums.index(HALF).store(total)
    if WANT_MAX:
        shared.sums.index(2 + HALF).store(peak)
    barrier()
    mbarrier.arrive(shared.sums_full, count=1)
    mbarrier.wait(shared.sums_full, 0)
    total = total + shared.sums.index(1 - HALF).load(S_ROW)
    ok = row < heads
    lse_log2 = gl.where(total == 0.0, float("-inf"), base + log2(total))
    inverse = gl.where(total == 0.0, 0.0, shared.unit.load(S_ROW) / total)
    if HAS_SINK and not SPLIT:
        bar = gl.load(sink + row, mask=ok, other=0.0)
        inverse = inverse * sink_share(bar, lse_log2, total)
    if HALF == 0:
        if SPLIT:
            gl.store(lse + row, lse_log2, mask=ok)
        else:
            gl.store(lse + row, lse_log2 * LN2, mask=ok)
        if WANT_MAX:
            peak = gl.maximum(peak, shared.sums.index(3).load(S_ROW))
            gl.store(max_logits + row, peak * LN2, mask=ok)
    store_output(acc0, acc1, inverse, shared, out, heads, HALF)


# One compilation serves all sizes, strides and alignments: Q's strides are in units of 8 elements.
@gluon.jit(
    do_not_specialize=[
        "q_stride_b",
        "q_stride_s",
        "q_stride_h",
        "indices_stride_b",
        "indices_stride_s",
        "page_words",
        "page_size",
        "last_slot",
        "s_q",
        "heads",
        "head_blocks",
        "topk",
        "splits",
        "split_tiles",
    ],
    do_not_specialize_on_alignment=[
        "indices_ptr",
        "lengths_ptr",
        "sink_ptr",
        "lse_ptr",
        "max_ptr",
        "wild_ptr",
    ],
)
def attend_bounded(
    q_ptr,  # [b, s_q, heads, 576] bf16
    kv_ptr,  # cache bytes as int32, 16-byte aligned
    indices_ptr,  # [b, s_q, topk] int32, strides indices_stride_*
    lengths_ptr,  # [b] int32, or None
    sink_ptr,  # [heads] float32, or None; only when unsplit
    out_ptr,  # [splits, b * s_q, heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b * s_q, heads] float32: natural when unsplit, else log2
    max_ptr,  # [b * s_q, heads] float32 natural, or None; only when unsplit
    wild_ptr,  # [programs, 2] int32, written: not 0 where a scale was out of bounds
    q_stride_b,  # strides of q in units of 8 elements
    q_stride_s,
    q_stride_h,
    indices_stride_b,
    indices_stride_s,
    page_words,  # page stride in 32-bit words
    page_size,
    last_slot,  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    s_q,
    heads,
    head_blocks,
    topk,
    splits,
    split_tiles,  # tiles per split
    scale_log2,  # softmax scale * log2(e)
    TOKEN_WORDS: gl.constexpr,  # token stride in 32-bit words
    PACKED: gl.constexpr,  # page stride == page size * token stride
    SPLIT: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    # The head blocks of one token run side by side, so that their shared rows meet in L2.
    pid = gl.program_id(0)
    # The kernel that redoes programs is told at once and begins where this one ends: b=32 56 us
    # instead of 58. Not with more programs than multiprocessors: b=256 239 us instead of 233.
    if gl.num_programs(0) <= ONE_WAVE:
        launch_dependents()
    head = (pid % head_blocks) * 64
    split = (pid // head_blocks) % splits
    token = pid // (head_blocks * splits)
    tokens = gl.num_programs(0) // (head_blocks * splits)
    b = (token // s_q).to(gl.int64)
    s = (token % s_q).to(gl.int64)
    q = q_ptr + (b * q_stride_b + s * q_stride_s + head.to(gl.int64) * q_stride_h) * 8
    line = indices_ptr + b * indices_stride_b + s * indices_stride_s
    limit = topk
    if lengths_ptr is not None:
        limit = gl.maximum(gl.minimum(gl.load(lengths_ptr + b), topk), 0)
    first = split * split_tiles * 64
    limit = gl.minimum(limit - first, split_tiles * 64)
    line += first
    row = (split.to(gl.int64) * tokens + token) * heads + head
    heads -= head
    out = out_ptr + row * 512
    lse = lse_ptr + row
    wild = wild_ptr + pid * 2
    # A partition cannot be passed None: absent pointers are replaced and not used.
    HAS_SINK: gl.constexpr = sink_ptr is not None
    WANT_MAX: gl.constexpr = max_ptr is not None
    sink = sink_ptr + head if HAS_SINK else lse
    max_logits = max_ptr + row if WANT_MAX else lse

    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    by_thread_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    shared = Shared(
        gl.allocate_shared_memory(gl.float16, [1, 64, 256], F16),
        gl.allocate_shared_memory(gl.float16, [1, 64, 256], F16),
        gl.allocate_shared_memory(gl.float16, [2, 64, 256], F16),
        gl.allocate_shared_memory(gl.float16, [2, 64, 256], F16),
        gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], F16),
        gl.allocate_shared_memory(gl.float32, [2, 4, 4, 8, 2], by_thread_layout),
        gl.allocate_shared_memory(gl.float16, [2, 4, 4, 8, 2], by_thread_layout),
        gl.allocate_shared_memory(gl.float32, [2, 64], plain),
        gl.allocate_shared_memory(gl.float32, [4, 64], plain),
        gl.allocate_shared_memory(gl.float32, [64], plain),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [1], barriers),
        gl.allocate_shared_memory(gl.int64, [1], barriers),
        gl.allocate_shared_memory(gl.int64, [1], barriers),
    )
    raw0 = gl.allocate_shared_memory(gl.int32, [RAW_SLOTS, 32, 16], RAW)
    raw1 = gl.allocate_shared_memory(gl.int32, [RAW_SLOTS, 32, 16], RAW)
    for stage in gl.static_range(2):
        mbarrier.init(shared.left_full.index(stage), count=2)
        mbarrier.init(shared.right_full.index(stage), count=2)
        mbarrier.init(shared.left_free.index(stage), count=1)
        mbarrier.init(shared.right_free.index(stage), count=1)
        mbarrier.init(shared.p_full.index(stage), count=1)
    mbarrier.init(shared.q_met, count=2)
    mbarrier.init(shared.q_full, count=2)
    mbarrier.init(shared.sums_full, count=2)
    gl.warp_specialize(
        [
            (attend_half, (
                q, q_stride_h, sink, out, lse, max_logits, heads, limit, scale_log2, shared,
                SPLIT, HAS_SINK, WANT_MAX, 0,
            )),
            (attend_half, (
                q, q_stride_h, sink, out, lse, max_logits, heads, limit, scale_log2, shared,
                SPLIT, HAS_SINK, WANT_MAX, 1,
            )),
            (fill, (
                kv_ptr, line, limit, last_slot, page_size, page_words, wild, raw0,
                shared, TOKEN_WORDS, PACKED, 0,
            )),
            (fill, (
                kv_ptr, line, limit, last_slot, page_size, page_words, wild, raw1,
                shared, TOKEN_WORDS, PACKED, 1,
            )),
        ],
        [4, 4, 4],
        [RIGHT_REGISTERS, FILL_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
