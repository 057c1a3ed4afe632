"""The Hopper kernel of dense decode over bf16 caches: 64 rows of a sequence per CTA.

A row is one head of one query token; a sequence has s_q * heads of them, in blocks of 64. The grid
is blocks x parts: all parts together walk over all sequences, each over an equal share of their
tokens (sm90_work_kernel.py), and the CTAs of one part, one for each block, read the same rows of
the cache at the same time, so that they meet in L2.

Three groups of four warps share the work on 64-token tiles of K, two tiles (a pair) at a time, as
in sparse_prefill/sm90_kernel.py:

    left    S0 = Q K0^T of the even tile, softmax, O[:, :256] += P0 V0 + P1 V1
    right   S1 = Q K1^T of the odd tile, softmax, O[:, 256:] += P0 V0 + P1 V1
    loader  a whole tile of a page by TMA, issued by one thread; a tile that the sequence ends in,
            or one of several pages, by cp.async, 16 bytes a lane, with zeros for absent tokens

Each consumer's own P comes from its registers, the other's from shared memory. Both apply P0, then
P1, and the softmax's reference, the running maximum, goes from hand to hand with them. The products
with P0 run on the right while it does the softmax of its own tile.
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
from triton.language.core import _aggregate as aggregate

from ..gluon_compat import barrier
from ..sparse_prefill.sm90_kernel import (
    INF,
    LN2,
    LOGIT_ROWS,
    LOGITS,
    OUT,
    OUT_COLUMNS,
    OUT_ROWS,
    PAIR,
    STORE,
    STORE_COLUMNS,
    STORE_ROWS,
    TILE,
    WEIGHTS,
    exp2,
    finite,
    log2,
    opaque_zero,
    round_weights,
)
from .sm90_load_kernel import LANES, load_tiles
from .sm90_work_kernel import Work, plan

LOGIT_COLUMNS = gl.constexpr(gl.SliceLayout(0, LOGITS))
QUERY = gl.constexpr(gl.DotOperandLayout(0, LOGITS, 2))


@aggregate
class Shared:
    """Shared memory and barriers. `full` and `free` barriers have one phase per pair or segment."""

    q_left: gl.shared_memory_descriptor  # [1, 64, 256] bf16
    q_right: gl.shared_memory_descriptor  # [1, 64, 256]
    q_rope: gl.shared_memory_descriptor  # [1, 64, 64]
    k_left: gl.shared_memory_descriptor  # [2, 64, 256], one tile each
    k_right: gl.shared_memory_descriptor  # [2, 64, 256]
    k_rope: gl.shared_memory_descriptor  # [2, 64, 64]
    p0: gl.shared_memory_descriptor  # [1, 64, 64]; the rope columns of K0, dead by then
    p1: gl.shared_memory_descriptor  # [1, 64, 64]
    bias: gl.shared_memory_descriptor  # [2, 64] float32, 0 or -inf per token
    base: gl.shared_memory_descriptor  # [2, 64] float32, running maximum after either tile
    sums: gl.shared_memory_descriptor  # [4, 64] float32: exact and rounded sums of both consumers
    left_full: gl.shared_memory_descriptor  # [2, 1] k_left is there
    right_full: gl.shared_memory_descriptor  # [2, 1] k_right, k_rope and bias are there
    left_free: gl.shared_memory_descriptor  # [2, 1]
    right_free: gl.shared_memory_descriptor  # [2, 1]
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    p_full: gl.shared_memory_descriptor  # [2, 1] P and base of either tile are there
    sums_full: gl.shared_memory_descriptor  # [2, 1] of either consumer

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.q_left,
            self.q_right,
            self.q_rope,
            self.k_left,
            self.k_right,
            self.k_rope,
            self.p0,
            self.p1,
            self.bias,
            self.base,
            self.sums,
            self.left_full,
            self.right_full,
            self.left_free,
            self.right_free,
            self.q_full,
            self.q_free,
            self.p_full,
            self.sums_full,
        ) = fields


@gluon.jit
def tile_logits(
    shared,
    q_rope,  # in registers
    TILE_OF_PAIR: gl.constexpr,
    zero,
    phase,
    scale_log2,
    D_ROPE: gl.constexpr,
):
    """Logits of a tile in the log2 domain, [64, 64], -inf for masked tokens."""
    s = warpgroup_mma_init(gl.zeros([TILE, TILE], gl.float32, layout=LOGITS))
    mbarrier.wait(shared.left_full.index(TILE_OF_PAIR), phase)
    keys = shared.k_left.index(TILE_OF_PAIR + zero).permute((1, 0))
    s = warpgroup_mma(shared.q_left.index(zero), keys, s, use_acc=False, is_async=True)
    mbarrier.wait(shared.right_full.index(TILE_OF_PAIR), phase)
    keys = shared.k_right.index(TILE_OF_PAIR + zero).permute((1, 0))
    s = warpgroup_mma(shared.q_right.index(zero), keys, s, is_async=True)
    if D_ROPE > 0:
        keys = shared.k_rope.index(TILE_OF_PAIR + zero).permute((1, 0))
        s = warpgroup_mma(q_rope, keys, s, is_async=True)
    # Loaded while the products run: later it would queue behind the other consumer's operands.
    bias = shared.bias.index(TILE_OF_PAIR).load(LOGIT_COLUMNS)
    s = warpgroup_mma_wait(0, deps=[s])
    return s * scale_log2 + bias[None, :]


@gluon.jit
def rescale(acc, decay):
    return warpgroup_mma_init(acc * gl.convert_layout(decay, OUT_ROWS)[:, None])


@gluon.jit
def store_out(acc, factor, staging, out_ptr, rows, COLUMN: gl.constexpr, SPLIT: gl.constexpr):
    """acc * factor as 256 columns of `rows` rows at out_ptr: bf16, or float32 where split."""
    acc = acc * gl.convert_layout(factor, OUT_ROWS)[:, None]
    if SPLIT:
        row = gl.arange(0, TILE, layout=OUT_ROWS)
        columns = gl.arange(0, 256, layout=OUT_COLUMNS)
        offsets = row[:, None] * 512 + (columns[None, :] + COLUMN)
        gl.store(out_ptr + offsets, acc, mask=(row < rows)[:, None])
    else:
        # Through shared memory, so that a warp stores 512 contiguous bytes.
        staging.store(acc.to(gl.bfloat16))
        barrier()
        row = gl.arange(0, TILE, layout=STORE_ROWS)
        columns = gl.arange(0, 256, layout=STORE_COLUMNS)
        offsets = row[:, None] * 512 + (columns[None, :] + COLUMN)
        values = staging.load(STORE)
        gl.store(out_ptr + offsets, values, mask=(row < rows)[:, None], cache_modifier=".cs")


@gluon.jit
def attend_half(
    work,
    shared,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    scale_log2,
    HALF: gl.constexpr,  # 0: left, 1: right
    D_ROPE: gl.constexpr,
    ROUNDED_SUMS: gl.constexpr,
    CAN_SPLIT: gl.constexpr,
    CHUNKED: gl.constexpr,
    ROW_LIMITS: gl.constexpr,
):
    """A consumer: softmax of one tile of each pair, half of the output's columns."""
    values = shared.k_left if HALF == 0 else shared.k_right
    values_free = shared.left_free if HALF == 0 else shared.right_free
    own_p = shared.p0 if HALF == 0 else shared.p1
    row = work.block * TILE + gl.arange(0, TILE, layout=LOGIT_ROWS)
    sequence = work.sequence
    first = work.first
    units = work.units
    done = 0
    for k in range(work.segments):
        length, start, end, whole, slot, next_sequence, first, units = work.segment(
            sequence, first, units, CHUNKED, ROW_LIMITS
        )
        pairs = end - start
        base = gl.full([TILE], -INF, gl.float32, layout=LOGIT_ROWS)
        exact = gl.zeros([TILE], gl.float32, layout=LOGIT_ROWS)
        rounded = exact
        acc = gl.zeros([TILE, 256], gl.float32, layout=OUT)
        mbarrier.wait(shared.q_full, k & 1)
        q_rope = None
        if D_ROPE > 0:
            # An operand from registers: it need not be read for every tile.
            q_rope = shared.q_rope.index(0).load(QUERY)
        for j in range(pairs):
            zero = opaque_zero(j)
            phase = (done + j) & 1
            s = tile_logits(shared, q_rope, HALF, zero, phase, scale_log2, D_ROPE)
            if ROW_LIMITS:
                token = (start + j) * PAIR + HALF * TILE
                if token + TILE > length - work.s_q + 1:
                    tokens = token + gl.arange(0, TILE, layout=LOGIT_COLUMNS)
                    limit = length - work.s_q + 1 + row // work.heads
                    s = gl.where(tokens[None, :] < limit[:, None], s, -INF)
            if HALF == 0:
                even_base = gl.maximum(base, gl.max(s, 1))
                new_base = even_base
            else:
                mbarrier.wait(shared.p_full.index(0), phase)
                even_base = shared.base.index(0).load(LOGIT_ROWS)
                decay = exp2(base - finite(even_base))
                acc = rescale(acc, decay)
                # In flight during the softmax.
                acc = warpgroup_mma(shared.p0.index(zero), values.index(zero), acc, is_async=True)
                new_base = gl.maximum(even_base, gl.max(s, 1))
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

            if HALF == 0:
                decay = exp2(base - finite(even_base))
                acc = rescale(acc, decay)
                own = gl.convert_layout(weights, WEIGHTS)
                acc = warpgroup_mma(own, values.index(zero), acc, is_async=True)
                exact = exact * decay + gl.sum(p, 1)
                if ROUNDED_SUMS:
                    rounded = rounded * decay + gl.sum(p_rounded, 1)
            else:
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
                acc = rescale(acc, decay)
                acc = warpgroup_mma(
                    shared.p1.index(zero), values.index(1 + zero), acc, is_async=True
                )
            else:
                base = new_base
                acc = rescale(acc, odd_decay)
                own = gl.convert_layout(weights, WEIGHTS)
                acc = warpgroup_mma(own, values.index(1 + zero), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            # The last pair's tile becomes the staging buffer of the output first.
            mbarrier.arrive(values_free.index(1), count=1, pred=j < pairs - 1)

        shared.sums.index(2 * HALF).store(exact)
        if ROUNDED_SUMS:
            shared.sums.index(2 * HALF + 1).store(rounded)
        barrier()
        mbarrier.arrive(shared.sums_full.index(HALF), count=1)
        mbarrier.wait(shared.sums_full.index(1 - HALF), k & 1)
        exact = exact + shared.sums.index(2 - 2 * HALF).load(LOGIT_ROWS)
        if ROUNDED_SUMS:
            rounded = rounded + shared.sums.index(3 - 2 * HALF).load(LOGIT_ROWS)
        else:
            rounded = exact
        lse = gl.where(exact == 0.0, -INF, base + log2(exact))
        factor = gl.where(rounded == 0.0, 0.0, 1.0 / rounded)
        # Rows that this block has, and where they are stored.
        rows = work.rows() - work.block * TILE
        lines = gl.arange(0, TILE, layout=LOGIT_ROWS)
        at = sequence.to(gl.int64) * work.rows() + work.block * TILE
        out = out_ptr + at * 512
        if CAN_SPLIT:
            if whole:
                store_out(acc, factor, values.index(1), out, rows, 256 * HALF, False)
            else:
                part_at = slot.to(gl.int64) * work.rows() + work.block * TILE
                part = part_ptr + part_at * 512
                store_out(acc, factor, values.index(1), part, rows, 256 * HALF, True)
                if HALF == 0:
                    gl.store(part_lse_ptr + part_at + lines, lse, mask=lines < rows)
        else:
            store_out(acc, factor, values.index(1), out, rows, 256 * HALF, False)
        # TMA may fill the buffer next.
        fence_async_shared()
        barrier()
        mbarrier.arrive(values_free.index(1), count=1)
        if HALF == 0:
            gl.store(lse_ptr + at + lines, lse * LN2, mask=(lines < rows) & whole)
        sequence = next_sequence
        done += pairs


# One compilation serves all sizes, strides and alignments: the copies' alignment is in the units.
@gluon.jit(
    do_not_specialize=[
        "q_stride_b",
        "q_stride_s",
        "q_stride_h",
        "table_stride",
        "page_stride",
        "page_size",
        "page_rows",
        "num_pages",
        "max_tokens",
        "b",
        "s_q",
        "heads",
        "max_chunks",
        "min_chunk",
    ],
    do_not_specialize_on_alignment=["table_ptr", "seqlens_ptr", "lse_ptr"],
)
def attend(
    q_ptr,  # [b, s_q, heads, 512 + D_ROPE] bf16
    kv_ptr,  # the cache as bf16
    wide,  # descriptor of the cache's rows [lines, 512 + D_ROPE], boxes [64, 256]; None without TMA
    narrow,  # boxes [64, 64]
    table_ptr,  # [b, max_pages] int32
    seqlens_ptr,  # [b] int32
    out_ptr,  # [b, s_q, heads, 512] bf16
    lse_ptr,  # [b, s_q, heads] float32, natural
    part_ptr,  # [slots, s_q * heads, 512] float32; None unless CAN_SPLIT
    part_lse_ptr,  # [slots, s_q * heads] float32, log2
    plan_ptr,  # [parts, 2] int32: a part's first sequence, -1 if it has none, and unit there
    q_stride_b,  # strides of q in units of 8 elements
    q_stride_s,
    q_stride_h,
    table_stride,
    page_stride,  # units of 8 elements
    page_size,
    page_rows,  # lines of the descriptors per page
    num_pages,
    max_tokens,  # max_pages * page_size
    b,
    s_q,
    heads,
    max_chunks,
    min_chunk,
    scale_log2,  # softmax scale * log2(e)
    D_ROPE: gl.constexpr,  # 64, or 0 where the row has no separate RoPE part
    TOKEN_STRIDE: gl.constexpr,  # units of 8 elements
    TMA: gl.constexpr,  # whole tiles lie in one page, pages are whole lines
    PREFETCH: gl.constexpr,  # bring tiles into L2 a pair ahead; only with TMA
    CAN_SPLIT: gl.constexpr,
    CHUNKED: gl.constexpr,
    ROW_LIMITS: gl.constexpr,  # causal and s_q > 1
    ROUNDED_SUMS: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
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
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout),
    )
    # cp.async arrives once per lane of the loader, TMA as often; the bias adds an arrival.
    for stage in gl.static_range(2):
        mbarrier.init(shared.left_full.index(stage), count=LANES)
        mbarrier.init(shared.right_full.index(stage), count=LANES + 1)
        mbarrier.init(shared.left_free.index(stage), count=1)
        mbarrier.init(shared.right_free.index(stage), count=1)
        mbarrier.init(shared.p_full.index(stage), count=1)
        mbarrier.init(shared.sums_full.index(stage), count=1)
    mbarrier.init(shared.q_full, count=LANES)
    mbarrier.init(shared.q_free, count=1)

    blocks = (s_q * heads + (TILE - 1)) // TILE
    block = gl.program_id(0) % blocks
    part = gl.program_id(0) // blocks
    parts = gl.num_programs(0) // blocks
    sequence, first, units, segments = plan(
        seqlens_ptr, b, max_tokens, max_chunks, min_chunk, part, parts, CHUNKED
    )
    if CAN_SPLIT and not CHUNKED:  # noqa: SIM102  # decided while compiling
        if block == 0:
            gl.store(plan_ptr + part * 2, gl.where(units > 0, sequence, -1))
            gl.store(plan_ptr + part * 2 + 1, first)
    work = Work(
        seqlens_ptr,
        table_ptr,
        table_stride.to(gl.int64),
        max_tokens,
        s_q,
        heads,
        block,
        part,
        sequence,
        first,
        units,
        segments,
        max_chunks,
        min_chunk,
    )
    # Blocks share the prefetching of the tiles that they share.
    mine = gl.where(blocks == 1, 3, 1 << (block & 1))
    # What the partitions are passed takes the place of the plan's sums, which all warps read.
    barrier()
    gl.warp_specialize(
        [
            (
                attend_half,
                (
                    work,
                    shared,
                    out_ptr,
                    lse_ptr,
                    part_ptr,
                    part_lse_ptr,
                    scale_log2,
                    0,
                    D_ROPE,
                    ROUNDED_SUMS,
                    CAN_SPLIT,
                    CHUNKED,
                    ROW_LIMITS,
                ),
            ),
            (
                attend_half,
                (
                    work,
                    shared,
                    out_ptr,
                    lse_ptr,
                    part_ptr,
                    part_lse_ptr,
                    scale_log2,
                    1,
                    D_ROPE,
                    ROUNDED_SUMS,
                    CAN_SPLIT,
                    CHUNKED,
                    ROW_LIMITS,
                ),
            ),
            (
                load_tiles,
                (
                    work,
                    shared,
                    q_ptr,
                    kv_ptr,
                    wide,
                    narrow,
                    q_stride_b.to(gl.int64),
                    q_stride_s.to(gl.int64),
                    q_stride_h.to(gl.int64),
                    page_stride.to(gl.int64),
                    page_size,
                    page_rows,
                    num_pages,
                    mine,
                    D_ROPE,
                    TOKEN_STRIDE,
                    TMA,
                    PREFETCH,
                    CHUNKED,
                    ROW_LIMITS,
                ),
            ),
        ],
        [4, 4],
        [RIGHT_REGISTERS, LOADER_REGISTERS],
    )
