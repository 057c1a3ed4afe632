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


@aggregate
class Piece:
    """A program's part of an item: tiles [first, last), `main` of them of the main list."""

    which: gl.tensor
    b: gl.tensor
    s: gl.tensor
    entries: gl.tensor
    extra_entries: gl.tensor
    main: gl.tensor
    first: gl.tensor
    last: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.which,
            self.b,
            self.s,
            self.entries,
            self.extra_entries,
            self.main,
            self.first,
            self.last,
        ) = fields


@gluon.jit
def cut_item(shape, work, item, start, lengths, extra_lengths, BALANCED: gl.constexpr):
    """The program's part of an item: the item's number, the pairs [first, last), the entries of
    both lists that count and the unit where the next item starts."""
    which = item
    if not BALANCED:
        which = shape.item_of(item)
    b = shape.sequence(which)
    limit = entries(shape.topk, lengths, b)
    extra_limit = entries(shape.extra_topk, extra_lengths, b)
    pairs = pair_count(limit, extra_limit)
    which, first, last, _ = work.cut(shape, item, start, pairs, BALANCED)
    return which, first, last, limit, extra_limit, start + pairs + 1


@gluon.jit
def piece_of(shape, work, item, start, lengths, extra_lengths, BALANCED: gl.constexpr):
    """An item's piece and where the next item starts; without entries where there is no item."""
    known = gl.minimum(item, shape.items() - 1)
    which, first, last, limit, extra_limit, following = cut_item(
        shape, work, known, start, lengths, extra_lengths, BALANCED
    )
    b = shape.sequence(which)
    s = shape.token(which) % shape.s_q
    return Piece(
        which,
        b,
        s,
        gl.where(item < work.end, limit, 0),
        gl.where(item < work.end, extra_limit, 0),
        (limit + (TILE - 1)) // TILE,
        2 * first,
        2 * last,
    ), following


@gluon.jit
def load_slots(main, extra, piece, following, tile, EXTRA: gl.constexpr):
    """The slots [64] of a tile of a piece, or past its end of the following one; -1: not valid."""
    past = tile >= piece.last
    tile = gl.where(past, tile - piece.last + following.first, tile)
    b = gl.where(past, following.b, piece.b)
    s = gl.where(past, following.s, piece.s)
    line = main.line(b, s)
    limit = gl.where(past, following.entries, piece.entries)
    last_slot = main.last_slot
    if EXTRA:
        tile -= gl.where(past, following.main, piece.main)
        in_extra = tile >= 0
        tile += gl.where(in_extra, 0, gl.where(past, following.main, piece.main))
        line = gl.where(in_extra, extra.line(b, s), line)
        extra_limit = gl.where(past, following.extra_entries, piece.extra_entries)
        limit = gl.where(in_extra, extra_limit, limit)
        last_slot = gl.where(in_extra, extra.last_slot, last_slot)
    entry = tile * TILE + gl.arange(0, TILE, layout=SLOTS)
    slots = gl.load(line + entry, mask=entry < limit, other=-1)
    return gl.where(slots <= last_slot, slots, -1)


@gluon.jit
def locate(main, extra, in_extra, slots, EXTRA: gl.constexpr):
    """Where the slots' rows and scales begin, in words, int64 [64]; slots are valid."""
    start = main.start
    page_words = main.page_words
    page_size = main.page_size
    magic = main.page_magic
    shift = main.page_shift
    if EXTRA:
        start = gl.where(in_extra, extra.start, start)
        page_words = gl.where(in_extra, extra.page_words, page_words)
        page_size = gl.where(in_extra, extra.page_size, page_size)
        magic = gl.where(in_extra, extra.page_magic, magic)
        shift = gl.where(in_extra, extra.page_shift, shift)
    twice = (slots * 2).to(gl.uint32)
    page = (gl.umulhi(twice, magic.to(gl.uint32)) >> shift.to(gl.uint32)).to(gl.int32)
    offset = slots - page * page_size
    at = start + page.to(gl.int64) * page_words
    footers = page_size.to(gl.int64) * ROW_WORDS + offset.to(gl.int64) * FOOTER_WORDS
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
def push(
    kv, main, extra, in_extra, slots, ring, at, phase, EXTRA: gl.constexpr, PREFETCH: gl.constexpr
):
    """Resolve a tile's slots into place `at` of the ring."""
    ok = slots >= 0
    rows, footers = locate(main, extra, in_extra, gl.where(ok, slots, 0), EXTRA)
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
    """Resolve the tiles of all items, and copy each item's Q.

    Slots are loaded two tiles before they are needed, across the items' border: a load that is
    issued after copies (cp.async) waits for them.
    """
    piece, start = piece_of(shape, work, work.begin, work.start, lengths, extra_lengths, BALANCED)
    slots = load_slots(main, extra, piece, piece, piece.first, EXTRA)
    next_slots = load_slots(main, extra, piece, piece, piece.first + 1, EXTRA)
    pushed = 0
    item_phase = 0
    for item in range(work.begin, work.end, work.step):
        following, next_start = piece_of(
            shape, work, item + work.step, start, lengths, extra_lengths, BALANCED
        )
        # Q only when three tiles have been pushed (or all): before that the last item's Q may still
        # be in use, and waiting for it would end the lead. `fill` and the ring hold four tiles
        # without Q.
        query_at = gl.where(
            item == work.begin, piece.first, gl.minimum(piece.first + 3, piece.last - 1)
        )
        for tile in range(piece.first, piece.last):
            later_slots = load_slots(main, extra, piece, following, tile + 2, EXTRA)
            if tile == query_at:
                copy_query(
                    shape, shared, q_ptr, piece.which, q_stride_b, q_stride_s, q_stride_h,
                    item_phase, HEADS,
                )  # fmt: skip
            push(
                kv, main, extra, tile >= piece.main, slots, ring, pushed % RING,
                (pushed // RING) & 1, EXTRA, PREFETCH,
            )  # fmt: skip
            slots = next_slots
            next_slots = later_slots
            pushed += 1
        piece = following
        start = next_start
        item_phase ^= 1
    # `fill` looks one tile ahead. There are no slots any more.
    push(kv, main, extra, False, slots, ring, pushed % RING, (pushed // RING) & 1, EXTRA, PREFETCH)


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
        _, first, last, _, _, start = cut_item(
            shape, work, item, start, lengths, extra_lengths, BALANCED
        )
        pairs = last - first
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
