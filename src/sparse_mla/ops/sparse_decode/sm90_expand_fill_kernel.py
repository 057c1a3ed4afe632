"""The part of the Hopper kernel for expanded caches that fetches K: `fill`, in two groups of warps.

A value of these layouts, e4m3 times a power of two, is a bf16 number: K in shared memory is exact.
Each group (four warps) takes half of the tokens of every tile. It turns slots into addresses, asks
the rows into L2 and copies raw bytes by cp.async, 128 dims (a step, two units) of its tokens at a
time and two steps ahead, across the borders of tiles and items, to shared memory that its threads
alone read; from there they go through registers and are stored expanded. Consumers copy Q.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate

from ..gluon_compat import async_load, barrier, reinterpret
from ..sm90_pairs_kernel import INF, TILE
from .sm90_expand_plan_kernel import entries, pair_count

# Units of a group's 32 tokens, [32, 16 words], or two of them: four lanes take 64 bytes of a row,
# so that their 16-byte stores to two rows of swizzled bf16 meet all banks.
UNIT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
ROWS = gl.constexpr(gl.SliceLayout(1, UNIT))
COLUMNS = gl.constexpr(gl.SliceLayout(0, UNIT))
# Raw units: of two rows next to each other one has its halves exchanged, so that they also meet all
# banks.
RAW = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 2, [1, 0]))
# The two words of a row's scales, by the same threads.
SCALES = gl.constexpr(gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0]))
# `prefetch`: one address a lane.
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))

# v4_fp8: seven units of e4m3, then one of bf16.
UNITS = gl.constexpr(7)
ROW_WORDS = gl.constexpr(144)
FOOTER_WORDS = gl.constexpr(2)
# A group of four warps expands half of the tokens of each tile, two units at a time.
HALF_TILE = gl.constexpr(32)


@aggregate
class Pages:
    """A cache and its lists; strides count 32-bit words."""

    start: gl.tensor  # pointer to int32, its first row; aligned to 16 bytes
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
def is_there(rows):
    return rows.to(gl.int64) != 0


@gluon.jit
def copy_words(rows, FIRST: gl.constexpr, COUNT: gl.constexpr, target):
    """Copy words [FIRST, FIRST + COUNT) of each row to target [32, 32]; zeros for all else."""
    columns = gl.arange(0, 32, layout=COLUMNS)
    at = rows[:, None] + (columns + FIRST)[None, :]
    at = gl.max_contiguous(gl.multiple_of(at, [1, 16]), [1, 4])
    mask = is_there(rows)[:, None]
    if COUNT < 32:
        mask = mask & (columns < COUNT)[None, :]
    async_load(target, at, mask=mask)
    async_copy.commit_group()


@gluon.jit
def request(rows, raw, STEP: gl.constexpr):
    """Copy the units of a step, two but in the last one, to its place."""
    copy_words(rows, 32 * STEP, 32 if STEP < 3 else 16, raw.index(STEP % 2))


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
    """e4m3 words times a pair of bf16 each, as words of bf16 [..., 2]."""
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
    return gl.join(low, high)


@gluon.jit
def expand_units(codes, target, scales, STEP: gl.constexpr):
    """Expand the units of a step to their columns of target, words [32, 128]."""
    codes = gl.reshape(codes, [HALF_TILE, 2, 16])
    if STEP < 3:
        pair = gl.join(scale_pair(scales, 2 * STEP % 4), scale_pair(scales, 2 * STEP % 4 + 1))
        by_unit: gl.constexpr = gl.SliceLayout(2, codes.type.layout)
        pair = gl.convert_layout(pair, by_unit, assert_trivial=True)
        codes, pair = gl.broadcast(codes, gl.expand_dims(pair, 2))
        words = gl.reshape(expand(codes, pair), [HALF_TILE, 64])
        # One store: between two Triton would have the warps meet.
        target.slice(64 * (STEP % 2), 64, dim=1).store(words)
    else:
        codes, _ = gl.split(gl.permute(codes, (0, 2, 1)))
        codes = gl.convert_layout(codes, UNIT, assert_trivial=True)
        codes, scale = gl.broadcast(codes, gl.expand_dims(scale_pair(scales, 2), 1))
        words = gl.reshape(expand(codes, scale), [HALF_TILE, 32])
        target.slice(64, 32, dim=1).store(words)


@aggregate
class Cursor:
    """A tile of a program's work: of item number `item`, whose tiles end before `last`."""

    item: gl.tensor
    tile: gl.tensor
    last: gl.tensor
    start: gl.tensor  # the unit where the next item starts, see Work
    # Pointers to the item's lists: worked out for each tile they leave ptxas too few uniform
    # registers (b=148, 128 heads: 253 us instead of 227).
    line: gl.tensor
    extra_line: gl.tensor
    entries: gl.tensor
    extra_entries: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.item,
            self.tile,
            self.last,
            self.start,
            self.line,
            self.extra_line,
            self.entries,
            self.extra_entries,
        ) = fields


