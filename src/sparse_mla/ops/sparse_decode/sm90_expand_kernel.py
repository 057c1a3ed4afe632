"""The Hopper kernel for caches whose values are bf16 numbers once expanded: decode, 64 heads a CTA.

A persistent grid, one CTA per SM. Its consumers share work as those of the kernel for bf16 caches
do (sparse_prefill/sm90_kernel.py): two groups of four warps, each with the softmax of one tile of a
pair and half of the output. Two more groups expand K (sm90_expand_fill_kernel). A main and an extra
cache are attended one after the other; sm90_expand_plan_kernel says which work is whose.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..gluon_compat import barrier
from ..sm90_pairs_kernel import (
    INF,
    LN2,
    LOGIT_ROWS,
    STORE,
    STORE_COLUMNS,
    STORE_ROWS,
    TILE,
    Shared,
    both_sums,
    log2,
    sink_factor,
)
from .sm90_expand_few_heads_kernel import attend_half_few, copy_query
from .sm90_expand_fill_kernel import HALF_TILE, RAW, Pages, fill
from .sm90_expand_pairs_kernel import OUT_COLUMNS, OUT_ROWS, attend_pairs
from .sm90_expand_plan_kernel import (
    BALANCED,
    SORTED,
    Query,
    Shape,
    entries,
    pair_count,
    plan_balanced,
    plan_by_shape,
    plan_sorted,
)


@gluon.jit
def store_whole(
    shape, item, acc, factor, lse, base, sink, staging, out_ptr, lse_ptr, max_ptr,
    HALF: gl.constexpr,
):  # fmt: skip
    """acc * factor [64, 256] as bf16 columns of an item's rows; lse [64] natural."""
    heads = shape.heads - shape.first_head(item)
    head = gl.arange(0, TILE, layout=LOGIT_ROWS)
    lse = lse * LN2
    if sink is not None:
        factor = factor * sink_factor(lse, sink)
    # Through shared memory, so that a warp stores 512 contiguous bytes.
    staging.store((acc * gl.convert_layout(factor, OUT_ROWS)[:, None]).to(gl.bfloat16))
    barrier()
    rows = gl.arange(0, TILE, layout=STORE_ROWS)
    columns = gl.arange(0, 256, layout=STORE_COLUMNS)
    gl.store(
        out_ptr + shape.row(item) * 512 + (rows[:, None] * 512 + (columns[None, :] + 256 * HALF)),
        staging.load(STORE),
        mask=(rows < heads)[:, None],
        cache_modifier=".cs",
    )
    if HALF == 0:
        gl.store(lse_ptr + shape.row(item) + head, lse, mask=head < heads)
        if max_ptr is not None:
            gl.store(max_ptr + shape.row(item) + head, base * LN2, mask=head < heads)


@gluon.jit
def attend_half(
    shape,
    work,
    shared,
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
    ROUNDED_SUMS: gl.constexpr,
):
    """A consumer: softmax of one tile of each pair, half of the output's columns."""
    values = shared.k_left if HALF == 0 else shared.k_right
    values_free = shared.left_free if HALF == 0 else shared.right_free
    rows = gl.arange(0, TILE, layout=LOGIT_ROWS)
    done = 0
    item_phase = 0
    start = work.start
    target = shared.q_left if HALF == 0 else shared.q_right
    copy_query(shape, work, query, shared, target, work.begin, HALF, PLAN, 64)
    for item in range(work.begin, work.end, work.step):
        which = work.item(shape, item, PLAN)
        b = shape.sequence(which)
        in_lists = pair_count(
            entries(shape.topk, lengths, b), entries(shape.extra_topk, extra_lengths, b)
        )
        first, last, slot = work.cut(shape, item, start, in_lists, PLAN)
        pairs = last - first
        mbarrier.wait(shared.q_full, item_phase)
        acc, base, exact, rounded = attend_pairs(
            shared, pairs, done, scale_log2, HALF, ROUNDED_SUMS
        )
        # Both consumers' logits are done: `attend_pairs` waits for the other one's weights.
        copy_query(shape, work, query, shared, target, item + work.step, HALF, PLAN, 64)
        # Loaded here, so that it has come when the sums have.
        sink = None
        if sink_ptr is not None:
            head = shape.first_head(which) + gl.arange(0, TILE, layout=LOGIT_ROWS)
            sink = gl.load(sink_ptr + head, mask=head < shape.heads, other=0.0)
        exact, rounded = both_sums(shared, exact, rounded, item_phase, HALF, ROUNDED_SUMS)
        lse = gl.where(exact == 0.0, -INF, base + log2(exact))
        factor = gl.where(rounded == 0.0, 0.0, 1.0 / rounded)
        staging = values.index(1)
        if PLAN <= SORTED:  # noqa: SIM114
            store_whole(
                shape, which, acc, factor, lse, base, sink, staging, out_ptr, lse_ptr, max_ptr,
                HALF,
            )  # fmt: skip
        elif slot < 0:
            store_whole(
                shape, which, acc, factor, lse, base, sink, staging, out_ptr, lse_ptr, max_ptr,
                HALF,
            )  # fmt: skip
        else:
            acc = acc * gl.convert_layout(factor, OUT_ROWS)[:, None]
            out_rows = gl.arange(0, TILE, layout=OUT_ROWS)[:, None]
            columns = gl.arange(0, 256, layout=OUT_COLUMNS)[None, :] + 256 * HALF
            gl.store(parts_ptr + slot.to(gl.int64) * (64 * 512) + (out_rows * 512 + columns), acc)
            if HALF == 0:
                gl.store(parts_lse_ptr + slot * 64 + rows, lse)
        barrier()
        mbarrier.arrive(values_free.index(1), count=1)
        start += in_lists + 1
        done += pairs
        item_phase ^= 1


