"""The Hopper kernel for bf16 caches: sparse attention, 64 heads of a query token per CTA.

A persistent grid, one CTA per SM, walks over items (query token, split of its list, 64 heads).
Three groups of four warps share the work on 64-token tiles of K, two tiles (a pair) at a time:

    left    S0 = Q K0^T of the even tile, softmax, O[:, :256] += P0 V0 + P1 V1
    right   S1 = Q K1^T of the odd tile, softmax, O[:, 256:] += P0 V0 + P1 V1
    loader  copies the selected rows into shared memory, 16 bytes a lane (cp.async); the columns
            that `left` and `right` read as values are released and refilled separately

Each consumer's own P comes from its registers, the other's from shared memory. Both apply P0, then
P1, and the softmax's reference, the running maximum, goes from hand to hand with them.

Rounding: P is rounded to bf16. With ROUNDED_SUMS the output is divided by the sum of the rounded
weights, so that weights that all round the same way leave no gain (6 % slower). lse and sinks use
the exact sum.

Rows of invalid entries are never read: the copies fill them with zeros, and a bias of -inf takes
them out of the softmax.
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

from ..gluon_compat import barrier
from ..sm90_pairs_kernel import (
    INF,
    LN2,
    LOGIT_ROWS,
    LOGITS,
    OUT,
    OUT_COLUMNS,
    OUT_ROWS,
    STORE,
    STORE_COLUMNS,
    STORE_ROWS,
    TILE,
    WEIGHTS,
    Shared,
    both_sums,
    exp2,
    finite,
    log2,
    opaque_zero,
    round_weights,
    sink_factor,
)
from .sm90_load_kernel import Items, load_tiles


@gluon.jit
def tile_logits(shared, TILE_OF_PAIR: gl.constexpr, zero, phase, scale_log2, D_ROPE: gl.constexpr):
    """Logits of a tile in the log2 domain, [64, 64], -inf for masked tokens."""
    s = warpgroup_mma_init(gl.zeros([TILE, TILE], gl.float32, layout=LOGITS))
    mbarrier.wait(shared.left_full.index(TILE_OF_PAIR), phase)
    s = warpgroup_mma(
        shared.q_left.index(zero),
        shared.k_left.index(TILE_OF_PAIR + zero).permute((1, 0)),
        s,
        use_acc=False,
        is_async=True,
    )
    mbarrier.wait(shared.right_full.index(TILE_OF_PAIR), phase)
    s = warpgroup_mma(
        shared.q_right.index(zero),
        shared.k_right.index(TILE_OF_PAIR + zero).permute((1, 0)),
        s,
        is_async=True,
    )
    if D_ROPE > 0:
        s = warpgroup_mma(
            shared.q_rope.index(zero),
            shared.k_rope.index(TILE_OF_PAIR + zero).permute((1, 0)),
            s,
            is_async=True,
        )
    # Loaded while the products run: later it would queue behind the other consumer's operands.
    bias = shared.bias.index(TILE_OF_PAIR).load(gl.SliceLayout(0, LOGITS))
    s = warpgroup_mma_wait(0, deps=[s])
    return s * scale_log2 + bias[None, :]


@gluon.jit
def store_out(
    acc, factor, staging, out_ptr, items, item, COLUMN: gl.constexpr, SPLIT: gl.constexpr
):
    """acc * factor as 256 columns of the item's rows: bf16, or float32 where split."""
    out_ptr += items.row(item) * 512
    acc = acc * gl.convert_layout(factor, OUT_ROWS)[:, None]
    if SPLIT:
        rows = gl.arange(0, TILE, layout=OUT_ROWS)
        columns = gl.arange(0, 256, layout=OUT_COLUMNS)
        mask = (rows + items.first_head(item) < items.heads)[:, None]
        gl.store(out_ptr + (rows[:, None] * 512 + (columns[None, :] + COLUMN)), acc, mask=mask)
    else:
        # Through shared memory, so that a warp stores 512 contiguous bytes.
        staging.store(acc.to(gl.bfloat16))
        barrier()
        rows = gl.arange(0, TILE, layout=STORE_ROWS)
        columns = gl.arange(0, 256, layout=STORE_COLUMNS)
        mask = (rows + items.first_head(item) < items.heads)[:, None]
        gl.store(
            out_ptr + (rows[:, None] * 512 + (columns[None, :] + COLUMN)),
            staging.load(STORE),
            mask=mask,
            cache_modifier=".cs",
        )


@gluon.jit
def out_factor(exact, rounded, base, sink_ptr, items, item, SPLIT: gl.constexpr):
    """What the accumulator is multiplied by, and lse: natural, or log2 where split."""
    lse = gl.where(exact == 0.0, -INF, base + log2(exact))
    factor = gl.where(rounded == 0.0, 0.0, 1.0 / rounded)
    if not SPLIT:
        lse = lse * LN2
        if sink_ptr is not None:
            head = items.first_head(item) + gl.arange(0, TILE, layout=LOGIT_ROWS)
            sink = gl.load(sink_ptr + head, mask=head < items.heads, other=0.0)
            factor = factor * sink_factor(lse, sink)
    return factor, lse


