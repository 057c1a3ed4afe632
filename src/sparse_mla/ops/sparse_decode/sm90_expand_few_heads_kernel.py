"""The consumers of the Hopper kernel for expanded caches, up to 16 heads.

As in sparse_prefill/sm90_few_heads_kernel.py the operands are swapped, so that tokens and output
dims, not heads, fill the 64 rows that a warpgroup instruction has at least, and P is the sum of two
bf16. As with 64 heads each of two consumers has the logits and the softmax of
one tile of a pair, and half of the output's dims for both tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_compat import barrier, reinterpret
from ..sm90_pairs_kernel import (
    COPY_ROWS,
    INF,
    LN2,
    TILE,
    copy_rows,
    exp2,
    finite,
    log2,
    opaque_zero,
    sink_factor,
)
from ..sparse_prefill.sm90_few_heads_kernel import (
    OUT,
    WIDTH,
    add_logits,
    add_values,
    store_half,
    sum_chains,
    twice,
)
from .sm90_expand_plan_kernel import SORTED, entries, pair_count


@gluon.jit
def tile_logits(shared, TILE_OF_PAIR: gl.constexpr, zero, phase, scale_log2, HEADS: gl.constexpr):
    """Logits of a tile in the log2 domain, [64 tokens, HEADS], -inf for masked tokens."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    none = gl.zeros([TILE, HEADS], gl.float32, layout=layout)
    chains = (warpgroup_mma_init(none), warpgroup_mma_init(none))
    chains += (warpgroup_mma_init(none), warpgroup_mma_init(none))
    mbarrier.wait(shared.left_full.index(TILE_OF_PAIR), phase)
    k = shared.k_left.index(TILE_OF_PAIR + zero)
    chains = add_logits(chains, k, shared.q_left.index(zero))
    mbarrier.wait(shared.right_full.index(TILE_OF_PAIR), phase)
    k = shared.k_right.index(TILE_OF_PAIR + zero)
    chains = add_logits(chains, k, shared.q_right.index(zero))
    bias = shared.bias.index(TILE_OF_PAIR).load(gl.SliceLayout(1, layout))
    return sum_chains(chains) * scale_log2 + bias[:, None]