@gluon.jit
def cursor_at(
    shape, work, main, extra, item, start, lengths, extra_lengths, PLAN: gl.constexpr
):  # fmt: skip
    """The first tile of an item; beyond the last one that of the last."""
    known = gl.minimum(item, gl.maximum(work.end, 1) - 1)
    which = work.item(shape, known, PLAN)
    b = shape.sequence(which)
    limit = entries(shape.topk, lengths, b)
    extra_limit = entries(shape.extra_topk, extra_lengths, b)
    pairs = pair_count(limit, extra_limit)
    first, last, _ = work.cut(shape, known, start, pairs, PLAN)
    s = shape.token(which) % shape.s_q
    line = main.line(b, s)
    extra_line = extra.line(b, s)
    start += pairs + 1
    return Cursor(item, 2 * first, 2 * last, start, line, extra_line, limit, extra_limit)


@gluon.jit
def first_cursor(shape, work, main, extra, lengths, extra_lengths, PLAN: gl.constexpr):
    item = work.begin
    return cursor_at(shape, work, main, extra, item, work.start, lengths, extra_lengths, PLAN)


@gluon.jit
def advance(shape, work, main, extra, cursor, lengths, extra_lengths, PLAN: gl.constexpr):
    """The next tile, if need be of the next item."""
    item = cursor.item
    tile = cursor.tile + 1
    last = cursor.last
    start = cursor.start
    line = cursor.line
    extra_line = cursor.extra_line
    limit = cursor.entries
    extra_limit = cursor.extra_entries
    if tile >= last:
        item += work.step
        fresh = cursor_at(
            shape, work, main, extra, item, start, lengths, extra_lengths, PLAN
        )  # fmt: skip
        item = fresh.item
        tile = fresh.tile
        last = fresh.last
        start = fresh.start
        line = fresh.line
        extra_line = fresh.extra_line
        limit = fresh.entries
        extra_limit = fresh.extra_entries
    return Cursor(item, tile, last, start, line, extra_line, limit, extra_limit)


@gluon.jit
def load_slots(work, cursor, PART: gl.constexpr, EXTRA: gl.constexpr):
    """A half tile's entries of the lists, [32], -1 past the end; whether they are of the extra."""
    line = cursor.line
    limit = cursor.entries
    tile = cursor.tile
    main_tiles = (limit + (TILE - 1)) // TILE
    in_extra = tile >= main_tiles
    if EXTRA:
        tile -= gl.where(in_extra, main_tiles, 0)
        line = gl.where(in_extra, cursor.extra_line, line)
        limit = gl.where(in_extra, cursor.extra_entries, limit)
    limit = gl.where(cursor.item < work.end, limit, 0)
    entry = tile * TILE + HALF_TILE * PART + gl.arange(0, HALF_TILE, layout=ROWS)
    return gl.load(line + entry, mask=entry < limit, other=-1), in_extra


@gluon.jit
def locate(main, extra, in_extra, slots, EXTRA: gl.constexpr):
    """Pointers to the slots' rows, null if not valid, and to their scales, [32]."""
    start = main.start
    page_words = main.page_words
    page_size = main.page_size
    magic = main.page_magic
    shift = main.page_shift
    last_slot = main.last_slot
    if EXTRA:
        start = gl.where(in_extra, extra.start, start)
        page_words = gl.where(in_extra, extra.page_words, page_words)
        page_size = gl.where(in_extra, extra.page_size, page_size)
        magic = gl.where(in_extra, extra.page_magic, magic)
        shift = gl.where(in_extra, extra.page_shift, shift)
        last_slot = gl.where(in_extra, extra.last_slot, last_slot)
    ok = (slots >= 0) & (slots <= last_slot)
    slots = gl.where(ok, slots, 0)
    twice = (slots * 2).to(gl.uint32)
    page = (gl.umulhi(twice, magic.to(gl.uint32)) >> shift.to(gl.uint32)).to(gl.int32)
    offset = slots - page * page_size
    at = page.to(gl.int64) * page_words
    footers = page_size.to(gl.int64) * ROW_WORDS + offset.to(gl.int64) * FOOTER_WORDS
    rows = start + (at + offset.to(gl.int64) * ROW_WORDS)
    none = gl.zeros([HALF_TILE], gl.int64, layout=ROWS).to(rows.dtype)
    return gl.where(ok, rows, none), start + (at + footers)


