"""The part of the Hopper kernel for expanded caches that fetches K: `resolve` and `fill`.

A value of these layouts, e4m3 times a power of two, is a bf16 number: K in shared memory is exact.
`resolve` (four warps) runs a few tiles ahead: it turns slots into addresses, asks the rows into L2
and copies their scales to a ring; it also copies Q. `fill` (four warps) loads raw bytes to
registers, 64 dims (a unit) of a tile at a time and a few units ahead, across the borders of tiles
and items, and stores them expanded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate

from ..gluon_compat import async_load, barrier, reinterpret
from ..sparse_prefill.sm90_kernel import COPY_ROWS, INF, TILE, copy_rows
from .sm90_expand_plan_kernel import entries, pair_count

# A unit, [64 tokens, 16 words]: four lanes take 64 bytes of a row, so that their 16-byte stores to
# two rows of swizzled bf16 meet all banks.
UNIT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
ROWS = gl.constexpr(gl.SliceLayout(1, UNIT))
COLUMNS = gl.constexpr(gl.SliceLayout(0, UNIT))
# The two words of a row's scales, by the same threads.
SCALES = gl.constexpr(gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0]))
# `resolve`: a slot a thread, twice; [64, 2] words of scales, and halves of the lines of a row.
RESOLVE = gl.constexpr(gl.BlockedLayout([1, 2], [32, 1], [4, 1], [1, 0]))
SLOTS = gl.constexpr(gl.SliceLayout(1, RESOLVE))
LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]],
        warp_bases=[[32, 0], [0, 1]],
        block_bases=[],
        shape=[64, 2],
    )
)
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))

# v4_fp8: seven units of e4m3, then one of bf16.
UNITS = gl.constexpr(7)
ROW_WORDS = gl.constexpr(144)
FOOTER_WORDS = gl.constexpr(2)
# Tiles that `resolve` may be ahead; at least 4, see there.
RING = gl.constexpr(4)
# The row of an invalid entry. An extra cache below the main one has negative rows.
NOTHING = gl.constexpr(-(2**62))


@aggregate
class Ring:
    """What `resolve` tells `fill` of each tile; the barriers have one phase per round."""

    rows: gl.shared_memory_descriptor  # [RING, 64] int64, words from kv_ptr on, or NOTHING
    scales: gl.shared_memory_descriptor  # [RING, 64, 2] int32
    full: gl.shared_memory_descriptor  # [RING, 1]
    free: gl.shared_memory_descriptor  # [RING, 1]

    @gluon.constexpr_function
    def __init__(self, *fields):
        self.rows, self.scales, self.full, self.free = fields


@aggregate
class Pages:
    """A cache and its lists. Offsets count 32-bit words from the main cache's first."""

    start: gl.tensor  # int64, where this cache begins
    page_words: gl.tensor  # int64
    page_size: gl.tensor
    page_magic: gl.tensor  # slot // page_size = umulhi(2 slot, page_magic) >> page_shift
    page_shift: gl.tensor
    last_slot: gl.tensor  # num_slots - 1, at most 2^31 - 1; -1 for an empty cache
    lists: gl.tensor  # pointer to int32
    stride_b: gl.tensor  # int64
    stride_s: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.start,
            self.page_words,
            self.page_size,
            self.page_magic,
            self.page_shift,
            self.last_slot,
            self.lists,
            self.stride_b,
            self.stride_s,
        ) = fields

    @gluon.jit
    def line(self, b, s):
        """A query token's list."""
        return self.lists + b.to(gl.int64) * self.stride_b + s.to(gl.int64) * self.stride_s


@gluon.jit
def load_unit(kv, rows, unit: gl.constexpr):
    """Unit `unit` of each row, int32 [64, 16]; zeros where there is nothing."""
    columns = gl.arange(0, 16, layout=COLUMNS)
    at = gl.max_contiguous(
        gl.multiple_of(rows[:, None] + (columns[None, :] + 16 * unit), [1, 4]), [1, 4]
    )
    return gl.load(kv + at, mask=(rows > NOTHING)[:, None], other=0)


