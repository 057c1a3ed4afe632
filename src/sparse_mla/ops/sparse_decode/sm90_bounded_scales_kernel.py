"""The Hopper kernel for many heads and bounded scales: 64 heads of one query token per program.

It answers programs whose scales lie within 17 binades of each other (`LOWEST_SCALE` and
`HIGHEST_SCALE`), as quantised activations' do, and says in `wild` which have others: what it wrote
for those is void, and sm90_many_heads_kernel, made for any scales, redoes them.

Four warpgroups share a tile of 64 tokens:

- `attend_left`: logits, softmax, and the left 256 output dims;
- `attend_right`: the right 256 output dims;
- `fill` twice: half of the tokens each, rows to unscaled fp16.

Arithmetic. e4m3 is exact in fp16; logits use the exact fp32 scales c0..c3 of each token, in the
accumulators, between products (S_g = Q_g K_g^T):

    S = c2 (c0/c2 (S_rope / c0 + S_0) + S_2) + c3 (c1/c3 S_1 + S_3)

The values' side takes one fp16 P for all groups: w_g = fp16(P * scale_g), scale_g in fp16, rounded
stochastically by token; P is relative to a power of two times a fraction that differs by head.
Scales of one mantissa and equal logits then leave no gain error, and rescaling stays exact.
Queries are scaled by a power of two per row into fp16, which holds the 8 bits of bf16 exactly over
22 binades below the row's maximum.

What holds it (H200, b=128 h=64): about 5650 cycles a tile, all of them the chain of `attend_left`:
weights 310, P 490, logits 3800 (the tensor cores need 1150: loads of scales wait behind the
products' reads of shared memory), softmax 850. The same with every row in L2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_compat import barrier, reinterpret
from ..sm90_pairs_kernel import exp2, launch_dependents
from .sm90_bounded_scales_fill_kernel import (
    BARRIERS,
    BIAS,
    BY_THREAD,
    C0_OVER_C2,
    C1_OVER_C3,
    C2,
    C3,
    DECAY,
    FLAT,
    FREE,
    FULL,
    K_ROPE,
    K_SLOTS,
    LAST_FULL,
    P_FREE,
    P_FULL,
    Q_FULL,
    Q_MET,
    Q_ROPE,
    ROPE_FREE,
    ROW_BY_THREAD,
    UNIT,
    VECTORS,
    P,
    fill,
)
from .sm90_many_heads_fill_kernel import F16, VECTOR, chunk_dims, tile_count
from .sm90_many_heads_shared_kernel import (
    LOWEST,
    NARROW,
    O_MMA,
    O_ROW,
    P_OPERAND,
    S_COLUMN,
    S_MMA,
    S_ROW,
    SUMS_ROW,
    WIDE,
    WIDE_F32,
    log2,
    query_power,
    thread_sums,
)

W_COLUMN = gl.constexpr(gl.SliceLayout(0, P_OPERAND))
# Programs that an H100 or H200 has room for at once.
ONE_WAVE = gl.constexpr(132)

# Queries: 4 lanes hold 64 contiguous bytes of a row, so that its maximum takes two shuffles.
QUERY = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 16], [0, 32], [0, 128], [8, 0]],
        lane_bases=[[0, 64], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
QUERY_ROW = gl.constexpr(gl.SliceLayout(1, QUERY))
# Scales of the columns of S that a thread holds: 16 in a row.
COLUMNS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], [8]],
        lane_bases=[[16], [32], [0], [0], [0]],
        warp_bases=[[0], [0]],
        block_bases=[],
        shape=[64],
    )
)


@gluon.jit
def load_query(q, stride_h, heads, HALF: gl.constexpr):
    """[64, 256] of the latent part, columns in the order of `chunk_dims`; 0 past the last head."""
    row = gl.arange(0, 64, layout=QUERY_ROW)
    dims = chunk_dims(gl.arange(0, 256, layout=gl.SliceLayout(0, QUERY))) + HALF * 256
    at = row[:, None].to(gl.int64) * stride_h + dims[None, :]
    return gl.load(q + at, mask=(row < heads)[:, None], other=0.0)


@gluon.jit
def query_top(query, other, exchange, bars, HALF: gl.constexpr):
    """Largest |q| of each row, [64] float32; the warpgroups have half of a row each.

    other: [64] float32, the largest |q| of a part of the row that is not in `query`.
    """
    top = gl.maximum(gl.max(gl.abs(query.to(gl.float32)), 1), other)
    exchange.slice(HALF * 64, 64).store(top)
    barrier()
    mbarrier.arrive(bars.index(Q_MET), count=1)
    mbarrier.wait(bars.index(Q_MET), 0)
    return gl.maximum(top, exchange.slice(64 - HALF * 64, 64).load(QUERY_ROW))


@gluon.jit
def wait_half(bars, half):
    """Wait for half tile `half` (2 i is the left half of tile i) and return its slot."""
    mbarrier.wait(bars.index(FULL + half % 3), (half // 3) & 1)
    return half % 3


@gluon.jit
def softmax(s, biases, stage, factor, peak, fraction):
    """p [64, 64] relative to 2^base, at most 1, the new peak and base; log2 domain.

    base + fraction is an integer. The minimum with +-inf masks invalid tokens even where q is
    NaN: it drops NaN for the other operand, and +inf for a NaN logit still ends as NaN.
    """
    bias = reinterpret(biases, gl.float16, [2, 64], VECTOR).index(stage)
    limit = bias.load(S_COLUMN).to(gl.float32)
    s = gl.minimum(s * factor[:, None], limit[None, :])
    peak = gl.maximum(peak, gl.max(s, 1))
    base = gl.maximum(gl.ceil(peak + fraction) - fraction, LOWEST)
    return exp2(s - base[:, None]), peak, base


@gluon.jit
def weigh(p, scale):
    """p [64, n] times a group's scales [n], fp16."""
    p, scale = gl.broadcast(p, scale[None, :])
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [p, scale], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def group_weights(weights, stage, GROUP: gl.constexpr):
    return reinterpret(weights, gl.float16, [8, 64], VECTOR).index(stage * 4 + GROUP)


