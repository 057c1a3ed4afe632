"""The Hopper kernel for many heads over FP8 caches: 64 heads of one query token per program.

A program attends 64 heads to one split of the token's index list, 64 tokens (a tile) at a time,
with three warpgroups:

- `attend_left`: logits, softmax, and the left 256 output dims;
- `attend_right`: the right 256 output dims;
- `fill` (sm90_many_heads_fill_kernel): gathers the tokens' rows and converts them to fp16.

Arithmetic. e4m3 is exact in fp16; the fp32 scales stay outside the products, group by group of
128 dims:

    S = sum_g scale_g * (Q_g K_g^T) + Q_rope K_rope^T        out_g = (P * scale_g) K_g

P * scale_g goes to the tensor cores as fp16 times a power of two per row and group (`reference`,
a running maximum), so that no scale overflows it or loses its bits; powers of two make every
rescaling exact. Each group is normalised by what rounding did to the sum of its weights, so that
weights that all round the same way leave no gain error. Queries are scaled by a power of two per
row into fp16, which holds the 8 bits of bf16 exactly over 22 binades below the row's maximum.

What holds it (H200, b=128 h=64): about 8000 cycles a tile, of which the tensor cores are busy
2200. The chain of `attend_left` is serial: weights 2100, its output product 800, logits 3000
(shared memory feeds both operands of 64-column products at its full bandwidth, beside the
conversion's traffic), softmax 700. The gather alone takes 80 to 105 us of the 153.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_compat import barrier, reinterpret
from ..sm90_pairs_kernel import LN2, exp2, launch_dependents, wait_for_primary
from .sm90_many_heads_fill_kernel import (
    BARRIERS,
    BASE,
    BIAS,
    F16,
    FREE,
    K_SLOTS,
    LAST_FULL,
    P_FREE,
    P_FULL,
    Q_FULL,
    Q_MET,
    ROPE_FREE,
    VECTOR,
    VECTORS,
    chunk_dims,
    fill,
    free_half,
    tile_count,
    wait_half,
)
from .sm90_many_heads_shared_kernel import (
    LOWEST,
    NARROW,
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

# Largest weight in fp16: below 2^15, which leaves 29 binades above fp16's smallest normal number.
TOP = gl.constexpr(14.0)

# Half of P, 32 tokens.
HALF_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
HALF_COLUMN = gl.constexpr(gl.SliceLayout(0, HALF_MMA))
# P is exchanged as each thread holds it: 16 values of 32 tokens, four vectors of 16 bytes.
P_VECTORS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [512], [1024]],
        lane_bases=[[4], [8], [16], [32], [64]],
        warp_bases=[[128], [256]],
        block_bases=[],
        shape=[2048],
    )
)
# Row sums of weights by mma.m16n8k16, [64, 8], all columns alike.
ROW_MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
ROW_OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ROW_MMA, k_width=2))
ONES = gl.constexpr(gl.DotOperandLayout(operand_index=1, parent=ROW_MMA, k_width=2))


@gluon.jit
def exponent(x):
    """floor(log2(x)) of a float32 x >= 0 as float32; at least -112."""
    bits = x.to(gl.int32, bitcast=True) >> 23
    return gl.maximum(bits - 127, -112).to(gl.float32)


@gluon.jit
def load_query(q, stride_h, heads, HALF: gl.constexpr):
    """[64, 256] of the latent part, columns in the order of `chunk_dims`; 0 past the last head."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    dims = chunk_dims(gl.arange(0, 256, layout=gl.SliceLayout(0, WIDE))) + HALF * 256
    at = row[:, None].to(gl.int64) * stride_h + dims[None, :]
    return gl.load(q + at, mask=(row < heads)[:, None], other=0.0)


@gluon.jit
def raise_reference(part, base, reference, exact, rounded):
    """A group's new reference exponent, high enough for the tile's weights to fit fp16.

    Args:
        part: [64, 4] sums of the tile's absolute weights, relative to 2^base.
        base, reference: [64] float32 integers: exponents of p and of the group's accumulator.
        exact, rounded: [64, 4] running sums of the absolute weights, before and after rounding.

    Returns:
        new reference, [64] factor for the accumulator, [64] factor for the tile's weights,
        new exact, rounded without the tile.
    """
    whole = gl.convert_layout(gl.sum(part, 1), S_ROW)
    new = gl.maximum(reference, base + (exponent(whole) - TOP))
    decay = exp2(reference - new)
    lift = exp2(base - new)
    decays = gl.convert_layout(decay, SUMS_ROW)[:, None]
    exact = exact * decays + part * gl.convert_layout(lift, SUMS_ROW)[:, None]
    rounded = rounded * gl.convert_layout(decay, gl.SliceLayout(1, ROW_MMA))[:, None]
    return new, decay, lift, exact, rounded


