"""The Hopper kernel of dense decode over bf16 caches: 64 rows of a sequence per CTA.

A row is one head of one query token; a sequence has s_q * heads of them, in blocks of 64. The grid
is blocks x parts: all parts together walk over all sequences, each over an equal share of their
tokens (`plan`), and the CTAs of one part, one for each block, read the same rows of the cache at
the same time, so that they meet in L2.

Three groups of four warps share the work on 64-token tiles of K, two tiles (a pair) at a time, as
in sparse_prefill/sm90_kernel.py:

    left    S0 = Q K0^T of the even tile, softmax, O[:, :256] += P0 V0 + P1 V1
    right   S1 = Q K1^T of the odd tile, softmax, O[:, 256:] += P0 V0 + P1 V1
    loader  a whole tile of a page by TMA, issued by one thread; a tile that the sequence ends in,
            or one of several pages, by cp.async, 16 bytes a lane, with zeros for absent tokens

Each consumer's own P comes from its registers, the other's from shared memory. Both apply P0, then
P1, and the softmax's reference, the running maximum, goes from hand to hand with them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from ..gluon_compat import barrier
from ..sparse_prefill.sm90_kernel import (
    COPY_ROWS,
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
    Shared,
    copy_rows,
    exp2,
    finite,
    log2,
    opaque_zero,
    round_weights,
    tile_logits,
)

LOGIT_COLUMNS = gl.constexpr(gl.SliceLayout(0, LOGITS))
# Sequences that `plan` looks at together.
SEQUENCES = gl.constexpr(256)
PLAN = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
# The loader's threads, for prefetching.
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@aggregate
class Work:
    """What this CTA attends: `segments` pieces of sequences, from unit `first` of `sequence` on.

    A unit is a pair of tiles, or where sequences are cut by their own lengths alone (CHUNKED), one
    such piece.
    """

    seqlens: gl.tensor  # [b] int32
    table: gl.tensor  # [b, pages] int32
    table_stride: gl.tensor
    max_tokens: gl.tensor  # what the table reaches
    s_q: gl.tensor
    heads: gl.tensor
    block: gl.tensor
    part: gl.tensor
    sequence: gl.tensor
    first: gl.tensor
    units: gl.tensor
    segments: gl.tensor
    max_chunks: gl.tensor
    min_chunk: gl.tensor  # pairs

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.seqlens,
            self.table,
            self.table_stride,
            self.max_tokens,
            self.s_q,
            self.heads,
            self.block,
            self.part,
            self.sequence,
            self.first,
            self.units,
            self.segments,
            self.max_chunks,
            self.min_chunk,
        ) = fields

    @gluon.jit
    def segment(self, sequence, first, units, CHUNKED: gl.constexpr, ROW_LIMITS: gl.constexpr):
        """Tokens of the sequence, the segment's pairs [first, last), whether it is the whole
        sequence, its slot of the partial results, and the next (sequence, first, units)."""
        length = gl.maximum(gl.minimum(gl.load(self.seqlens + sequence), self.max_tokens), 0)
        pairs = pairs_of(length)
        if CHUNKED:
            chunk = chunk_of(pairs, self.max_chunks, self.min_chunk)
            start = first * chunk
            end = gl.minimum(start + chunk, pairs)
            taken = 1
            slot = sequence * self.max_chunks + first
        else:
            start = first
            end = gl.minimum(start + units, pairs)
            taken = end - start
            slot = self.part * 2 + gl.where(sequence == self.sequence, 0, 1)
        whole = (start == 0) & (end == pairs)
        ended = end == pairs
        if ROW_LIMITS:
            # No row of this block sees more than its last row.
            query = gl.minimum((self.block * TILE + (TILE - 1)) // self.heads, self.s_q - 1)
            seen = pairs_of(length - self.s_q + query + 1)
            end = gl.maximum(gl.minimum(end, seen), start + 1)
        return (
            length,
            start,
            end,
            whole,
            slot,
            gl.where(ended, sequence + 1, sequence),
            gl.where(ended, 0, first + taken),
            units - taken,
        )

    @gluon.jit
    def rows(self):
        """Rows of a sequence."""
        return self.s_q * self.heads


@gluon.jit
def pairs_of(length):
    """Pairs of tiles to go through for so many tokens: at least one, all masked if need be."""
    return gl.maximum((length + (PAIR - 1)) // PAIR, 1)


@gluon.jit
def chunk_of(pairs, max_chunks, min_chunk):
    """Pairs of a piece, by the sequence's own length."""
    return gl.maximum((pairs + max_chunks - 1) // max_chunks, min_chunk)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def load_units(seqlens, start, b, max_tokens, max_chunks, min_chunk, CHUNKED: gl.constexpr):
    """Units of SEQUENCES sequences from `start` on, 0 where there is none, and which exist."""
    index = start + gl.arange(0, SEQUENCES, layout=PLAN)
    there = index < b
    length = gl.load(seqlens + index, mask=there, other=0)
    units = pairs_of(gl.maximum(gl.minimum(length, max_tokens), 0))
    if CHUNKED:
        chunk = chunk_of(units, max_chunks, min_chunk)
        units = (units + chunk - 1) // chunk
    return gl.where(there, units, 0), there


@gluon.jit
def plan(seqlens, b, max_tokens, max_chunks, min_chunk, part, parts, CHUNKED: gl.constexpr):
    """This part's share of all units: its first sequence, the unit there, units, segments."""
    total = 0
    least = 2147483647
    most = 0
    for start in range(0, b, SEQUENCES):
        units, there = load_units(seqlens, start, b, max_tokens, max_chunks, min_chunk, CHUNKED)
        total += gl.sum(units, 0)
        most = gl.maximum(most, gl.max(units, 0))
        least = gl.minimum(least, gl.min(gl.where(there, units, 2147483647), 0))
    size = (total + parts - 1) // parts
    if not CHUNKED:
        # Sequences of one length are left whole where that costs less than cutting them.
        whole = (size + most - 1) // most * most
        size = gl.where((least == most) & (whole * 16 <= size * 17), whole, size)
    begin = part * size
    end = gl.minimum(begin + size, total)
    sequence = 0
    before = 0  # units before `sequence`
    last = 0
    carry = 0
    for start in range(0, b, SEQUENCES):
        units, there = load_units(seqlens, start, b, max_tokens, max_chunks, min_chunk, CHUNKED)
        ends = carry + gl.associative_scan(units, 0, _add)
        over = there & (ends <= begin)
        sequence += gl.sum(over.to(gl.int32), 0)
        before = gl.maximum(before, gl.max(gl.where(over, ends, 0), 0))
        last += gl.sum((there & (ends < end)).to(gl.int32), 0)
        carry += gl.sum(units, 0)
    units = gl.maximum(end - begin, 0)
    segments = units if CHUNKED else last - sequence + 1
    return sequence, begin - before, units, gl.where(units > 0, segments, 0)


@gluon.jit
def prefetch_tile(ptr, BYTES: gl.constexpr):
    """Ask for BYTES contiguous bytes, aligned to 128, to be brought into L2."""
    lane = gl.arange(0, 128, layout=LANES)
    for i in gl.static_range((BYTES // 128 + 127) // 128):
        line = lane + i * 128
        gl.inline_asm_elementwise(
            "{.reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
            "=r,l,r,r",
            [(ptr + line * 64).to(gl.int64), line, gl.full([128], BYTES // 128, gl.int32, LANES)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def load_tiles(
    work,
    shared,
    q_ptr,
    kv_ptr,
    wide,
    narrow,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    page_stride,
    page_size,
    page_rows,
    num_pages,
    prefetching,
    D_ROPE: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr,
    TMA: gl.constexpr,
    AHEAD: gl.constexpr,
    CHUNKED: gl.constexpr,
    ROW_LIMITS: gl.constexpr,
):
    """The loader: Q of each segment, then its tiles of K."""
    rows = gl.arange(0, TILE, layout=COPY_ROWS)
    sequence = work.sequence
    first = work.first
    units = work.units
    done = 0
    for k in range(work.segments):
        length, start, end, _, _, next_sequence, first, units = work.segment(
            sequence, first, units, CHUNKED, ROW_LIMITS
        )
        table = work.table + sequence.to(gl.int64) * work.table_stride
        token = start * PAIR
        if TMA:
            page0 = gl.load(table + token // page_size, mask=token < length, other=-1)
            token1 = token + TILE
            page1 = gl.load(table + token1 // page_size, mask=token1 < length, other=-1)
        else:
            tokens = token + rows
            page0 = gl.load(table + tokens // page_size, mask=tokens < length, other=-1)
            tokens = tokens + TILE
            page1 = gl.load(table + tokens // page_size, mask=tokens < length, other=-1)

        row = work.block * TILE + rows
        q_offsets = sequence.to(gl.int64) * q_stride_b
        q_offsets = q_offsets + (row // work.heads).to(gl.int64) * q_stride_s
        q_offsets = (q_offsets + (row % work.heads).to(gl.int64) * q_stride_h) * 8
        there = row < work.rows()
        mbarrier.wait(shared.q_free, (k & 1) ^ 1)
        copy_rows(shared.q_left.index(0), q_ptr, q_offsets, there, 0, 256)
        copy_rows(shared.q_right.index(0), q_ptr, q_offsets, there, 256, 256)
        if D_ROPE > 0:
            copy_rows(shared.q_rope.index(0), q_ptr, q_offsets, there, 512, 64)
        async_copy.mbarrier_arrive(shared.q_full, increment_count=False)
        for j in range(start, end):
            phase = ((done + j - start) & 1) ^ 1
            for stage in gl.static_range(2):
                page = page0 if stage == 0 else page1
                token = j * PAIR + stage * TILE
                if TMA and AHEAD > 0:
                    later = token + AHEAD * PAIR
                    if (later + TILE <= length) & ((prefetching >> stage) & 1 != 0):
                        asked = gl.load(table + later // page_size)
                        if (asked >= 0) & (asked < num_pages):
                            at = asked.to(gl.int64) * page_stride
                            at += (later % page_size).to(gl.int64) * TOKEN_STRIDE
                            prefetch_tile(kv_ptr + at * 8, 16 * TILE * TOKEN_STRIDE)
                if TMA:
                    known = (page >= 0) & (page < num_pages)
                    ok = (token + rows < length) & known
                    offset = token % page_size
                    if (token + TILE <= length) & known:
                        line = page * page_rows + offset
                        mbarrier.wait(shared.left_free.index(stage), phase)
                        mbarrier.expect(shared.left_full.index(stage), 32768)
                        tma.async_copy_global_to_shared(
                            wide,
                            [line, 0],
                            shared.left_full.index(stage),
                            shared.k_left.index(stage),
                        )
                        mbarrier.arrive(shared.left_full.index(stage), count=127)
                        mbarrier.wait(shared.right_free.index(stage), phase)
                        mbarrier.expect(
                            shared.right_full.index(stage), 32768 + (8192 if D_ROPE > 0 else 0)
                        )
                        tma.async_copy_global_to_shared(
                            wide,
                            [line, 256],
                            shared.right_full.index(stage),
                            shared.k_right.index(stage),
                        )
                        if D_ROPE > 0:
                            tma.async_copy_global_to_shared(
                                narrow,
                                [line, 512],
                                shared.right_full.index(stage),
                                shared.k_rope.index(stage),
                            )
                        mbarrier.arrive(shared.right_full.index(stage), count=127)
                    else:
                        offsets = gl.where(known, page, 0).to(gl.int64) * page_stride
                        offsets = offsets + (offset + rows).to(gl.int64) * TOKEN_STRIDE
                        copy_tile(shared, stage, kv_ptr, offsets * 8, ok, phase, D_ROPE)
                else:
                    tokens = token + rows
                    ok = (page >= 0) & (page < num_pages) & (tokens < length)
                    offsets = gl.where(ok, page, 0).to(gl.int64) * page_stride
                    offsets = offsets + (tokens % page_size).to(gl.int64) * TOKEN_STRIDE
                    copy_tile(shared, stage, kv_ptr, offsets * 8, ok, phase, D_ROPE)
                shared.bias.index(stage).store(gl.where(ok, 0.0, -INF))
                barrier()
                mbarrier.arrive(shared.right_full.index(stage), count=1)
                # Page numbers are loaded a pair ahead.
                if TMA:
                    later = token + PAIR
                else:
                    later = token + PAIR + rows
                fresh = gl.load(table + later // page_size, mask=later < length, other=-1)
                if stage == 0:
                    page0 = fresh
                else:
                    page1 = fresh
        sequence = next_sequence
        done += end - start


@gluon.jit
def copy_tile(shared, STAGE: gl.constexpr, kv_ptr, offsets, ok, phase, D_ROPE: gl.constexpr):
    """A tile row by row, zeros where not ok."""
    mbarrier.wait(shared.left_free.index(STAGE), phase)
    copy_rows(shared.k_left.index(STAGE), kv_ptr, offsets, ok, 0, 256)
    async_copy.mbarrier_arrive(shared.left_full.index(STAGE), increment_count=False)
    mbarrier.wait(shared.right_free.index(STAGE), phase)
    copy_rows(shared.k_right.index(STAGE), kv_ptr, offsets, ok, 256, 256)
    if D_ROPE > 0:
        copy_rows(shared.k_rope.index(STAGE), kv_ptr, offsets, ok, 512, 64)
    async_copy.mbarrier_arrive(shared.right_full.index(STAGE), increment_count=False)


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
        for j in range(pairs):
            zero = opaque_zero(j)
            phase = (done + j) & 1
            s = tile_logits(shared, HALF, zero, phase, scale_log2, D_ROPE)
            if ROW_LIMITS:
                token = (start + j) * PAIR + HALF * TILE
                if token + TILE > length - work.s_q + 1:
                    tokens = token + gl.arange(0, TILE, layout=LOGIT_COLUMNS)
                    limit = length - work.s_q + 1 + row // work.heads
                    s = gl.where(tokens[None, :] < limit[:, None], s, -INF)
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
                acc = warpgroup_mma(
                    shared.p1.index(zero), values.index(1 + zero), acc, is_async=True
                )
            else:
                base = new_base
                acc = warpgroup_mma_init(acc * gl.convert_layout(odd_decay, OUT_ROWS)[:, None])
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
        rows = work.rows() - work.block * TILE
        at = sequence.to(gl.int64) * work.rows() + work.block * TILE
        if CAN_SPLIT:
            if whole:
                store_out(acc, factor, values.index(1), out_ptr + at * 512, rows, 256 * HALF, False)
            else:
                part_at = slot.to(gl.int64) * work.rows() + work.block * TILE
                store_out(
                    acc, factor, values.index(1), part_ptr + part_at * 512, rows, 256 * HALF, True
                )
                if HALF == 0:
                    lines = gl.arange(0, TILE, layout=LOGIT_ROWS)
                    gl.store(part_lse_ptr + part_at + lines, lse, mask=lines < rows)
        else:
            store_out(acc, factor, values.index(1), out_ptr + at * 512, rows, 256 * HALF, False)
        # TMA may fill the buffer next.
        fence_async_shared()
        barrier()
        mbarrier.arrive(values_free.index(1), count=1)
        if HALF == 0:
            lines = gl.arange(0, TILE, layout=LOGIT_ROWS)
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
    AHEAD: gl.constexpr,  # pairs between a tile's L2 prefetch and its load; 0: none
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
    # cp.async arrives once per lane of the loader, TMA with as many; the bias adds an arrival.
    for stage in gl.static_range(2):
        mbarrier.init(shared.left_full.index(stage), count=128)
        mbarrier.init(shared.right_full.index(stage), count=129)
        mbarrier.init(shared.left_free.index(stage), count=1)
        mbarrier.init(shared.right_free.index(stage), count=1)
        mbarrier.init(shared.p_full.index(stage), count=1)
        mbarrier.init(shared.sums_full.index(stage), count=1)
    mbarrier.init(shared.q_full, count=128)
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
    # Two blocks share the prefetching of the tiles that they share.
    prefetching = gl.where(blocks == 1, 3, 1 << (block & 1))
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
                    prefetching,
                    D_ROPE,
                    TOKEN_STRIDE,
                    TMA,
                    AHEAD,
                    CHUNKED,
                    ROW_LIMITS,
                ),
            ),
        ],
        [4, 4],
        [RIGHT_REGISTERS, LOADER_REGISTERS],
    )