@gluon.jit
def by_column(table):
    """A table's row [64], stored by thread, as columns of S."""
    values = table.load(COLUMNS).reshape([4, 8, 2]).permute((1, 0, 2)).reshape([64])
    return gl.convert_layout(values, S_COLUMN, assert_trivial=True)[None, :]


@gluon.jit
def column_scales(ratios, stage, ROW: gl.constexpr):
    return by_column(reinterpret(ratios, gl.float32, [8, 64], VECTOR).index(stage * 4 + ROW))


@gluon.jit
def multiply(q, k, s, FIRST: gl.constexpr):
    """Start adding q k^T to s, or replacing s if FIRST."""
    if FIRST:
        zeros = gl.full([64, 64], 0.0, gl.float32, layout=S_MMA)
        return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(q, k.permute((1, 0)), warpgroup_mma_init(s), is_async=True)


@gluon.jit
def logits(s0, latent, zero, k, ratios, inverses, stage, right, bars):
    """All logits of a tile, [64, 64].

    s0: the RoPE product, in flight; k: the tile's left half; right: the number of its right half.
    One accumulator is rescaled while the other's product runs.
    """
    q = latent.index(zero)
    s1 = multiply(q.slice(128, 128, dim=1), k.slice(128, 128, dim=1), 0.0, True)
    s0 = warpgroup_mma_wait(1, deps=[s0])
    barrier()
    mbarrier.arrive(bars.index(ROPE_FREE), count=1)
    s0 = s0 * by_column(reinterpret(inverses, gl.float32, [2, 64], VECTOR).index(stage))
    s0 = multiply(q.slice(0, 128, dim=1), k.slice(0, 128, dim=1), s0, False)
    s1 = warpgroup_mma_wait(1, deps=[s1])
    s1 = s1 * column_scales(ratios, stage, C1_OVER_C3)
    k = latent.index(K_SLOTS + wait_half(bars, right))
    q = latent.index(zero + 1)
    s1 = multiply(q.slice(128, 128, dim=1), k.slice(128, 128, dim=1), s1, False)
    s0 = warpgroup_mma_wait(1, deps=[s0])
    s0 = s0 * column_scales(ratios, stage, C0_OVER_C2)
    s0 = multiply(q.slice(0, 128, dim=1), k.slice(0, 128, dim=1), s0, False)
    s1 = warpgroup_mma_wait(1, deps=[s1])
    s1 = s1 * column_scales(ratios, stage, C3)
    s0 = warpgroup_mma_wait(0, deps=[s0])
    return gl.fma(s0, gl.zeros_like(s0) + column_scales(ratios, stage, C2), s1)


