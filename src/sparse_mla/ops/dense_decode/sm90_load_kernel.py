"""The loader of the Hopper kernel for dense decode: Q of each segment, then its tiles of K."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..gluon_compat import barrier
from ..sm90_pairs_kernel import COPY_ROWS, INF, PAIR, TILE, copy_rows

# Threads of the loader, each of which arrives once where cp.async or TMA fills a buffer.
LANES = gl.constexpr(128)
LANE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def load_page(table, token, length, page_size):
    """The page that a token is in, -1 past the sequence's end."""
    return gl.load(table + token // page_size, mask=token < length, other=-1)


@gluon.jit
def prefetch_tile(kv_ptr, page, token, page_stride, page_size, TOKEN_STRIDE: gl.constexpr):
    """One thread asks for the tile from `token` on, which lies in `page`, to be brought into L2."""
    at = page.to(gl.int64) * page_stride + (token % page_size).to(gl.int64) * TOKEN_STRIDE
    lane = gl.arange(0, LANES, layout=LANE)
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.eq.s32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0;}",
        "=r,l,r,r",
        [
            (kv_ptr + (at * 8 + lane * 0)).to(gl.int64),
            lane,
            gl.full([LANES], 16 * TILE * TOKEN_STRIDE, gl.int32, LANE),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_whole_tile(shared, STAGE: gl.constexpr, wide, narrow, line, phase, D_ROPE: gl.constexpr):
    """A tile by TMA, from `line` of the descriptors on."""
    mbarrier.wait(shared.left_free.index(STAGE), phase)
    full = shared.left_full.index(STAGE)
    mbarrier.expect(full, 2 * TILE * 256)
    tma.async_copy_global_to_shared(wide, [line, 0], full, shared.k_left.index(STAGE))
    mbarrier.arrive(full, count=LANES - 1)
    mbarrier.wait(shared.right_free.index(STAGE), phase)
    full = shared.right_full.index(STAGE)
    mbarrier.expect(full, 2 * TILE * (256 + D_ROPE))
    tma.async_copy_global_to_shared(wide, [line, 256], full, shared.k_right.index(STAGE))
    if D_ROPE > 0:
        tma.async_copy_global_to_shared(narrow, [line, 512], full, shared.k_rope.index(STAGE))
    mbarrier.arrive(full, count=LANES - 1)


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
def load_query(work, shared, sequence, q_ptr, stride_b, stride_s, stride_h, D_ROPE: gl.constexpr):
    """The block's rows of Q, zeros where there are none."""
    row = work.block * TILE + gl.arange(0, TILE, layout=COPY_ROWS)
    there = row < work.rows()
    offsets = sequence.to(gl.int64) * stride_b
    offsets = offsets + (row // work.heads).to(gl.int64) * stride_s
    offsets = (offsets + (row % work.heads).to(gl.int64) * stride_h) * 8
    copy_rows(shared.q_left.index(0), q_ptr, offsets, there, 0, 256)
    copy_rows(shared.q_right.index(0), q_ptr, offsets, there, 256, 256)
    if D_ROPE > 0:
        copy_rows(shared.q_rope.index(0), q_ptr, offsets, there, 512, 64)
    async_copy.mbarrier_arrive(shared.q_full, increment_count=False)


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
    mine,  # bit i: prefetch the i-th tile of each pair; the other may be another CTA's
    D_ROPE: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr,
    TMA: gl.constexpr,
    PREFETCH: gl.constexpr,
    CHUNKED: gl.constexpr,
    ROW_LIMITS: gl.constexpr,
):
    """The loader."""
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
        # The tokens whose pages are looked up: a tile's first, or all of them. Page numbers are
        # loaded a pair ahead of the tile, or of its prefetch.
        lookup = start * PAIR if TMA else start * PAIR + rows
        page0 = load_page(table, lookup, length, page_size)
        page1 = load_page(table, lookup + TILE, length, page_size)
        if PREFETCH:
            asked0 = load_page(table, (start + 1) * PAIR, length, page_size)
            asked1 = load_page(table, (start + 1) * PAIR + TILE, length, page_size)

        mbarrier.wait(shared.q_free, (k & 1) ^ 1)
        load_query(work, shared, sequence, q_ptr, q_stride_b, q_stride_s, q_stride_h, D_ROPE)
        for j in range(start, end):
            phase = ((done + j - start) & 1) ^ 1
            for stage in gl.static_range(2):
                page = page0 if stage == 0 else page1
                token = j * PAIR + stage * TILE
                known = (page >= 0) & (page < num_pages)
                ok = known & (token + rows < length)
                if TMA:
                    offset = token % page_size
                    if known & (token + TILE <= length):
                        line = page * page_rows + offset
                        load_whole_tile(shared, stage, wide, narrow, line, phase, D_ROPE)
                    else:
                        offsets = gl.where(known, page, 0).to(gl.int64) * page_stride
                        offsets = offsets + (offset + rows).to(gl.int64) * TOKEN_STRIDE
                        copy_tile(shared, stage, kv_ptr, offsets * 8, ok, phase, D_ROPE)
                else:
                    offsets = gl.where(ok, page, 0).to(gl.int64) * page_stride
                    offsets = offsets + ((token + rows) % page_size).to(gl.int64) * TOKEN_STRIDE
                    copy_tile(shared, stage, kv_ptr, offsets * 8, ok, phase, D_ROPE)
                shared.bias.index(stage).store(gl.where(ok, 0.0, -INF))
                barrier()
                mbarrier.arrive(shared.right_full.index(stage), count=1)
                if PREFETCH:
                    asked = asked0 if stage == 0 else asked1
                    ahead = token + PAIR
                    wanted = (ahead + TILE <= length) & ((mine >> stage) & 1 != 0)
                    if wanted & (asked >= 0) & (asked < num_pages):
                        prefetch_tile(kv_ptr, asked, ahead, page_stride, page_size, TOKEN_STRIDE)
                    fresh = asked
                    asked = load_page(table, ahead + PAIR, length, page_size)
                    if stage == 0:
                        asked0 = asked
                    else:
                        asked1 = asked
                else:
                    lookup = token + PAIR if TMA else token + PAIR + rows
                    fresh = load_page(table, lookup, length, page_size)
                if stage == 0:
                    page0 = fresh
                else:
                    page1 = fresh
        sequence = next_sequence
        done += end - start