@gluon.jit
def scale_pair(words, BYTE: gl.constexpr):
    """A ue8m0 byte of each word as two equal bf16: 2^-127 is a bf16 denormal, 255 becomes NaN."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 least, zero;
        mov.b32 least, 0x00400040;
        mov.b32 zero, 0;
        prmt.b32 $0, $1, zero, $2;
        shr.u32 $0, $0, 1;
        max.u16x2 $0, $0, least;
        fma.rn.bf16x2 $0, $0, zero, $0;
        }""",
        "=&r,r,r",
        [words, gl.full_like(words, 0x0404 + 0x1010 * BYTE)],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def expand(raw, scale):
    """e4m3 words [64, n] times a pair of bf16 per row, [64], as words of bf16 [64, 2 n]."""
    raw, scale = gl.broadcast(raw, gl.expand_dims(scale, 1))
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 x, y, a, b, c, d;
        .reg .f32 e, f;
        .reg .b32 p, q;
        mov.b32 {x, y}, $2;
        cvt.rn.f16x2.e4m3x2 p, x;
        cvt.rn.f16x2.e4m3x2 q, y;
        mov.b32 {a, b}, p;
        mov.b32 {c, d}, q;
        cvt.f32.f16 e, a;
        cvt.f32.f16 f, b;
        cvt.rn.bf16x2.f32 p, f, e;
        cvt.f32.f16 e, c;
        cvt.f32.f16 f, d;
        cvt.rn.bf16x2.f32 q, f, e;
        mul.rn.bf16x2 $0, p, $3;
        mul.rn.bf16x2 $1, q, $3;
        }""",
        "=&r,=r,r,r",
        [raw, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.join(low, high).reshape([raw.shape[0], 2 * raw.shape[1]])


@gluon.jit
def copy_rope(kv, rows, target):
    """Copy the bf16 unit of each row to target, words [64, 32] of K."""
    columns = gl.arange(0, 32, layout=COLUMNS)
    at = gl.max_contiguous(
        gl.multiple_of(rows[:, None] + (columns[None, :] + 16 * UNITS), [1, 4]), [1, 4]
    )
    async_load(target, kv + at, mask=(rows > NOTHING)[:, None])


@gluon.jit
def pieces(shape, work, item, start, lengths, extra_lengths, BALANCED: gl.constexpr):
    """The program's part of an item.

    Returns the item's number, the tiles [first, last), the entries of both lists that count and
    the unit where the next item starts.
    """
    which = item
    if not BALANCED:
        which = shape.item_of(item)
    b = shape.sequence(which)
    limit = entries(shape.topk, lengths, b)
    extra_limit = entries(shape.extra_topk, extra_lengths, b)
    pairs = pair_count(limit, extra_limit)
    which, first, last, _ = work.cut(shape, item, start, pairs, BALANCED)
    return which, 2 * first, 2 * last, limit, extra_limit, start + pairs + 1


@gluon.jit
def locate(kv, pages, slots):
    """Where the slots' rows and scales begin, in words, int64 [64]; slots are valid."""
    twice = (slots * 2).to(gl.uint32)
    page = gl.umulhi(twice, pages.page_magic.to(gl.uint32)) >> pages.page_shift.to(gl.uint32)
    page = page.to(gl.int32)
    offset = slots - page * pages.page_size
    at = pages.start + page.to(gl.int64) * pages.page_words
    footers = pages.page_size.to(gl.int64) * ROW_WORDS + offset.to(gl.int64) * FOOTER_WORDS
    return at + offset.to(gl.int64) * ROW_WORDS, at + footers