@gluon.jit
def attend_pairs(
    shared,
    pairs,
    done,
    scale_log2,
    HALF: gl.constexpr,  # 0: left, 1: right
    D_ROPE: gl.constexpr,
    ROUNDED_SUMS: gl.constexpr,
):
    """A consumer's part of `pairs` pairs of tiles, after `done` pairs of earlier items.

    Returns acc [64, 256], not normalised, the running maximum and the sums over the own tiles of P
    and of P as it was rounded. The last odd tile's values stay the consumer's.
    """
    values = shared.k_left if HALF == 0 else shared.k_right
    values_free = shared.left_free if HALF == 0 else shared.right_free
    own_p = shared.p0 if HALF == 0 else shared.p1
    base = gl.full([TILE], -INF, gl.float32, layout=LOGIT_ROWS)
    exact = gl.zeros([TILE], gl.float32, layout=LOGIT_ROWS)
    rounded = exact
    acc = gl.zeros([TILE, 256], gl.float32, layout=OUT)
    for j in range(pairs):
        zero = opaque_zero(j)
        phase = (done + j) & 1
        s = tile_logits(shared, HALF, zero, phase, scale_log2, D_ROPE)
        peak = gl.max(s, 1)
        if HALF == 0:
            even_base = gl.maximum(base, peak)
            new_base = even_base
        else:
            mbarrier.wait(shared.p_full.index(0), phase)
            even_base = shared.base.index(0).load(LOGIT_ROWS)
            new_base = gl.maximum(even_base, peak)
        shift = finite(new_base)
        p = exp2(s - shift[:, None])
        weights, p_rounded = round_weights(p)
        shared.base.index(HALF).store(new_base)
        own_p.index(zero).store(weights)
        fence_async_shared()
        barrier()
        mbarrier.arrive(shared.p_full.index(HALF), count=1)
        if HALF == 1:
            mbarrier.arrive(shared.q_free, count=1, pred=j == pairs - 1)

        decay = exp2(base - finite(even_base))
        acc = warpgroup_mma_init(acc * gl.convert_layout(decay, OUT_ROWS)[:, None])
        if HALF == 0:
            own = gl.convert_layout(weights, WEIGHTS)
            acc = warpgroup_mma(own, values.index(zero), acc, is_async=True)
            exact = exact * decay + gl.sum(p, 1)
            if ROUNDED_SUMS:
                rounded = rounded * decay + gl.sum(p_rounded, 1)
        else:
            acc = warpgroup_mma(shared.p0.index(zero), values.index(zero), acc, is_async=True)
            odd_decay = exp2(even_base - shift)
            exact = exact * (decay * odd_decay) + gl.sum(p, 1)
            if ROUNDED_SUMS:
                rounded = rounded * (decay * odd_decay) + gl.sum(p_rounded, 1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(values_free.index(0), count=1)

        if HALF == 0:
            mbarrier.wait(shared.p_full.index(1), phase)
            base = shared.base.index(1).load(LOGIT_ROWS)
            decay = exp2(even_base - finite(base))
            exact = exact * decay
            if ROUNDED_SUMS:
                rounded = rounded * decay
            acc = warpgroup_mma_init(acc * gl.convert_layout(decay, OUT_ROWS)[:, None])
            acc = warpgroup_mma(shared.p1.index(zero), values.index(1 + zero), acc, is_async=True)
        else:
            base = new_base
            acc = warpgroup_mma_init(acc * gl.convert_layout(odd_decay, OUT_ROWS)[:, None])
            own = gl.convert_layout(weights, WEIGHTS)
            acc = warpgroup_mma(own, values.index(1 + zero), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        # The last pair's tile becomes the staging buffer of the output first.
        mbarrier.arrive(values_free.index(1), count=1, pred=j < pairs - 1)
    return acc, base, exact, rounded


@gluon.jit
def attend_half(
    items,
    shared,
    lengths,
    sink_ptr,
    out_ptr,
    lse_ptr,
    max_ptr,
    scale_log2,
    HALF: gl.constexpr,  # 0: left, 1: right
    D_ROPE: gl.constexpr,
    ROUNDED_SUMS: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """A consumer: softmax of one tile of each pair, half of the output's columns."""
    values = shared.k_left if HALF == 0 else shared.k_right
    values_free = shared.left_free if HALF == 0 else shared.right_free
    done = 0
    item_phase = 0
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        pairs = items.pairs(item, lengths)
        mbarrier.wait(shared.q_full, item_phase)
        acc, base, exact, rounded = attend_pairs(
            shared, pairs, done, scale_log2, HALF, D_ROPE, ROUNDED_SUMS
        )
        exact, rounded = both_sums(shared, exact, rounded, item_phase, HALF, ROUNDED_SUMS)
        factor, lse = out_factor(exact, rounded, base, sink_ptr, items, item, SPLIT)
        store_out(acc, factor, values.index(1), out_ptr, items, item, 256 * HALF, SPLIT)
        barrier()
        mbarrier.arrive(values_free.index(1), count=1)
        if HALF == 0:
            rows = gl.arange(0, TILE, layout=LOGIT_ROWS)
            mask = rows + items.first_head(item) < items.heads
            gl.store(lse_ptr + items.row(item) + rows, lse, mask=mask)
            if max_ptr is not None:
                gl.store(max_ptr + items.row(item) + rows, base * LN2, mask=mask)
        done += pairs
        item_phase ^= 1


# One compilation serves all sizes, strides and alignments: the copies' alignment is in the units.
@gluon.jit(
    do_not_specialize=[
        "q_stride_b",
        "q_stride_s",
        "q_stride_h",
        "indices_stride_b",
        "indices_stride_s",
        "page_stride",
        "page_size",
        "last_slot",
        "tokens",
        "s_q",
        "heads",
        "topk",
        "splits",
        "split_size",
    ],
    do_not_specialize_on_alignment=[
        "indices_ptr",
        "lengths_ptr",
        "sink_ptr",
        "lse_ptr",
        "max_ptr",
    ],
)
def attend(
    q_ptr,  # [b, s_q, heads, 512 + D_ROPE] bf16
    kv_ptr,  # the cache as bf16
    indices_ptr,  # [b, s_q, topk] int32
    lengths_ptr,  # [b] int32, or None
    sink_ptr,  # [heads] float32, or None; only when unsplit
    out_ptr,  # [splits, b * s_q, heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b * s_q, heads] float32: natural when unsplit, else log2
    max_ptr,  # [b * s_q, heads] float32 natural, or None; only when unsplit
    q_stride_b,  # strides of q in units of 8 elements
    q_stride_s,
    q_stride_h,
    indices_stride_b,
    indices_stride_s,
    page_stride,  # units of 8 elements
    page_size,
    last_slot,  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    tokens,  # b * s_q
    s_q,
    heads,
    topk,
    splits,
    split_size,  # entries per split, a multiple of 128
    scale_log2,  # softmax scale * log2(e)
    D_ROPE: gl.constexpr,  # 64, or 0 where the row has no separate RoPE part
    TOKEN_STRIDE: gl.constexpr,  # units of 8 elements
    PACKED: gl.constexpr,  # page_stride == page_size * TOKEN_STRIDE
    ROUNDED_SUMS: gl.constexpr,
    SPLIT: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 64], swizzled)
    p1 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 64], swizzled)
    if D_ROPE > 0:
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 64], swizzled)
    else:
        q_rope = p1
    shared = Shared(
        gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 256], swizzled),
        gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 256], swizzled),
        q_rope,
        gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 256], swizzled),
        gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 256], swizzled),
        k_rope,
        k_rope,
        p1,
        gl.allocate_shared_memory(gl.float32, [2, TILE], plain),
        gl.allocate_shared_memory(gl.float32, [2, TILE], plain),
        gl.allocate_shared_memory(gl.float32, [4, TILE], plain),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
    )
    # cp.async arrives once per lane of the loader; the bias adds an arrival to the right half's.
    for stage in gl.static_range(2):
        mbarrier.init(shared.left_full.index(stage), count=128)
        mbarrier.init(shared.right_full.index(stage), count=129)
        mbarrier.init(shared.left_free.index(stage), count=1)
        mbarrier.init(shared.right_free.index(stage), count=1)
        mbarrier.init(shared.p_full.index(stage), count=1)
        mbarrier.init(shared.sums_full.index(stage), count=1)
    mbarrier.init(shared.q_full, count=128)
    mbarrier.init(shared.q_free, count=1)

    head_blocks = (heads + (TILE - 1)) // TILE
    items = Items(
        indices_ptr,
        indices_stride_b.to(gl.int64),
        indices_stride_s.to(gl.int64),
        s_q,
        heads,
        head_blocks,
        topk,
        splits,
        split_size,
        tokens * splits * head_blocks,
    )
    gl.warp_specialize(
        [
            (
                attend_half,
                (
                    items,
                    shared,
                    lengths_ptr,
                    sink_ptr,
                    out_ptr,
                    lse_ptr,
                    max_ptr,
                    scale_log2,
                    0,
                    D_ROPE,
                    ROUNDED_SUMS,
                    SPLIT,
                ),
            ),
            (
                attend_half,
                (
                    items,
                    shared,
                    lengths_ptr,
                    sink_ptr,
                    out_ptr,
                    lse_ptr,
                    max_ptr,
                    scale_log2,
                    1,
                    D_ROPE,
                    ROUNDED_SUMS,
                    SPLIT,
                ),
            ),
            (
                load_tiles,
                (
                    items,
                    shared,
                    lengths_ptr,
                    q_ptr,
                    kv_ptr,
                    q_stride_b.to(gl.int64),
                    q_stride_s.to(gl.int64),
                    q_stride_h.to(gl.int64),
                    page_stride.to(gl.int64),
                    page_size,
                    last_slot,
                    D_ROPE,
                    TOKEN_STRIDE,
                    PACKED,
                ),
            ),
        ],
        [4, 4],
        [RIGHT_REGISTERS, LOADER_REGISTERS],
    )