@gluon.jit
def peak_of(s, peaks, HEADS: gl.constexpr):
    """The maximum over tokens [HEADS] of s [64, HEADS]; the warps' maxima meet in `peaks`."""
    by_head: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    reinterpret(peaks, gl.float32, [4, HEADS], rows).store(gl.max(gl.reshape(s, [4, 16, HEADS]), 1))
    barrier()
    warps = reinterpret(peaks, gl.float32, [4, HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    peak = warps.index(0).load(by_head)
    for warp in gl.static_range(1, 4):
        peak = gl.maximum(peak, warps.index(warp).load(by_head))
    return peak


@gluon.jit
def copy_query(
    shape, work, query, shared, target, item,
    HALF: gl.constexpr, PLAN: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Copy half of the columns of an item's Q, if there is one; zeros past the last head."""
    if item < work.end:
        which = work.item(shape, item, PLAN)
        token = shape.token(which)
        head = shape.first_head(which) + gl.arange(0, HEADS, layout=COPY_ROWS)
        offset = (token // shape.s_q).to(gl.int64) * query.stride_b
        offset += (token % shape.s_q).to(gl.int64) * query.stride_s
        offsets = (offset + head.to(gl.int64) * query.stride_h) * 8
        copy_rows(target.index(0), query.pointer, offsets, head < shape.heads, 256 * HALF, 256)
        async_copy.mbarrier_arrive(shared.q_full, increment_count=False)


@gluon.jit
def publish(shared, p, base, HALF: gl.constexpr, zero):
    """Hand a tile's weights [64, HEADS], as two bf16 each, and the maxima to both consumers."""
    own_p = shared.p0 if HALF == 0 else shared.p1
    high = p.to(gl.bfloat16)
    low = (p - high.to(gl.float32)).to(gl.bfloat16)
    shared.base.index(HALF).store(base)
    own_p.index(zero).store(gl.reshape(gl.permute(gl.join(high, low), (0, 2, 1)), [TILE, WIDTH]))
    fence_async_shared()
    barrier()
    mbarrier.arrive(shared.p_full.index(HALF), count=1)


@gluon.jit
def store_few(
    shape, item, blocks, factor, lse, base, staging, sink_ptr, out_ptr, lse_ptr, max_ptr,
    HALF: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """blocks * factor as bf16 columns of an item's rows; lse [HEADS] natural."""
    heads = shape.heads
    head = gl.arange(0, HEADS, layout=lse.type.layout)
    lse = lse * LN2
    if sink_ptr is not None:
        sink = gl.load(sink_ptr + head, mask=head < heads, other=0.0)
        factor = factor * sink_factor(lse, sink)
    out = out_ptr + shape.row(item) * 512
    store_half(blocks, factor, staging, out, heads, HEADS, 256 * HALF, False)
    if HALF == 0:
        gl.store(lse_ptr + shape.row(item) + head, lse, mask=head < heads)
        if max_ptr is not None:
            gl.store(max_ptr + shape.row(item) + head, base * LN2, mask=head < heads)


@gluon.jit
def attend_half_few(
    shape,
    work,
    shared,
    peaks,
    lengths,
    extra_lengths,
    sink_ptr,
    out_ptr,
    lse_ptr,
    max_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale_log2,
    query,
    HALF: gl.constexpr,  # 0: left, 1: right
    PLAN: gl.constexpr,
    HEADS: gl.constexpr,  # 16
):
    """A consumer: softmax of one tile of each pair, half of the output's dims."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    by_head: gl.constexpr = gl.SliceLayout(0, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, OUT)
    values = shared.k_left if HALF == 0 else shared.k_right
    values_free = shared.left_free if HALF == 0 else shared.right_free
    done = 0
    item_phase = 0
    start = work.start
    target = shared.q_left if HALF == 0 else shared.q_right
    copy_query(shape, work, query, shared, target, work.begin, HALF, PLAN, HEADS)
    for item in range(work.begin, work.end, work.step):
        which = work.item(shape, item, PLAN)
        b = shape.sequence(which)
        in_lists = pair_count(
            entries(shape.topk, lengths, b), entries(shape.extra_topk, extra_lengths, b)
        )
        first, last, slot = work.cut(shape, item, start, in_lists, PLAN)
        pairs = last - first
        base = gl.full([HEADS], -INF, gl.float32, layout=by_head)
        # Each thread sums its own tokens until the end.
        exact = gl.zeros([TILE, HEADS], gl.float32, layout=layout)
        # Four blocks of 64 dims.
        none = gl.zeros([64, WIDTH], gl.float32, layout=OUT)
        blocks = (none, none, none, none)
        mbarrier.wait(shared.q_full, item_phase)
        for j in range(pairs):
            zero = opaque_zero(j)
            phase = (done + j) & 1
            if HALF == 0:
                s = tile_logits(shared, 0, zero, phase, scale_log2, HEADS)
                even_base = gl.maximum(base, peak_of(s, peaks.index(0), HEADS))
                p = exp2(s - finite(even_base)[None, :])
                publish(shared, p, even_base, 0, zero)
                decay = exp2(base - finite(even_base))
                exact = exact * decay[None, :] + p
            else:
                # The even tile first, so that it is free early; as with 64 heads.
                mbarrier.wait(shared.p_full.index(0), phase)
                even_base = shared.base.index(0).load(by_head)
                decay = exp2(base - finite(even_base))
            blocks = add_values(
                blocks, twice(decay, by_column)[None, :], values.index(zero), shared.p0.index(zero)
            )
            blocks = warpgroup_mma_wait(0, deps=blocks)
            barrier()
            mbarrier.arrive(values_free.index(0), count=1)

            if HALF == 0:
                mbarrier.wait(shared.p_full.index(1), phase)
                base = shared.base.index(1).load(by_head)
                decay = exp2(even_base - finite(base))
                exact = exact * decay[None, :]
            else:
                s = tile_logits(shared, 1, zero, phase, scale_log2, HEADS)
                base = gl.maximum(even_base, peak_of(s, peaks.index(1), HEADS))
                p = exp2(s - finite(base)[None, :])
                publish(shared, p, base, 1, zero)
                odd_decay = exp2(even_base - finite(base))
                exact = exact * (decay * odd_decay)[None, :] + p
                decay = odd_decay
            blocks = add_values(
                blocks,
                twice(decay, by_column)[None, :],
                values.index(1 + zero),
                shared.p1.index(zero),
            )
            blocks = warpgroup_mma_wait(0, deps=blocks)
            barrier()
            # The last pair's tile becomes the staging buffer of the output first.
            mbarrier.arrive(values_free.index(1), count=1, pred=j < pairs - 1)

        shared.sums.index(HALF).store(gl.sum(exact, 0))
        barrier()
        mbarrier.arrive(shared.sums_full.index(HALF), count=1)
        # Both consumers' logits are done: each has waited for the other one's weights.
        copy_query(shape, work, query, shared, target, item + work.step, HALF, PLAN, HEADS)
        mbarrier.wait(shared.sums_full.index(1 - HALF), item_phase)
        total = shared.sums.index(0).load(by_head) + shared.sums.index(1).load(by_head)
        lse = gl.where(total == 0.0, -INF, base + log2(total))
        factor = gl.where(total == 0.0, 0.0, 1.0 / total)
        staging = values.index(1).slice(0, HEADS, dim=0)
        if PLAN <= SORTED:  # noqa: SIM114
            store_few(
                shape, which, blocks, factor, lse, base, staging, sink_ptr, out_ptr, lse_ptr,
                max_ptr, HALF, HEADS,
            )  # fmt: skip
        elif slot < 0:
            store_few(
                shape, which, blocks, factor, lse, base, staging, sink_ptr, out_ptr, lse_ptr,
                max_ptr, HALF, HEADS,
            )  # fmt: skip
        else:
            part = parts_ptr + slot.to(gl.int64) * (64 * 512)
            store_half(blocks, factor, staging, part, shape.heads, HEADS, 256 * HALF, True)
            if HALF == 0:
                head = gl.arange(0, HEADS, layout=by_head)
                gl.store(parts_lse_ptr + slot * 64 + head, lse, mask=head < shape.heads)
        barrier()
        mbarrier.arrive(values_free.index(1), count=1)
        start += in_lists + 1
        done += pairs
        item_phase ^= 1
