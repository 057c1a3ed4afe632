"""The Hopper kernel for bf16 caches and few heads: all heads of a query token per CTA.

With few heads the products are small and the gather sets the time, so the kernel keeps loads in
flight: two CTAs per SM, each with a loader (four warps) that fills one 64-token tile of K and a
consumer (four warps) that works on it, while the other CTA's tile is on its way.

The operands are swapped, so that tokens and output dims, not heads, fill the 64 rows that a
warpgroup instruction has at least:

    S^T = K Q^T [64 tokens, HEADS]        O^T += V^T P^T [512 dims, HEADS]

An instruction of 16 columns takes as long as one of 32, so up to 16 heads give P as the sum of two
bf16 in columns side by side, which keeps 16 bits of it: the output is as good as rounding the exact
one. With more heads P is one bf16, and the output is divided by the sum of the rounded weights.
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
from triton.language.core import _aggregate as aggregate

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
    round_weights,
    sink_factor,
)
from .sm90_load_kernel import Items, load_slots

# Columns of P^T and O^T.
WIDTH = gl.constexpr(32)
OUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))


@aggregate
class Shared:
    """Shared memory and barriers of a CTA; the barriers have one phase per tile or item."""

    q_left: gl.shared_memory_descriptor  # [1, HEADS, 256] bf16; later the output's staging
    q_right: gl.shared_memory_descriptor  # [1, HEADS, 256]
    q_rope: gl.shared_memory_descriptor  # [1, HEADS, 64]
    k_left: gl.shared_memory_descriptor  # [1, 64, 256]
    k_right: gl.shared_memory_descriptor  # [1, 64, 256]
    k_rope: gl.shared_memory_descriptor  # [1, 64, 64]
    p: gl.shared_memory_descriptor  # [1, 64, 32] bf16; in k_rope, dead by then
    bias: gl.shared_memory_descriptor  # [64] float32, 0 or -inf per token
    peaks: gl.shared_memory_descriptor  # [4, HEADS] float32, maxima over each warp's tokens
    left_full: gl.shared_memory_descriptor
    right_full: gl.shared_memory_descriptor  # k_right, k_rope and bias are there
    left_free: gl.shared_memory_descriptor
    right_free: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.q_left,
            self.q_right,
            self.q_rope,
            self.k_left,
            self.k_right,
            self.k_rope,
            self.p,
            self.bias,
            self.peaks,
            self.left_full,
            self.right_full,
            self.left_free,
            self.right_free,
            self.q_full,
            self.q_free,
        ) = fields


@gluon.jit
def load_tiles(
    items,
    shared,
    lengths,
    q_ptr,
    kv_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    page_stride,
    page_size,
    last_slot,
    HEADS: gl.constexpr,
    D_ROPE: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """The loader: Q of each item and its tiles of K."""
    rows = gl.arange(0, TILE, layout=COPY_ROWS)
    head = gl.arange(0, HEADS, layout=COPY_ROWS)
    item = gl.program_id(0)
    line = items.line(item)
    first, last = items.span(item, lengths)
    slots = load_slots(line, first + rows, last)
    done = 0
    item_phase = 0
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        tiles = gl.maximum((last - first + (TILE - 1)) // TILE, 1)
        # Slots are loaded a tile ahead, across the items' border.
        next_item = gl.minimum(item + gl.num_programs(0), items.count - 1)
        next_line = items.line(next_item)
        next_first, next_last = items.span(next_item, lengths)

        token = items.token(item)
        q_offset = (token // items.s_q).to(gl.int64) * q_stride_b
        q_offset += (token % items.s_q).to(gl.int64) * q_stride_s
        q_offsets = (q_offset + head.to(gl.int64) * q_stride_h) * 8
        mbarrier.wait(shared.q_free, item_phase ^ 1)
        copy_rows(shared.q_left.index(0), q_ptr, q_offsets, head < items.heads, 0, 256)
        copy_rows(shared.q_right.index(0), q_ptr, q_offsets, head < items.heads, 256, 256)
        if D_ROPE > 0:
            copy_rows(shared.q_rope.index(0), q_ptr, q_offsets, head < items.heads, 512, 64)
        async_copy.mbarrier_arrive(shared.q_full, increment_count=False)
        for j in range(tiles):
            phase = ((done + j) & 1) ^ 1
            if j + 1 < tiles:
                ahead = line + (first + (j + 1) * TILE)
                left_over = last - (first + (j + 1) * TILE)
            else:
                ahead = next_line + next_first
                left_over = next_last - next_first
            ok = (slots >= 0) & (slots <= last_slot)
            slots = gl.where(ok, slots, 0)
            if PACKED:
                offsets = slots.to(gl.int64) * TOKEN_STRIDE
            else:
                offsets = (slots // page_size).to(gl.int64) * page_stride
                offsets += (slots % page_size).to(gl.int64) * TOKEN_STRIDE
            offsets = offsets * 8
            slots = load_slots(ahead, rows, left_over)
            mbarrier.wait(shared.left_free, phase)
            copy_rows(shared.k_left.index(0), kv_ptr, offsets, ok, 0, 256)
            async_copy.mbarrier_arrive(shared.left_full, increment_count=False)
            mbarrier.wait(shared.right_free, phase)
            shared.bias.store(gl.where(ok, 0.0, -INF))
            copy_rows(shared.k_right.index(0), kv_ptr, offsets, ok, 256, 256)
            if D_ROPE > 0:
                copy_rows(shared.k_rope.index(0), kv_ptr, offsets, ok, 512, 64)
            async_copy.mbarrier_arrive(shared.right_full, increment_count=False)
            barrier()
            mbarrier.arrive(shared.right_full, count=1)
        line = next_line
        first = next_first
        last = next_last
        done += tiles
        item_phase ^= 1


@gluon.jit
def twice(x, layout: gl.constexpr):
    """x [HEADS] for the columns of P^T and O^T: repeated where P is the sum of two."""
    if x.shape[0] < WIDTH:
        x = gl.reshape(gl.permute(gl.join(x, x), (1, 0)), [WIDTH])
    return gl.convert_layout(x, layout)


@gluon.jit
def add_logits(chains, k, q):
    """Start K Q^T over the columns of k [64, width] and q [HEADS, width], 16 at a time.

    The accumulators take turns: a dependent instruction waits 47 cycles for the one before.
    """
    for step in gl.static_range(k.shape[1] // 16):
        s = warpgroup_mma(
            k.slice(16 * step, 16, dim=1),
            q.slice(16 * step, 16, dim=1).permute((1, 0)),
            chains[0],
            is_async=True,
        )
        chains = chains[1:] + (s,)  # noqa: RUF005
    return chains


@gluon.jit
def sum_chains(chains):
    """Wait for the accumulators of `add_logits`; their sum."""
    done = warpgroup_mma_wait(0, deps=chains)
    s = done[0] + done[1]
    if len(chains) == 4:
        s += done[2] + done[3]
    return s


@gluon.jit
def add_values(blocks, decay, values, p):
    """Start V^T P^T for a half, values [64, 256], on blocks of 64 dims times decay, in turn."""
    accs = (
        warpgroup_mma_init(blocks[0] * decay),
        warpgroup_mma_init(blocks[1] * decay),
        warpgroup_mma_init(blocks[2] * decay),
        warpgroup_mma_init(blocks[3] * decay),
    )
    for step in gl.static_range(4):
        for block in gl.static_range(4):
            tokens = values.slice(16 * step, 16, dim=0)
            acc = warpgroup_mma(
                tokens.slice(64 * block, 64, dim=1).permute((1, 0)),
                p.slice(16 * step, 16, dim=0),
                accs[0],
                is_async=True,
            )
            accs = accs[1:] + (acc,)  # noqa: RUF005
    return accs


@gluon.jit
def store_half(
    blocks,
    factor,
    staging,
    out_ptr,
    heads,
    HEADS: gl.constexpr,
    COLUMN: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The half's blocks of O^T, each of one or two parts, times factor [HEADS], to the output.

    As columns [COLUMN, COLUMN + 256) of the item's rows: bf16, or float32 where split.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    for block in gl.static_range(4):
        acc = blocks[block]
        if HEADS < WIDTH:
            acc = gl.sum(gl.reshape(acc, [64, 2, HEADS]), 1)
        acc = gl.convert_layout(acc, layout) * factor[None, :]
        if SPLIT:
            dims = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
            head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, layout))[None, :]
            columns = dims + (COLUMN + 64 * block)
            gl.store(out_ptr + (head * 512 + columns), acc, mask=head < heads)
        else:
            staging.slice(64 * block, 64, dim=1).permute((1, 0)).store(acc.to(gl.bfloat16))
    if not SPLIT:
        # Through shared memory, so that a warp stores 512 contiguous bytes.
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        barrier()
        head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, rows_layout))[:, None]
        dims = gl.arange(0, 256, layout=gl.SliceLayout(0, rows_layout))[None, :]
        gl.store(
            out_ptr + (head * 512 + (dims + COLUMN)),
            staging.load(rows_layout),
            mask=head < heads,
            cache_modifier=".cs",
        )


@gluon.jit
def attend_tiles(
    items,
    shared,
    lengths,
    sink_ptr,
    out_ptr,
    lse_ptr,
    max_ptr,
    scale_log2,
    HEADS: gl.constexpr,
    D_ROPE: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The consumer."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    by_head: gl.constexpr = gl.SliceLayout(0, layout)
    head = gl.arange(0, HEADS, layout=by_head)
    done = 0
    item_phase = 0
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        first, last = items.span(item, lengths)
        tiles = gl.maximum((last - first + (TILE - 1)) // TILE, 1)
        base = gl.full([HEADS], -INF, gl.float32, layout=by_head)
        # Each thread sums its own tokens until the end.
        exact = gl.zeros([TILE, HEADS], gl.float32, layout=layout)
        rounded = exact
        # Four blocks of 64 dims of either half.
        zeros = gl.zeros([64, WIDTH], gl.float32, layout=OUT)
        left = (zeros, zeros, zeros, zeros)
        right = (zeros, zeros, zeros, zeros)
        mbarrier.wait(shared.q_full, item_phase)
        for j in range(tiles):
            zero = opaque_zero(j)
            phase = (done + j) & 1
            no_logits = gl.zeros([TILE, HEADS], gl.float32, layout=layout)
            chains = (warpgroup_mma_init(no_logits), warpgroup_mma_init(no_logits))
            if HEADS < WIDTH:
                chains += (warpgroup_mma_init(no_logits), warpgroup_mma_init(no_logits))
            mbarrier.wait(shared.left_full, phase)
            chains = add_logits(chains, shared.k_left.index(zero), shared.q_left.index(zero))
            mbarrier.wait(shared.right_full, phase)
            chains = add_logits(chains, shared.k_right.index(zero), shared.q_right.index(zero))
            if D_ROPE > 0:
                chains = add_logits(chains, shared.k_rope.index(zero), shared.q_rope.index(zero))
            bias = shared.bias.load(gl.SliceLayout(1, layout))
            s = sum_chains(chains) * scale_log2 + bias[:, None]
            # Peaks of the four warps' tokens meet in shared memory.
            rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            peaks = reinterpret(shared.peaks, gl.float32, [4, HEADS], rows)
            peaks.store(gl.max(gl.reshape(s, [4, 16, HEADS]), 1))
            barrier()
            new_base = base
            for warp in gl.static_range(4):
                new_base = gl.maximum(new_base, shared.peaks.index(warp).load(by_head))
            shift = finite(new_base)
            decay = exp2(base - shift)
            base = new_base
            p = exp2(s - shift[None, :])
            exact = exact * decay[None, :] + p
            if HEADS < WIDTH:
                high = p.to(gl.bfloat16)
                low = (p - high.to(gl.float32)).to(gl.bfloat16)
                both = gl.reshape(gl.permute(gl.join(high, low), (0, 2, 1)), [TILE, WIDTH])
                shared.p.index(zero).store(both)
            else:
                weights, p_rounded = round_weights(p)
                rounded = rounded * decay[None, :] + p_rounded
                shared.p.index(zero).store(weights)
            fence_async_shared()
            barrier()
            decay = twice(decay, gl.SliceLayout(0, OUT))[None, :]
            left = add_values(left, decay, shared.k_left.index(zero), shared.p.index(zero))
            right = add_values(right, decay, shared.k_right.index(zero), shared.p.index(zero))
            # The deepest wait there is: the left half and some of the right one are done.
            left = warpgroup_mma_wait(7, deps=left)
            barrier()
            mbarrier.arrive(shared.left_free, count=1)
            right = warpgroup_mma_wait(0, deps=right)
            barrier()
            mbarrier.arrive(shared.right_free, count=1)

        total = gl.sum(exact, 0)
        lse = gl.where(total == 0.0, -INF, base + log2(total))
        if HEADS == WIDTH:
            total = gl.sum(rounded, 0)
        factor = gl.where(total == 0.0, 0.0, 1.0 / total)
        if not SPLIT:
            lse = lse * LN2
            if sink_ptr is not None:
                sink = gl.load(sink_ptr + head, mask=head < items.heads, other=0.0)
                factor = factor * sink_factor(lse, sink)
        row = items.row(item)
        out = out_ptr + row * 512
        heads = items.heads
        store_half(left, factor, shared.q_left.index(0), out, heads, HEADS, 0, SPLIT)
        store_half(right, factor, shared.q_right.index(0), out, heads, HEADS, 256, SPLIT)
        barrier()
        mbarrier.arrive(shared.q_free, count=1)
        gl.store(lse_ptr + row + head, lse, mask=head < heads)
        if max_ptr is not None:
            gl.store(max_ptr + row + head, base * LN2, mask=head < heads)
        done += tiles
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
def attend_few(
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
    heads,  # at most HEADS
    topk,
    splits,
    split_size,  # entries per split, a multiple of 64
    scale_log2,  # softmax scale * log2(e)
    HEADS: gl.constexpr,  # 16 or 32
    D_ROPE: gl.constexpr,  # 64, or 0 where the row has no separate RoPE part
    TOKEN_STRIDE: gl.constexpr,  # units of 8 elements
    PACKED: gl.constexpr,  # page_stride == page_size * TOKEN_STRIDE
    SPLIT: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_left = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, 256], swizzled)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, 256], swizzled)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 64], swizzled)
    if D_ROPE > 0:
        q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, 64], swizzled)
    else:
        q_rope = q_left
    shared = Shared(
        q_left,
        q_right,
        q_rope,
        gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 256], swizzled),
        gl.allocate_shared_memory(gl.bfloat16, [1, TILE, 256], swizzled),
        k_rope,
        reinterpret(k_rope, gl.bfloat16, [1, TILE, WIDTH], narrow),
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
        gl.allocate_shared_memory(gl.float32, [4, HEADS], plain),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
    )
    # cp.async arrives once per lane of the loader; the bias adds an arrival to the right half's.
    mbarrier.init(shared.left_full, count=128)
    mbarrier.init(shared.right_full, count=129)
    mbarrier.init(shared.left_free, count=1)
    mbarrier.init(shared.right_free, count=1)
    mbarrier.init(shared.q_full, count=128)
    mbarrier.init(shared.q_free, count=1)

    items = Items(
        indices_ptr,
        indices_stride_b.to(gl.int64),
        indices_stride_s.to(gl.int64),
        s_q,
        heads,
        gl.to_tensor(1),
        topk,
        splits,
        split_size,
        tokens * splits,
    )
    gl.warp_specialize(
        [
            (
                attend_tiles,
                (
                    items,
                    shared,
                    lengths_ptr,
                    sink_ptr,
                    out_ptr,
                    lse_ptr,
                    max_ptr,
                    scale_log2,
                    HEADS,
                    D_ROPE,
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
                    HEADS,
                    D_ROPE,
                    TOKEN_STRIDE,
                    PACKED,
                ),
            ),
        ],
        [4],
        [LOADER_REGISTERS],
    )