@gluon.jit
def prefetch(kv, rows, footers, ok):
    """Ask L2 for the five lines of 128 bytes of each row [64] and for its footer."""
    # Two threads share a row.
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, LINES))[None, :]
    row = gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, LINES)), 1)
    footer = gl.expand_dims(gl.convert_layout(footers, gl.SliceLayout(1, LINES)), 1)
    ok = gl.expand_dims(gl.convert_layout(ok.to(gl.int32), gl.SliceLayout(1, LINES)), 1)
    row += half * 96
    last = gl.where(half == 0, row + 64, footer)
    ok, row, last = gl.broadcast(ok, row)[0], row, last
    gl.inline_asm_elementwise(
        """{
        .reg .pred valid;
        setp.ne.s32 valid, $3, 0;
        @valid prefetch.global.L2 [$1];
        @valid prefetch.global.L2 [$1 + 128];
        @valid prefetch.global.L2 [$2];
        mov.u32 $0, 0;
        }""",
        "=r,l,l,r",
        [(kv + row).to(gl.int64), (kv + last).to(gl.int64), ok],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def push(kv, pages, line, entry, limit, ring, at, phase, PREFETCH: gl.constexpr):
    """Resolve a tile, entries `entry` and following of a list, into place `at` of the ring."""
    rows = entry + gl.arange(0, TILE, layout=SLOTS)
    slots = gl.load(line + rows, mask=rows < limit, other=-1)
    ok = (slots >= 0) & (slots <= pages.last_slot)
    rows, footers = locate(kv, pages, gl.where(ok, slots, 0))
    if PREFETCH:
        prefetch(kv, rows, footers, ok)
    mbarrier.wait(ring.free.index(at), phase ^ 1)
    words = gl.arange(0, 2, layout=gl.SliceLayout(0, RESOLVE))
    from_footer = gl.max_contiguous(
        gl.multiple_of(footers[:, None] + words[None, :], [1, 2]), [1, 2]
    )
    async_load(ring.scales.index(at), kv + from_footer, mask=ok[:, None])
    async_copy.mbarrier_arrive(ring.full.index(at), increment_count=False)
    ring.rows.index(at).store(gl.where(ok, rows, NOTHING))
    barrier()
    mbarrier.arrive(ring.full.index(at), count=1)


@gluon.jit
def copy_query(
    shape, shared, q_ptr, which, stride_b, stride_s, stride_h, item_phase, HEADS: gl.constexpr
):
    """Copy an item's Q once the last one's is not needed any more; zeros past the last head."""
    token = shape.token(which)
    head = shape.first_head(which) + gl.arange(0, HEADS, layout=COPY_ROWS)
    offset = (token // shape.s_q).to(gl.int64) * stride_b
    offset += (token % shape.s_q).to(gl.int64) * stride_s
    offsets = (offset + head.to(gl.int64) * stride_h) * 8
    mbarrier.wait(shared.q_free, item_phase ^ 1)
    copy_rows(shared.q_left.index(0), q_ptr, offsets, head < shape.heads, 0, 256)
    copy_rows(shared.q_right.index(0), q_ptr, offsets, head < shape.heads, 256, 256)
    async_copy.mbarrier_arrive(shared.q_full, increment_count=False)


@gluon.jit
def resolve(
    shape, work, shared, ring, main, extra, lengths, extra_lengths, q_ptr, kv,
    q_stride_b, q_stride_s, q_stride_h,
    EXTRA: gl.constexpr, BALANCED: gl.constexpr, PREFETCH: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Resolve the tiles of all items, and copy each item's Q."""
    start = work.start
    pushed = 0
    item_phase = 0
    for item in range(work.begin, work.end, work.step):
        which, first, last, limit, extra_limit, start = pieces(
            shape, work, item, start, lengths, extra_lengths, BALANCED
        )
        b = shape.sequence(which)
        s = shape.token(which) % shape.s_q
        in_main = (limit + (TILE - 1)) // TILE
        # Q only when four tiles have been pushed (or all): before that the last item's Q may still
        # be in use, and waiting for it would end the lead. `fill` and the ring hold four tiles
        # without Q.
        query_at = gl.where(item == work.begin, first, gl.minimum(first + 3, last - 1))
        for tile in range(first, last):
            at = pushed % RING
            phase = (pushed // RING) & 1
            if EXTRA:
                if tile < in_main:
                    push(kv, main, main.line(b, s), tile * TILE, limit, ring, at, phase, PREFETCH)
                else:
                    entry = (tile - in_main) * TILE
                    push(kv, extra, extra.line(b, s), entry, extra_limit, ring, at, phase, PREFETCH)
            else:
                push(kv, main, main.line(b, s), tile * TILE, limit, ring, at, phase, PREFETCH)
            if tile == query_at:
                copy_query(
                    shape,
                    shared,
                    q_ptr,
                    which,
                    q_stride_b,
                    q_stride_s,
                    q_stride_h,
                    item_phase,
                    HEADS,
                )
            pushed += 1
        item_phase ^= 1
    # `fill` looks one tile ahead.
    push(kv, main, main.lists, 0, 0, ring, pushed % RING, (pushed // RING) & 1, PREFETCH)


@gluon.jit
def fill(
    shape, work, shared, ring, lengths, extra_lengths, kv,
    BALANCED: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Expand the tiles of all items; `AHEAD` units are loaded before they are needed."""
    mbarrier.wait(ring.full.index(0), 0)
    rows = ring.rows.index(0).load(ROWS)
    units = (load_unit(kv, rows, 0),)
    for unit in gl.static_range(1, AHEAD):
        units = units + (load_unit(kv, rows, unit),)  # noqa: RUF005
    start = work.start
    done = 0
    for item in range(work.begin, work.end, work.step):
        _, first, last, _, _, start = pieces(
            shape, work, item, start, lengths, extra_lengths, BALANCED
        )
        pairs = (last - first) // 2
        for j in range(pairs):
            phase = ((done + j) & 1) ^ 1
            for stage in gl.static_range(2):
                tile = 2 * (done + j) + stage
                left = reinterpret(shared.k_left, gl.int32, [2, TILE, 128], WORDS).index(stage)
                right = reinterpret(shared.k_right, gl.int32, [2, TILE, 128], WORDS).index(stage)
                scales = ring.scales.index(tile % RING).load(SCALES)
                low, high = gl.split(scales)
                low = gl.convert_layout(low, ROWS, assert_trivial=True)
                high = gl.convert_layout(high, ROWS, assert_trivial=True)
                next_rows = rows
                mbarrier.wait(shared.left_free.index(stage), phase)
                for unit in gl.static_range(UNITS):
                    if unit == 4:
                        fence_async_shared()
                        barrier()
                        mbarrier.arrive(shared.left_full.index(stage), count=1)
                        mbarrier.wait(shared.right_free.index(stage), phase)
                        shared.bias.index(stage).store(gl.where(rows > NOTHING, 0.0, -INF))
                        copy_rope(kv, rows, right.slice(96, 32, dim=1))
                        async_copy.mbarrier_arrive(
                            shared.right_full.index(stage), increment_count=False
                        )
                    if unit + AHEAD == UNITS:
                        after = tile + 1
                        mbarrier.wait(ring.full.index(after % RING), (after // RING) & 1)
                        next_rows = ring.rows.index(after % RING).load(ROWS)
                    scale = scale_pair(low if unit < 4 else high, unit % 4)
                    words = expand(units[0], scale)
                    if unit + AHEAD < UNITS:
                        fresh = load_unit(kv, rows, unit + AHEAD)
                    else:
                        fresh = load_unit(kv, next_rows, unit + AHEAD - UNITS)
                    units = units[1:] + (fresh,)  # noqa: RUF005
                    half = left if unit < 4 else right
                    half.slice(32 * (unit % 4), 32, dim=1).store(words)
                fence_async_shared()
                barrier()
                mbarrier.arrive(shared.right_full.index(stage), count=1)
                mbarrier.arrive(ring.free.index(tile % RING), count=1)
                rows = next_rows
        done += pairs