@gluon.jit
def publish(p, decay, small, vectors, bars, i):
    """Hand tile i's p and the factor for the output so far to the other warpgroup.

    It reads them with ordinary loads, so that no proxy fence is needed.
    """
    mbarrier.wait(bars.index(P_FREE), (i & 1) ^ 1)
    reinterpret(small.index(P), gl.float16, [64, 64], F16).store(p)
    vectors.index(DECAY).store(decay)
    barrier()
    mbarrier.arrive(bars.index(P_FULL), count=1)


@gluon.jit
def start_values(p, weights, stage, k, acc0, acc1):
    """Start adding a tile's values of the left two groups."""
    w0 = weigh(p, group_weights(weights, stage, 0).load(S_COLUMN))
    w1 = weigh(p, group_weights(weights, stage, 1).load(S_COLUMN))
    w0 = gl.convert_layout(w0, P_OPERAND)
    w1 = gl.convert_layout(w1, P_OPERAND)
    k0 = k.slice(0, 128, dim=1)
    k1 = k.slice(128, 128, dim=1)
    acc0 = warpgroup_mma(w0, k0, warpgroup_mma_init(acc0), is_async=True)
    acc1 = warpgroup_mma(w1, k1, warpgroup_mma_init(acc1), is_async=True)
    return acc0, acc1