@gluon.jit
def weigh(p, scale, lift, rounded):
    """A group's weights p * scale * lift in fp16, as an operand, and the running sums of them.

    The sums, by a product with ones: half the instructions of unpacking and adding.
    """
    lift = gl.convert_layout(lift, gl.SliceLayout(1, p.type.layout))
    weights = (p * scale[None, :] * lift[:, None]).to(gl.float16)
    ones = gl.full([p.shape[1], 8], 1.0, gl.float16, layout=ONES)
    sums = mma_v2(gl.convert_layout(weights, ROW_OPERAND), ones, rounded)
    return gl.convert_layout(weights, P_OPERAND), sums


@gluon.jit
def add_values(acc0, acc1, weights0, weights1, decay0, decay1, k):
    """Start adding the weighted values of two groups, k [64, 256], to their accumulators.

    Both are rescaled before either product starts: ptxas would wait for the first product to
    touch the second's registers.
    """
    acc0 = acc0 * gl.convert_layout(decay0, O_ROW)[:, None]
    acc1 = acc1 * gl.convert_layout(decay1, O_ROW)[:, None]
    k0 = k.slice(0, 128, dim=1)
    k1 = k.slice(128, 128, dim=1)
    acc0 = warpgroup_mma(weights0, k0, warpgroup_mma_init(acc0), is_async=True)
    acc1 = warpgroup_mma(weights1, k1, warpgroup_mma_init(acc1), is_async=True)
    return acc0, acc1


@gluon.jit
def output_factor(exact, rounded, reference, base, inverse):
    """[64] factor that turns a group's accumulator into output."""
    exact = gl.convert_layout(gl.sum(exact, 1), S_ROW)
    rounded = gl.convert_layout(gl.max(rounded, 1), S_ROW)
    # Rounding is off by at most 2^-12; more comes from weights that underflow, or from negative
    # scales, whose weights cancel in `rounded`.
    factor = gl.where(rounded == 0.0, 1.0, exact / rounded)
    factor = gl.minimum(gl.maximum(factor, 1.0 - 2.5e-4), 1.0 + 2.5e-4)
    return factor * inverse * exp2(reference - base)


@gluon.jit
def store_output(acc0, acc1, factor0, factor1, latent, out, heads, HALF: gl.constexpr):
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
    values = acc0 * gl.convert_layout(factor0, O_ROW)[:, None]
    shared.slice(0, 128, dim=1).store(values.to(dtype))
    values = acc1 * gl.convert_layout(factor1, O_ROW)[:, None]
    shared.slice(128, 128, dim=1).store(values.to(dtype))
    barrier()
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dims = chunk_dims(gl.arange(0, 256, layout=gl.SliceLayout(0, layout))) + HALF * 256
    at = row[:, None] * 512 + dims[None, :]
    gl.store(out + at, shared.load(layout), mask=(row < heads)[:, None])


@gluon.jit
def query_top(query, other, exchange, bars, HALF: gl.constexpr):
    """Largest |q| of each row, [64] float32; the warpgroups have half of a row each.

    other: [64] float32, the largest |q| of a part of the row that is not in `query`.
    """
    row: gl.constexpr = gl.SliceLayout(1, WIDE)
    top = gl.maximum(gl.max(gl.abs(query.to(gl.float32)), 1), other)
    exchange.slice(HALF * 64, 64).store(top)
    barrier()
    mbarrier.arrive(bars.index(Q_MET), count=1)
    mbarrier.wait(bars.index(Q_MET), 0)
    return gl.maximum(top, exchange.slice(64 - HALF * 64, 64).load(row))


@gluon.jit
def add_group(s, q, k, scale):
    """s + scale * (q k^T), the product summed by itself."""
    part = warpgroup_mma(q, k.permute((1, 0)), gl.zeros_like(s), use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, deps=[part])
    return gl.fma(part, gl.zeros_like(s) + scale[None, :], s)