@gluon.jit
def load_scales(rows, footers):
    """Both words of each row's scales, int32 [32] each."""
    footers = gl.convert_layout(footers, gl.SliceLayout(1, SCALES), assert_trivial=True)
    ok = gl.convert_layout(is_there(rows), gl.SliceLayout(1, SCALES), assert_trivial=True)
    at = gl.expand_dims(footers, 1) + gl.arange(0, 2, layout=gl.SliceLayout(0, SCALES))[None, :]
    at = gl.max_contiguous(gl.multiple_of(at, [1, 8]), [1, 2])
    low, high = gl.split(gl.load(at, mask=gl.expand_dims(ok, 1), other=0))
    return (
        gl.convert_layout(low, ROWS, assert_trivial=True),
        gl.convert_layout(high, ROWS, assert_trivial=True),
    )


@gluon.jit
def prefetch(rows, FIRST: gl.constexpr):
    """Ask L2 for the lines of 128 bytes of each row [32] from line FIRST on, of five."""
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, LINES))[None, :]
    row = gl.convert_layout(rows.to(gl.int64), gl.SliceLayout(1, LINES), assert_trivial=True)
    row, lane = gl.broadcast(gl.expand_dims(row, 1), lane + FIRST)
    gl.inline_asm_elementwise(
        """{
        .reg .pred valid, last;
        .reg .b32 line;
        .reg .u64 at;
        setp.ne.s64 valid, $1, 0;
        selp.b32 line, $2, 8, valid;
        mad.wide.u32 at, $2, 128, $1;
        setp.lt.s32 valid, line, 5;
        @valid prefetch.global.L2 [at];
        setp.eq.s32 last, line, 0;
        @last prefetch.global.L2 [at + 512];
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [row, lane],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fill(
    shape, work, shared, raw, main, extra, lengths, extra_lengths,
    EXTRA: gl.constexpr, PLAN: gl.constexpr, PREFETCH: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Expand half of the tokens of every tile.

    Two tiles ahead a tile's slots are loaded, one ahead its rows are asked into L2 and its scales
    loaded, two steps (of four) ahead the rows are copied; also across the items' border.
    """
    cursor = first_cursor(shape, work, main, extra, lengths, extra_lengths, PLAN)
    now = work.begin < work.end
    slots, in_extra = load_slots(work, cursor, PART, EXTRA)
    cursor = advance(shape, work, main, extra, cursor, lengths, extra_lengths, PLAN)
    next_slots, next_in_extra = load_slots(work, cursor, PART, EXTRA)
    rows, footers = locate(main, extra, in_extra, slots, EXTRA)
    slots = next_slots
    in_extra = next_in_extra
    request(rows, raw, 0)
    request(rows, raw, 1)
    if PREFETCH:
        prefetch(rows, 2)
    low, high = load_scales(rows, footers)
    lefts = reinterpret(shared.k_left, gl.int32, [2, TILE, 128], WORDS)
    rights = reinterpret(shared.k_right, gl.int32, [2, TILE, 128], WORDS)
    done = 0
    while now:
        stage = done & 1
        phase = ((done >> 1) & 1) ^ 1
        left = lefts.index(stage).slice(HALF_TILE * PART, HALF_TILE, dim=0)
        right = rights.index(stage).slice(HALF_TILE * PART, HALF_TILE, dim=0)
        mbarrier.wait(shared.left_free.index(stage), phase)
        mbarrier.wait(shared.right_free.index(stage), phase)
        bias = shared.bias.index(stage).slice(HALF_TILE * PART, HALF_TILE, dim=0)
        bias.store(gl.where(is_there(rows), 0.0, -INF))
        copy_words(rows, 16 * UNITS, 32, right.slice(96, 32, dim=1))

        # Two steps' copies may go on, and at first those of the bf16 unit.
        async_copy.wait_group(2)
        codes = raw.index(0).load(UNIT)
        request(rows, raw, 2)
        next_rows, footers = locate(main, extra, in_extra, slots, EXTRA)
        next_low, next_high = load_scales(next_rows, footers)
        now = cursor.item < work.end
        cursor = advance(shape, work, main, extra, cursor, lengths, extra_lengths, PLAN)
        slots, in_extra = load_slots(work, cursor, PART, EXTRA)
        if PREFETCH:
            prefetch(next_rows, 0)
        expand_units(codes, left, low, 0)

        async_copy.wait_group(2)
        codes = raw.index(1).load(UNIT)
        request(rows, raw, 3)
        expand_units(codes, left, low, 1)
        fence_async_shared()
        barrier()
        mbarrier.arrive(shared.left_full.index(stage), count=1)

        async_copy.wait_group(1)
        codes = raw.index(0).load(UNIT)
        request(next_rows, raw, 0)
        expand_units(codes, right, high, 2)

        async_copy.wait_group(1)
        codes = raw.index(1).load(UNIT)
        request(next_rows, raw, 1)
        expand_units(codes, right, high, 3)
        fence_async_shared()
        barrier()
        mbarrier.arrive(shared.right_full.index(stage), count=1)
        rows = next_rows
        low = next_low
        high = next_high
        done += 1
    async_copy.wait_group(0)