@gluon.jit
def store_output(acc0, acc1, factor, latent, out, heads, HALF: gl.constexpr):
    """Two groups of the output through shared memory to 16-byte stores.

    The left half takes Q's place, which the last logits were the last to read, the right half the
    first slots of K, free once both warpgroups have their last products.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    bits: gl.constexpr = dtype.primitive_bitwidth
    layout: gl.constexpr = WIDE if bits == 16 else WIDE_F32
    count: gl.constexpr = 96 // bits
    shared = reinterpret(latent, dtype, [count, 64, 256], gl.NVMMASharedLayout(128, bits, 2))
    shared = shared.index(HALF * count // 3)
    factor = gl.convert_layout(factor, O_ROW)[:, None]
    shared.slice(0, 128, dim=1).store((acc0 * factor).to(dtype))
    shared.slice(128, 128, dim=1).store((acc1 * factor).to(dtype))
    barrier()
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dims = chunk_dims(gl.arange(0, 256, layout=gl.SliceLayout(0, layout))) + HALF * 256
    at = row[:, None] * 512 + dims[None, :]
    gl.store(out + at, shared.load(layout), mask=(row < heads)[:, None])


@gluon.jit
def attend_left(
    q, stride_h, sink, out, lse, max_logits, heads, limit, scale_log2,
    latent, small, ratios, inverses, weights, vectors, bars,
    SPLIT: gl.constexpr, HAS_SINK: gl.constexpr, WANT_MAX: gl.constexpr,
):  # fmt: skip
    """Logits, softmax, lse, and the left half of the output."""
    tiles = tile_count(limit)
    exchange = reinterpret(small.index(P), gl.float32, [2048], VECTOR)
    query = load_query(q, stride_h, heads, 0)
    power = query_power(query_top(query, 0.0, exchange, bars, 0))
    latent.index(0).store((query.to(gl.float32) * power[:, None]).to(gl.float16))
    exchange.slice(128, 64).store(scale_log2 / power)
    fence_async_shared()
    barrier()
    factor = exchange.slice(128, 64).load(S_ROW)
    mbarrier.wait(bars.index(Q_FULL), 0)
    row = gl.arange(0, 64, layout=S_ROW)
    ok = row < heads
    # Differs by head, so that equal logits do not all round the same way.
    fraction = ((row * 37) & 63).to(gl.float32) * (1.0 / 64)

    peak = gl.full([64], float("-inf"), gl.float32, layout=S_ROW)
    k = latent.index(K_SLOTS + wait_half(bars, 0))
    s = multiply(small.index(Q_ROPE), small.index(K_ROPE), 0.0, True)
    s = logits(s, latent, 0, k, ratios, inverses, 0, 1, bars)
    p, peak, base = softmax(s, vectors.index(BIAS), 0, factor, peak, fraction)
    decay = exp2(LOWEST - base)
    total = thread_sums(p)
    p = p.to(gl.float16)
    acc0 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    acc1 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    for i in range(tiles - 1):
        # An index of 0 that the compiler does not know keeps it from hoisting the descriptors of
        # Q out of the loop, where they spill.
        zero = i >> 30
        k = latent.index(K_SLOTS + (2 * i) % 3)
        next0, next1 = start_values(p, weights, i & 1, k, acc0, acc1)
        publish(p, decay, small, vectors, bars, i)
        k = latent.index(K_SLOTS + wait_half(bars, 2 * i + 2))
        s = multiply(small.index(zero), small.index(K_ROPE), 0.0, True)
        next0, next1 = warpgroup_mma_wait(1, deps=[next0, next1])
        barrier()
        mbarrier.arrive(bars.index(FREE + (2 * i) % 3), count=1)
        other = (i + 1) & 1
        s = logits(s, latent, zero, k, ratios, inverses, other, 2 * i + 3, bars)
        old = base
        p, peak, base = softmax(s, vectors.index(BIAS), other, factor, peak, fraction)
        decay = exp2(old - base)
        acc0 = next0 * gl.convert_layout(decay, O_ROW)[:, None]
        acc1 = next1 * gl.convert_layout(decay, O_ROW)[:, None]
        total = total * gl.convert_layout(decay, SUMS_ROW)[:, None] + thread_sums(p)
        p = p.to(gl.float16)
    last = tiles - 1
    k = latent.index(K_SLOTS + (2 * last) % 3)
    next0, next1 = start_values(p, weights, last & 1, k, acc0, acc1)
    publish(p, decay, small, vectors, bars, last)
    acc0, acc1 = warpgroup_mma_wait(0, deps=[next0, next1])

    total = gl.convert_layout(gl.sum(total, 1), S_ROW)
    lse_log2 = base + log2(total)
    lse_log2 = gl.where(total == 0.0, float("-inf"), lse_log2)
    inverse = gl.where(total == 0.0, 0.0, vectors.index(UNIT).load(S_ROW) / total)
    if SPLIT:
        gl.store(lse + row, lse_log2, mask=ok)
    else:
        gl.store(lse + row, lse_log2 * 0.6931471805599453, mask=ok)
        if HAS_SINK:
            # exp(lse) / (exp(lse) + exp(sink)); +inf gives 0, -inf must not meet lse -inf
            bar = gl.load(sink + row, mask=ok, other=0.0) * 1.4426950408889634
            share = 1.0 / (1.0 + exp2(bar - lse_log2))
            inverse = inverse * gl.where((bar == float("-inf")) | (total == 0.0), 1.0, share)
        if WANT_MAX:
            gl.store(max_logits + row, peak * 0.6931471805599453, mask=ok)
    mbarrier.wait(bars.index(P_FREE), (tiles & 1) ^ 1)
    exchange.slice(0, 64).store(inverse)
    barrier()
    mbarrier.arrive(bars.index(LAST_FULL), count=1)
    store_output(acc0, acc1, inverse, latent, out, heads, 0)


@gluon.jit
def attend_right(
    q, stride_h, out, heads, limit,
    latent, small, weights, vectors, bars,
):  # fmt: skip
    """The right half of the output, from the p that the left warpgroup publishes."""
    tiles = tile_count(limit)
    exchange = reinterpret(small.index(P), gl.float32, [2048], VECTOR)
    p_shared = reinterpret(small.index(P), gl.float16, [64, 64], F16)
    query = load_query(q, stride_h, heads, 1)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, NARROW))
    dims = 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, NARROW))
    at = row[:, None].to(gl.int64) * stride_h + dims[None, :]
    rope = gl.load(q + at, mask=(row < heads)[:, None], other=0.0)
    exchange.slice(192, 64).store(gl.max(gl.abs(rope.to(gl.float32)), 1))
    barrier()
    rope_top = exchange.slice(192, 64).load(QUERY_ROW)
    power = query_power(query_top(query, rope_top, exchange, bars, 1))
    latent.index(1).store((query.to(gl.float32) * power[:, None]).to(gl.float16))
    exchange.slice(256, 64).store(power)
    barrier()
    power = exchange.slice(256, 64).load(gl.SliceLayout(1, NARROW))
    small.index(Q_ROPE).store((rope.to(gl.float32) * power[:, None]).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    mbarrier.arrive(bars.index(Q_FULL), count=1)

    acc0 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    acc1 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    for i in range(tiles):
        mbarrier.wait(bars.index(P_FULL), i & 1)
        decay = vectors.index(DECAY).load(O_ROW)
        acc0 = acc0 * decay[:, None]
        acc1 = acc1 * decay[:, None]
        p = p_shared.load(P_OPERAND)
        k = latent.index(K_SLOTS + (2 * i + 1) % 3)
        w = weigh(p, group_weights(weights, i & 1, 2).load(W_COLUMN))
        next0 = warpgroup_mma(w, k.slice(0, 128, dim=1), warpgroup_mma_init(acc0), is_async=True)
        w = weigh(p, group_weights(weights, i & 1, 3).load(W_COLUMN))
        next1 = warpgroup_mma(w, k.slice(128, 128, dim=1), warpgroup_mma_init(acc1), is_async=True)
        barrier()
        mbarrier.arrive(bars.index(P_FREE), count=1)
        acc0, acc1 = warpgroup_mma_wait(0, deps=[next0, next1])
        barrier()
        mbarrier.arrive(bars.index(FREE + (2 * i + 1) % 3), count=1)
    mbarrier.wait(bars.index(LAST_FULL), 0)
    inverse = exchange.slice(0, 64).load(O_ROW)
    store_output(acc0, acc1, inverse, latent, out, heads, 1)


@gluon.jit(do_not_specialize=["heads", "head_blocks", "s_q", "topk", "splits", "split_tiles"])
def attend_bounded(
    q_ptr,  # [b, s_q, heads, 576] bf16, strides q_stride_*
    kv_ptr,  # cache bytes as int32, 16-byte aligned
    indices_ptr,  # [b, s_q, topk] int32, strides indices_stride_*
    lengths_ptr,  # [b] int32, or None
    sink_ptr,  # [heads] float32, or None; only when unsplit
    out_ptr,  # [splits, b * s_q, heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b * s_q, heads] float32: natural when unsplit, else log2
    max_ptr,  # [b * s_q, heads] float32 natural, or None; only when unsplit
    wild_ptr,  # [programs, 2] int32, written: not 0 where a scale was out of bounds
    q_stride_b,
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
    q = q_ptr + b * q_stride_b + s * q_stride_s + head.to(gl.int64) * q_stride_h
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

    latent = gl.allocate_shared_memory(gl.float16, [6, 64, 256], F16)
    small = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], F16)
    ratios = gl.allocate_shared_memory(gl.float32, [2, 4, 4, 8, 2], BY_THREAD)
    inverses = gl.allocate_shared_memory(gl.float32, [2, 4, 8, 2], ROW_BY_THREAD)
    weights = gl.allocate_shared_memory(gl.float16, [2, 4, 64], FLAT)
    vectors = gl.allocate_shared_memory(gl.float32, [VECTORS, 64], VECTOR)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(BARRIERS):
        mbarrier.init(bars.index(k), count=2 if k < FREE or k == Q_MET else 1)
    gl.warp_specialize(
        [
            (attend_left, (
                q, q_stride_h, sink, out, lse, max_logits, heads, limit, scale_log2,
                latent, small, ratios, inverses, weights, vectors, bars, SPLIT,
                HAS_SINK, WANT_MAX,
            )),
            (attend_right, (
                q, q_stride_h, out, heads, limit,
                latent, small, weights, vectors, bars,
            )),
            (fill, (
                kv_ptr, line, limit, last_slot, page_size, page_words, wild,
                latent, small, ratios, inverses, weights, vectors, bars, TOKEN_WORDS, PACKED, 0,
            )),
            (fill, (
                kv_ptr, line, limit, last_slot, page_size, page_words, wild,
                latent, small, ratios, inverses, weights, vectors, bars, TOKEN_WORDS, PACKED, 1,
            )),
        ],
        [4, 4, 4],
        [RIGHT_REGISTERS, FILL_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