@gluon.jit
def add_right(s, q_right, q_rope, k_right, k_rope, scales, now, bars):
    """s plus the products of the right two groups and of the RoPE part."""
    scale = scales.index(now + 2).load(S_COLUMN)
    s = add_group(s, q_right.slice(0, 128, dim=1), k_right.slice(0, 128, dim=1), scale)
    scale = scales.index(now + 3).load(S_COLUMN)
    s = add_group(s, q_right.slice(128, 128, dim=1), k_right.slice(128, 128, dim=1), scale)
    s = warpgroup_mma(q_rope, k_rope.permute((1, 0)), warpgroup_mma_init(s), is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    barrier()
    mbarrier.arrive(bars.index(ROPE_FREE), count=1)
    return s


@gluon.jit
def softmax(s, bias, stage, factor, peak):
    """p [64, 64] relative to 2^base, the new peak and base; log2 domain.

    The minimum with +-inf masks invalid tokens even where q is NaN: it drops NaN for the other
    operand, and +inf for a NaN logit still ends as NaN.
    """
    bias = reinterpret(bias, gl.float16, [2, 64], VECTOR).index(stage)
    limit = bias.load(S_COLUMN).to(gl.float32)
    s = gl.minimum(s * factor[:, None], limit[None, :])
    peak = gl.maximum(peak, gl.max(s, 1))
    base = gl.maximum(gl.ceil(peak), LOWEST)
    return exp2(s - base[:, None]), peak, base


@gluon.jit
def store_p(p, target):
    """Store p [64, 64] so that a thread's 32 values are 8 vectors of 16 bytes, for `load_p`."""
    parts = p.reshape([4, 2, 8, 4, 2, 4, 2]).permute((3, 1, 0, 2, 5, 4, 6))
    target.store(parts.reshape([4096]))


@gluon.jit
def load_p(source, HALF: gl.constexpr):
    """Half of P, [64, 32], in the threads that stored it."""
    half = source.slice(HALF * 2048, 2048)
    parts = half.load(P_VECTORS).reshape([2, 2, 4, 8, 4, 2, 2]).permute((2, 1, 3, 0, 5, 4, 6))
    return gl.convert_layout(parts.reshape([64, 32]), HALF_MMA, assert_trivial=True)


@gluon.jit
def publish(p, base, p_shared, vectors, bars, i):
    """Hand tile i's p and its base to the other warpgroup."""
    mbarrier.wait(bars.index(P_FREE), (i & 1) ^ 1)
    store_p(p, p_shared.index(1))
    vectors.index(BASE).store(base)
    barrier()
    mbarrier.arrive(bars.index(P_FULL), count=1)


@gluon.jit
def add_left(
    p, base, scales, now, k, acc0, acc1,
    reference0, reference1, exact0, exact1, rounded0, rounded1,
):  # fmt: skip
    """Start adding a tile's values of the left two groups."""
    part0 = thread_sums(p * gl.abs(scales.index(now).load(S_COLUMN))[None, :])
    part1 = thread_sums(p * gl.abs(scales.index(now + 1).load(S_COLUMN))[None, :])
    reference0, decay0, lift0, exact0, rounded0 = raise_reference(
        part0, base, reference0, exact0, rounded0
    )
    reference1, decay1, lift1, exact1, rounded1 = raise_reference(
        part1, base, reference1, exact1, rounded1
    )
    # The scales are read again instead of being kept: the barriers stop the compiler from merging
    # the loads, which would spill.
    barrier()
    weights0, rounded0 = weigh(p, scales.index(now).load(S_COLUMN), lift0, rounded0)
    barrier()
    weights1, rounded1 = weigh(p, scales.index(now + 1).load(S_COLUMN), lift1, rounded1)
    acc0, acc1 = add_values(acc0, acc1, weights0, weights1, decay0, decay1, k)
    return reference0, reference1, exact0, exact1, rounded0, rounded1, acc0, acc1


@gluon.jit
def attend_left(
    q, stride_h, sink, out, lse, max_logits, heads, limit, scale_log2,
    latent, small, scales, vectors, bars,
    SPLIT: gl.constexpr, HAS_SINK: gl.constexpr, WANT_MAX: gl.constexpr,
):  # fmt: skip
    """Logits, softmax, lse, and the left half of the output."""
    tiles = tile_count(limit)
    p_shared = reinterpret(small, gl.float32, [2, 4096], VECTOR)
    exchange = p_shared.index(1)
    query = load_query(q, stride_h, heads, 0)
    power = query_power(query_top(query, 0.0, exchange, bars, 0))
    latent.index(0).store((query.to(gl.float32) * power[:, None]).to(gl.float16))
    exchange.slice(128, 64).store(scale_log2 / power)
    fence_async_shared()
    barrier()
    factor = exchange.slice(128, 64).load(S_ROW)
    mbarrier.wait(bars.index(Q_FULL), 0)

    none = gl.full([64, 64], 0.0, gl.float32, layout=S_MMA)
    peak = gl.full([64], float("-inf"), gl.float32, layout=S_ROW)
    q0 = latent.index(0).slice(0, 128, dim=1)
    q1 = latent.index(0).slice(128, 128, dim=1)
    k = latent.index(K_SLOTS + wait_half(bars, 0))
    s = add_group(none, q0, k.slice(0, 128, dim=1), scales.index(0).load(S_COLUMN))
    s = add_group(s, q1, k.slice(128, 128, dim=1), scales.index(1).load(S_COLUMN))
    k = latent.index(K_SLOTS + wait_half(bars, 1))
    s = add_right(s, latent.index(1), small.index(0), k, small.index(1), scales, 0, bars)
    p, peak, base = softmax(s, vectors.index(BIAS), 0, factor, peak)
    total = thread_sums(p)
    exact0 = gl.full([64, 4], 0.0, gl.float32, layout=SUMS)
    exact1 = exact0
    rounded0 = gl.full([64, 8], 0.0, gl.float32, layout=ROW_MMA)
    rounded1 = rounded0
    reference0 = gl.full([64], LOWEST, gl.float32, layout=S_ROW)
    reference1 = reference0
    acc0 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    acc1 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)

    for i in range(tiles - 1):
        publish(p, base, p_shared, vectors, bars, i)
        reference0, reference1, exact0, exact1, rounded0, rounded1, next0, next1 = add_left(
            p, base, scales, (i & 1) * 4, latent.index(K_SLOTS + (2 * i) % 3), acc0, acc1,
            reference0, reference1, exact0, exact1, rounded0, rounded1,
        )  # fmt: skip
        other = (i + 1) & 1
        now = other * 4
        # An index of 0 that the compiler does not know keeps it from hoisting the 36 descriptors
        # of Q out of the loop, where they spill.
        zero = i >> 30
        q0 = latent.index(zero).slice(0, 128, dim=1)
        q1 = latent.index(zero).slice(128, 128, dim=1)
        k = latent.index(K_SLOTS + wait_half(bars, 2 * i + 2))
        none = gl.full([64, 64], 0.0, gl.float32, layout=S_MMA)
        k0 = k.slice(0, 128, dim=1).permute((1, 0))
        part = warpgroup_mma(q0, k0, none, use_acc=False, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(1, deps=[next0, next1])
        free_half(bars, 2 * i)
        part = warpgroup_mma_wait(0, deps=[part])
        s = part * scales.index(now).load(S_COLUMN)[None, :]
        s = add_group(s, q1, k.slice(128, 128, dim=1), scales.index(now + 1).load(S_COLUMN))
        k = latent.index(K_SLOTS + wait_half(bars, 2 * i + 3))
        s = add_right(
            s, latent.index(zero + 1), small.index(zero), k, small.index(1), scales, now, bars
        )
        old = base
        p, peak, base = softmax(s, vectors.index(BIAS), other, factor, peak)
        decay = gl.convert_layout(exp2(old - base), SUMS_ROW)
        total = total * decay[:, None] + thread_sums(p)
    last = tiles - 1
    publish(p, base, p_shared, vectors, bars, last)
    reference0, reference1, exact0, exact1, rounded0, rounded1, next0, next1 = add_left(
        p, base, scales, (last & 1) * 4, latent.index(K_SLOTS + (2 * last) % 3), acc0, acc1,
        reference0, reference1, exact0, exact1, rounded0, rounded1,
    )  # fmt: skip
    acc0, acc1 = warpgroup_mma_wait(0, deps=[next0, next1])

    total = gl.convert_layout(gl.sum(total, 1), S_ROW)
    inverse = gl.where(total == 0.0, 0.0, 1.0 / total)
    lse_log2 = base + log2(total)
    lse_log2 = gl.where(total == 0.0, float("-inf"), lse_log2)
    row = gl.arange(0, 64, layout=S_ROW)
    ok = row < heads
    if SPLIT:
        gl.store(lse + row, lse_log2, mask=ok)
    else:
        gl.store(lse + row, lse_log2 * LN2, mask=ok)
        if HAS_SINK:
            bar = gl.load(sink + row, mask=ok, other=0.0)
            inverse = inverse * sink_share(bar, lse_log2, total)
        if WANT_MAX:
            gl.store(max_logits + row, peak * LN2, mask=ok)
    mbarrier.wait(bars.index(P_FREE), (tiles & 1) ^ 1)
    exchange.slice(0, 64).store(inverse)
    barrier()
    mbarrier.arrive(bars.index(LAST_FULL), count=1)
    factor0 = output_factor(exact0, rounded0, reference0, base, inverse)
    factor1 = output_factor(exact1, rounded1, reference1, base, inverse)
    store_output(acc0, acc1, factor0, factor1, latent, out, heads, 0)


@gluon.jit
def add_parts(p, scales, now, HALF: gl.constexpr, part0, part1):
    """Add sums of absolute weights of 32 tokens for the right two groups."""
    values = load_p(p, HALF)
    scale0 = scales.index(now + 2).slice(HALF * 32, 32).load(HALF_COLUMN)
    scale1 = scales.index(now + 3).slice(HALF * 32, 32).load(HALF_COLUMN)
    part0 = part0 + thread_sums(values * gl.abs(scale0)[None, :])
    part1 = part1 + thread_sums(values * gl.abs(scale1)[None, :])
    return part0, part1


@gluon.jit
def attend_right(
    q, stride_h, out, heads, limit,
    latent, small, scales, vectors, bars,
):  # fmt: skip
    """The right half of the output, from the p that the left warpgroup publishes."""
    tiles = tile_count(limit)
    p_shared = reinterpret(small, gl.float32, [2, 4096], VECTOR)
    exchange = p_shared.index(1)
    query = load_query(q, stride_h, heads, 1)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, NARROW))
    dims = 512 + gl.arange(0, 64, layout=gl.SliceLayout(0, NARROW))
    at = row[:, None].to(gl.int64) * stride_h + dims[None, :]
    rope = gl.load(q + at, mask=(row < heads)[:, None], other=0.0)
    exchange.slice(192, 64).store(gl.max(gl.abs(rope.to(gl.float32)), 1))
    barrier()
    rope_top = exchange.slice(192, 64).load(gl.SliceLayout(1, WIDE))
    power = query_power(query_top(query, rope_top, exchange, bars, 1))
    latent.index(1).store((query.to(gl.float32) * power[:, None]).to(gl.float16))
    exchange.slice(256, 64).store(power)
    barrier()
    power = exchange.slice(256, 64).load(gl.SliceLayout(1, NARROW))
    small.index(0).store((rope.to(gl.float32) * power[:, None]).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    mbarrier.arrive(bars.index(Q_FULL), count=1)

    exact0 = gl.full([64, 4], 0.0, gl.float32, layout=SUMS)
    exact1 = exact0
    rounded0 = gl.full([64, 8], 0.0, gl.float32, layout=ROW_MMA)
    rounded1 = rounded0
    reference0 = gl.full([64], LOWEST, gl.float32, layout=S_ROW)
    reference1 = reference0
    base = reference0
    acc0 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    acc1 = gl.full([64, 128], 0.0, gl.float32, layout=O_MMA)
    for i in range(tiles):
        now = (i & 1) * 4
        mbarrier.wait(bars.index(P_FULL), i & 1)
        base = vectors.index(BASE).load(S_ROW)
        part0, part1 = add_parts(p_shared.index(1), scales, now, 0, 0.0, 0.0)
        part0, part1 = add_parts(p_shared.index(1), scales, now, 1, part0, part1)
        reference0, decay0, lift0, exact0, rounded0 = raise_reference(
            part0, base, reference0, exact0, rounded0
        )
        reference1, decay1, lift1, exact1, rounded1 = raise_reference(
            part1, base, reference1, exact1, rounded1
        )
        acc0 = acc0 * gl.convert_layout(decay0, O_ROW)[:, None]
        acc1 = acc1 * gl.convert_layout(decay1, O_ROW)[:, None]
        # P is read again instead of being kept, which would spill; an index of 0 that the compiler
        # does not know keeps it from merging the loads.
        k = latent.index(K_SLOTS + (2 * i + 1) % 3)
        next0 = warpgroup_mma_init(acc0)
        next1 = warpgroup_mma_init(acc1)
        for half in gl.static_range(2):
            p = load_p(p_shared.index((i >> 30) + 1), half)
            part_k = k.slice(half * 32, 32, dim=0)
            scale = scales.index(now + 2).slice(half * 32, 32).load(HALF_COLUMN)
            weights, rounded0 = weigh(p, scale, lift0, rounded0)
            next0 = warpgroup_mma(weights, part_k.slice(0, 128, dim=1), next0, is_async=True)
            scale = scales.index(now + 3).slice(half * 32, 32).load(HALF_COLUMN)
            weights, rounded1 = weigh(p, scale, lift1, rounded1)
            next1 = warpgroup_mma(weights, part_k.slice(128, 128, dim=1), next1, is_async=True)
            if half == 0:
                acc0, acc1 = warpgroup_mma_wait(0, deps=[next0, next1])
                next0 = warpgroup_mma_init(acc0)
                next1 = warpgroup_mma_init(acc1)
        barrier()
        mbarrier.arrive(bars.index(P_FREE), count=1)
        acc0, acc1 = warpgroup_mma_wait(0, deps=[next0, next1])
        barrier()
        mbarrier.arrive(bars.index(FREE + (2 * i + 1) % 3), count=1)

    mbarrier.wait(bars.index(LAST_FULL), 0)
    inverse = exchange.slice(0, 64).load(S_ROW)
    factor0 = output_factor(exact0, rounded0, reference0, base, inverse)
    factor1 = output_factor(exact1, rounded1, reference1, base, inverse)
    store_output(acc0, acc1, factor0, factor1, latent, out, heads, 1)


@gluon.jit(do_not_specialize=["heads", "head_blocks", "s_q", "topk", "splits", "split_tiles"])
def attend(
    q_ptr,  # [b, s_q, heads, 576] bf16, strides q_stride_*
    kv_ptr,  # cache bytes as int32, 16-byte aligned
    indices_ptr,  # [b, s_q, topk] int32, strides indices_stride_*
    lengths_ptr,  # [b] int32, or None
    sink_ptr,  # [heads] float32, or None; only when unsplit
    out_ptr,  # [splits, b * s_q, heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b * s_q, heads] float32: natural when unsplit, else log2
    max_ptr,  # [b * s_q, heads] float32 natural, or None; only when unsplit
    wild_ptr,  # [programs, 2] int32: programs with two zeros have nothing to do; or None
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
    AHEAD: gl.constexpr,  # tiles between the L2 prefetch of rows and their gather
    RIGHT_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    # The head blocks of one token run side by side, so that their shared rows meet in L2.
    pid = gl.program_id(0)
    if wild_ptr is not None:
        launch_dependents()
        # The launch may begin before the kernel that writes `wild` has ended.
        wait_for_primary()
        if gl.load(wild_ptr + pid * 2) + gl.load(wild_ptr + pid * 2 + 1) == 0:
            return
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
    # A partition cannot be passed None: absent pointers are replaced and not used.
    HAS_SINK: gl.constexpr = sink_ptr is not None
    WANT_MAX: gl.constexpr = max_ptr is not None
    sink = sink_ptr + head if HAS_SINK else lse
    max_logits = max_ptr + row if WANT_MAX else lse

    latent = gl.allocate_shared_memory(gl.float16, [6, 64, 256], F16)
    small = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 64], F16)
    scales = gl.allocate_shared_memory(gl.float32, [8, 64], VECTOR)  # 2 tiles, 4 groups
    vectors = gl.allocate_shared_memory(gl.float32, [VECTORS, 64], VECTOR)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(BARRIERS):
        mbarrier.init(bars.index(k), count=2 if k == Q_MET else 1)
    gl.warp_specialize(
        [
            (attend_left, (
                q, q_stride_h, sink, out, lse, max_logits, heads, limit, scale_log2,
                latent, small, scales, vectors, bars, SPLIT,
                HAS_SINK, WANT_MAX,
            )),
            (attend_right, (
                q, q_stride_h, out, heads, limit,
                latent, small, scales, vectors, bars,
            )),
            (fill, (
                kv_ptr, line, limit, last_slot, page_size, page_words,
                latent, small, scales, vectors, bars, TOKEN_WORDS, PACKED, AHEAD,
            )),
        ],
        [4, 4],
        [RIGHT_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