@gluon.jit
def consumer(
    shape, work, shared, peaks, lengths, extra_lengths, sink_ptr, out_ptr, lse_ptr, max_ptr,
    parts_ptr, parts_lse_ptr, scale_log2, query,
    HALF: gl.constexpr, PLAN: gl.constexpr, ROUNDED_SUMS: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    if HEADS == 64:
        attend_half(
            shape, work, shared, lengths, extra_lengths, sink_ptr, out_ptr, lse_ptr, max_ptr,
            parts_ptr, parts_lse_ptr, scale_log2, query,
            HALF, PLAN, ROUNDED_SUMS,
        )  # fmt: skip
    else:
        attend_half_few(
            shape, work, shared, peaks, lengths, extra_lengths, sink_ptr, out_ptr, lse_ptr, max_ptr,
            parts_ptr, parts_lse_ptr, scale_log2, query,
            HALF, PLAN, HEADS,
        )  # fmt: skip


# One compilation serves all sizes, strides and alignments: the copies' alignment is in the units.
@gluon.jit(
    do_not_specialize=[
        "q_stride_b",
        "q_stride_s",
        "q_stride_h",
        "page_words",
        "page_size",
        "page_magic",
        "page_shift",
        "last_slot",
        "indices_stride_b",
        "indices_stride_s",
        "extra_page_words",
        "extra_page_size",
        "extra_page_magic",
        "extra_page_shift",
        "extra_last_slot",
        "extra_stride_b",
        "extra_stride_s",
        "s_q",
        "heads",
        "head_blocks",
        "topk",
        "extra_topk",
        "items",
        "whole",
        "splits",
        "split_pairs",
    ],
    do_not_specialize_on_alignment=[
        "indices_ptr",
        "extra_indices_ptr",
        "lengths_ptr",
        "extra_lengths_ptr",
        "sink_ptr",
        "lse_ptr",
        "max_ptr",
    ],
)
def attend(
    q_ptr,  # [b, s_q, heads, 512] bf16
    kv_ptr,  # the cache as int32
    indices_ptr,  # [b, s_q, topk] int32
    lengths_ptr,  # [b] int32, or None
    extra_ptr,  # the extra cache as int32; the main one where there is none
    extra_indices_ptr,  # [b, s_q, extra_topk] int32
    extra_lengths_ptr,  # [b] int32, or None
    sink_ptr,  # [heads] float32, or None
    out_ptr,  # [b * s_q, heads, 512] bf16
    lse_ptr,  # [b * s_q, heads] float32, natural
    max_ptr,  # [b * s_q, heads] float32, natural, or None; only where no item is cut
    parts_ptr,  # [slots, 64, 512] float32: items that are cut
    parts_lse_ptr,  # [slots, 64] float32, log2
    meta_ptr,  # int32, what plan_balanced or plan_sorted write; None by shape
    q_stride_b,  # strides of q in units of 8 elements
    q_stride_s,
    q_stride_h,
    page_words,  # words of 4 bytes from page to page
    page_size,
    page_magic,
    page_shift,
    last_slot,  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    indices_stride_b,
    indices_stride_s,
    extra_page_words,
    extra_page_size,
    extra_page_magic,
    extra_page_shift,
    extra_last_slot,
    extra_stride_b,
    extra_stride_s,
    s_q,
    heads,
    head_blocks,
    topk,
    extra_topk,
    items,  # b * s_q * head_blocks
    whole,  # by shape: items that are not cut; the others are, into
    splits,  # so many parts of
    split_pairs,  # so many pairs of tiles
    scale_log2,  # softmax scale * log2(e)
    HEADS: gl.constexpr,  # of an item: 16 or 64
    PLAN: gl.constexpr,  # see sm90_expand_plan_kernel
    SEQUENCES: gl.constexpr,  # sorted: at least b
    EXTRA: gl.constexpr,
    ROUNDED_SUMS: gl.constexpr,
    PREFETCH: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    shape = Shape(s_q, heads, head_blocks, topk, extra_topk, items, whole, splits, split_pairs)
    if PLAN == SORTED:
        work = plan_sorted(shape, lengths_ptr, extra_lengths_ptr, meta_ptr, SEQUENCES)
    elif PLAN == BALANCED:
        work = plan_balanced(shape, lengths_ptr, extra_lengths_ptr, meta_ptr)
    else:
        work = plan_by_shape(shape)
    # Up to 16 heads P is [64 tokens, 32], else [64 heads, 64 tokens].
    WIDTH: gl.constexpr = 64 if HEADS == 64 else 32
    weights: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    p0 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, WIDTH], weights)
    p1 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, WIDTH], weights)
    sums = gl.allocate_shared_memory(gl.float32, [4, HEADS], plain)
    peaks = sums
    if HEADS < 64:
        peaks = gl.allocate_shared_memory(gl.float32, [2, 4 * HEADS], plain)
    # Each consumer copies its own queries: there is no `q_free`. A barrier that no partition uses
    # must not be made: its memory is free at once and becomes that of what partitions are passed.
    q_full = gl.allocate_shared_memory(gl.int64, [1], barriers)
    shared = Shared(
        gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, 256], swizzled),
        gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, 256], swizzled),
        p1,
        gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 256], swizzled),
        gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 256], swizzled),
        p0,
        p0,
        p1,
        gl.allocate_shared_memory(gl.float32, [2, TILE], plain),
        gl.allocate_shared_memory(gl.float32, [2, HEADS], plain),
        sums,
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        q_full,
        q_full,
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
        gl.allocate_shared_memory(gl.int64, [2, 1], barriers),
    )
    # The expanding groups' raw units.
    raw0 = gl.allocate_shared_memory(gl.int32, [2, HALF_TILE, 32], RAW)
    raw1 = gl.allocate_shared_memory(gl.int32, [2, HALF_TILE, 32], RAW)
    # cp.async arrives once per lane: both consumers copy their half of Q.
    for stage in gl.static_range(2):
        mbarrier.init(shared.left_full.index(stage), count=2)
        mbarrier.init(shared.right_full.index(stage), count=2)
        mbarrier.init(shared.left_free.index(stage), count=1)
        mbarrier.init(shared.right_free.index(stage), count=1)
        mbarrier.init(shared.p_full.index(stage), count=1)
        mbarrier.init(shared.sums_full.index(stage), count=1)
    mbarrier.init(shared.q_full, count=256)

    main = Pages(
        kv_ptr,
        page_words.to(gl.int64),
        page_size,
        page_magic,
        page_shift,
        last_slot,
        indices_ptr,
        indices_stride_b.to(gl.int64),
        indices_stride_s.to(gl.int64),
    )
    extra = Pages(
        extra_ptr,
        extra_page_words.to(gl.int64),
        extra_page_size,
        extra_page_magic,
        extra_page_shift,
        extra_last_slot,
        extra_indices_ptr,
        extra_stride_b.to(gl.int64),
        extra_stride_s.to(gl.int64),
    )
    query = Query(q_ptr, q_stride_b.to(gl.int64), q_stride_s.to(gl.int64), q_stride_h.to(gl.int64))
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    shape,
                    work,
                    shared,
                    peaks,
                    lengths_ptr,
                    extra_lengths_ptr,
                    sink_ptr,
                    out_ptr,
                    lse_ptr,
                    max_ptr,
                    parts_ptr,
                    parts_lse_ptr,
                    scale_log2,
                    query,
                    0,
                    PLAN,
                    ROUNDED_SUMS,
                    HEADS,
                ),
            ),
            (
                consumer,
                (
                    shape,
                    work,
                    shared,
                    peaks,
                    lengths_ptr,
                    extra_lengths_ptr,
                    sink_ptr,
                    out_ptr,
                    lse_ptr,
                    max_ptr,
                    parts_ptr,
                    parts_lse_ptr,
                    scale_log2,
                    query,
                    1,
                    PLAN,
                    ROUNDED_SUMS,
                    HEADS,
                ),
            ),
            (
                fill,
                (
                    shape,
                    work,
                    shared,
                    raw0,
                    main,
                    extra,
                    lengths_ptr,
                    extra_lengths_ptr,
                    EXTRA,
                    PLAN,
                    PREFETCH,
                    0,
                ),
            ),
            (
                fill,
                (
                    shape,
                    work,
                    shared,
                    raw1,
                    main,
                    extra,
                    lengths_ptr,
                    extra_lengths_ptr,
                    EXTRA,
                    PLAN,
                    PREFETCH,
                    1,
                ),
            ),
        ],
        [4, 4, 4],
        [RIGHT_REGISTERS, FILL_REGISTERS, FILL_REGISTERS],
    )
