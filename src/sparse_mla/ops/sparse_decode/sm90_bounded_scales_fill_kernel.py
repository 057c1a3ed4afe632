"""The part of the Hopper kernel for bounded scales that fetches K, and what its parts share.

Shared memory holds K unscaled, two tiles of [64 tokens, 512 dims] fp16 and their RoPE parts in
bf16. Two groups of four warps fill them, 32 tokens of each tile each, as those of the kernel for
V4's caches do (sm90_expand_fill_kernel): raw rows come by cp.async, 64 bytes at a time and three
steps ahead, across the border of tiles, to shared memory that their own threads alone read; from
there they go through registers and are stored expanded. What logits and P are scaled by is made
from the tokens' scales.

A program's 226 KB: Q's latent part 64 KB, K 144 KB (P lies in the RoPE parts), raw bytes 12 KB,
scales 3 KB. Q's RoPE part is in the consumers' registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate

from ..gluon_compat import async_load, barrier, reinterpret
from .sm90_many_heads_fill_kernel import W32, load_slots, row_words

# Units of a group's 32 tokens, [32, 16 words]: four lanes take 64 bytes of a row, so that their
# 16-byte stores to two rows of swizzled fp16 meet all banks.
UNIT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
ROWS = gl.constexpr(gl.SliceLayout(1, UNIT))
COLUMNS = gl.constexpr(gl.SliceLayout(0, UNIT))
RAW = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
RAW_SLOTS = gl.constexpr(3)
UNITS = gl.constexpr(8)
# Scales, one a lane, by the threads that have the row; and those of a tile's 64 tokens.
SCALES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))
ALL_SCALES = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0]))

# Rows of a stage of `tables`, columns of S by the thread that needs them (`by_thread`).
S0_OVER_S1 = gl.constexpr(0)
S1_OVER_S2 = gl.constexpr(1)
S2_OVER_S3 = gl.constexpr(2)
S3 = gl.constexpr(3)  # negative for an invalid token

# A program's unit is 2^-3 of (the power of two below) its first tile's largest scale; scales from
# 2^-9 to 2^8 units are in bounds. Weights are p * scale in fp16 with p up to 2^7, so below 2^15,
# and the lowest scale's lose bits (below 2^-14) only where p is below 2^-12 of the row's largest.
LOWEST_SCALE = gl.constexpr(2.0**-9)
HIGHEST_SCALE = gl.constexpr(2.0**8)


@aggregate
class Shared:
    """Shared memory and barriers. `full` and `free` barriers have one phase per pair of tiles."""

    q_left: gl.shared_memory_descriptor  # [1, 64, 256] fp16
    q_right: gl.shared_memory_descriptor  # [1, 64, 256]
    k_left: gl.shared_memory_descriptor  # [2, 64, 256] fp16, one tile each
    k_right: gl.shared_memory_descriptor  # [2, 64, 256]
    k_rope: gl.shared_memory_descriptor  # [2, 64, 64] bf16; then the tile's P
    tables: gl.shared_memory_descriptor  # [2, 4, 4, 8, 2] float32
    weights: gl.shared_memory_descriptor  # [2, 4, 4, 8, 2] fp16: scales in units
    base: gl.shared_memory_descriptor  # [2, 64] float32, base of P after either tile
    sums: gl.shared_memory_descriptor  # [4, 64] float32: what the consumers tell each other
    unit: gl.shared_memory_descriptor  # [64] float32, all alike
    left_full: gl.shared_memory_descriptor  # [2, 1] k_left, tables and weights are there
    right_full: gl.shared_memory_descriptor  # [2, 1] k_right and k_rope are there
    left_free: gl.shared_memory_descriptor  # [2, 1]
    right_free: gl.shared_memory_descriptor  # [2, 1]
    p_full: gl.shared_memory_descriptor  # [2, 1] P and base of either tile are there
    q_met: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    sums_full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.q_left,
            self.q_right,
            self.k_left,
            self.k_right,
            self.k_rope,
            self.tables,
            self.weights,
            self.base,
            self.sums,
            self.unit,
            self.left_full,
            self.right_full,
            self.left_free,
            self.right_free,
            self.p_full,
            self.q_met,
            self.q_full,
            self.sums_full,
        ) = fields


@gluon.jit
def pair_count(limit):
    """Pairs of tiles of a list of `limit` entries; a list without entries is one, all masked."""
    return gl.maximum((limit + 127) // 128, 1)


@gluon.jit
def is_there(rows):
    return rows.to(gl.int64) != 0


@gluon.jit
def locate(kv, slots, page_size, page_words, TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr):
    """Pointers to the slots' rows, null if not valid."""
    words = row_words(gl.maximum(slots, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    rows = kv + words
    return gl.where(slots >= 0, rows, gl.zeros_like(words).to(rows.dtype))


@gluon.jit
def copy_words(rows, FIRST: gl.constexpr, COUNT: gl.constexpr, target):
    """Copy words [FIRST, FIRST + COUNT) of each row to target [32, COUNT]; zeros if not there."""
    columns = gl.arange(0, COUNT, layout=COLUMNS)
    at = rows[:, None] + (columns + FIRST)[None, :]
    at = gl.max_contiguous(gl.multiple_of(at, [1, 16]), [1, 4])
    async_load(target, at, mask=is_there(rows)[:, None])
    async_copy.commit_group()


@gluon.jit
def expand(raw):
    """e4m3 words [32, 16] as words of fp16, [32, 32]."""
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 lo, hi;
        mov.b32 {lo, hi}, $2;
        cvt.rn.f16x2.e4m3x2 $0, lo;
        cvt.rn.f16x2.e4m3x2 $1, hi;
        }""",
        "=&r,=r,r",
        [raw],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.join(low, high).reshape([32, 32])


@gluon.jit
def load_scales(rows, FIRST: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows' scales, float32 [n, 4], of group (i + FIRST) % 4 in column i; 0 if not there."""
    rows = gl.convert_layout(rows, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    group = (gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT)) + FIRST) & 3
    at = rows[:, None] + (128 + group)[None, :]
    bits = gl.load(at, mask=is_there(rows)[:, None], other=0)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def unit_of(scale):
    """2^-3 of the power of two below the largest scale, within 2^+-63, and 1 / it."""
    exponent = gl.max(gl.max((scale.to(gl.int32, bitcast=True) >> 23) & 0xFF, 1), 0)
    exponent = gl.where(exponent == 0, 127, gl.minimum(gl.maximum(exponent, 67), 187)) - 3
    unit = (exponent << 23).to(gl.float32, bitcast=True)
    return unit, ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def store_tables(
    rows, scale, following, unit, inverse_unit, dither, shared, stage, PART: gl.constexpr
):
    """What logits and P are scaled by, for 32 tokens; 1 where a scale is out of bounds, else 0.

    Args:
        scale, following: [32, 4], the groups' scales and those of the group after each.
        dither: of 2^13, added before the lower 13 bits are cut off for fp16, different for each
            token: scales of one mantissa would all round the same way, up to 2.4e-4 of gain error.
    """
    there = gl.convert_layout(is_there(rows), gl.SliceLayout(1, SCALES), assert_trivial=True)
    there, scale = gl.broadcast(there[:, None], scale)
    scale = gl.where(there, scale, unit)
    following = gl.where(there, following, unit)
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, SCALES))[None, :]
    values = gl.where(group < 3, scale / following, gl.where(there, scale, -scale))
    target = shared.tables.index(stage).slice(PART * 4, 4, dim=2)
    target.store(values.reshape([4, 4, 2, 4]).permute((3, 1, 0, 2)))
    scale = scale * inverse_unit
    bits = (scale.to(gl.int32, bitcast=True) + dither) & -8192
    weights = bits.to(gl.float32, bitcast=True).to(gl.float16)
    target = shared.weights.index(stage).slice(PART * 4, 4, dim=2)
    target.store(weights.reshape([4, 4, 2, 4]).permute((3, 1, 0, 2)))
    return gl.where((scale >= LOWEST_SCALE) & (scale < HIGHEST_SCALE), 0, 1)


@gluon.jit
def following_slot(slot):
    return gl.where(slot == RAW_SLOTS - 1, 0, slot + 1)


@gluon.jit
def fill(
    kv, line, limit, last_slot, page_size, page_words, wild_ptr, raw, shared,
    TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Expand 32 tokens of every tile: tokens 32 PART to 32 PART + 31.

    Two tiles ahead a tile's slots are loaded, one ahead its scales, and three steps (of eight)
    ahead the rows are copied. To ask L2 for rows a tile ahead costs more than it brings: 121 us
    instead of 118.

    wild_ptr: [2] int32; element PART becomes 1 if a scale is out of bounds, else 0.
    """
    tiles = 2 * pair_count(limit)
    token = PART * 32 + gl.arange(0, 32, layout=ROWS)
    slots = load_slots(line, token, limit, last_slot)
    all_tokens = gl.arange(0, 64, layout=gl.SliceLayout(1, ALL_SCALES))
    all_slots = load_slots(line, all_tokens, limit, last_slot)
    next_slots = load_slots(line, 64 + token, limit, last_slot)
    rows = locate(kv, slots, page_size, page_words, TOKEN_WORDS, PACKED)
    for step in gl.static_range(RAW_SLOTS):
        copy_words(rows, 16 * step, 16, raw.index(step))
    scale = load_scales(rows, 0, SCALES)
    following = load_scales(rows, 1, SCALES)
    all_rows = locate(kv, all_slots, page_size, page_words, TOKEN_WORDS, PACKED)
    unit, inverse_unit = unit_of(load_scales(all_rows, 0, ALL_SCALES))
    if PART == 0:
        units = gl.full([64], unit, gl.float32, layout=gl.SliceLayout(1, ALL_SCALES))
        shared.unit.store(units)
    dither = gl.convert_layout(token, gl.SliceLayout(1, SCALES), assert_trivial=True)
    dither = ((dither * 37) & 63)[:, None] * 128 + 64
    lefts = reinterpret(shared.k_left, gl.int32, [2, 64, 128], W32)
    rights = reinterpret(shared.k_right, gl.int32, [2, 64, 128], W32)
    ropes = reinterpret(shared.k_rope, gl.int32, [2, 64, 32], W32)
    wild = gl.full([32, 4], 0, gl.int32, layout=SCALES)
    slot = 0
    for tile in range(tiles):
        stage = tile & 1
        phase = ((tile >> 1) & 1) ^ 1
        left = lefts.index(stage).slice(32 * PART, 32, dim=0)
        right = rights.index(stage).slice(32 * PART, 32, dim=0)
        mbarrier.wait(shared.left_free.index(stage), phase)
        mbarrier.wait(shared.right_free.index(stage), phase)
        copy_words(rows, 132, 32, ropes.index(stage).slice(32 * PART, 32, dim=0))
        next_rows = rows
        next_scale = scale
        next_following = following
        for step in gl.static_range(UNITS):
            # Three steps' copies may go on but the oldest, and at first those of the RoPE part.
            async_copy.wait_group(3 if step < 3 else 2)
            codes = raw.index(slot).load(UNIT)
            if step + RAW_SLOTS < UNITS:
                copy_words(rows, 16 * (step + RAW_SLOTS), 16, raw.index(slot))
            else:
                copy_words(next_rows, 16 * (step + RAW_SLOTS - UNITS), 16, raw.index(slot))
            slot = following_slot(slot)
            if step == 0:
                # Behind the first copies: before them it costs 4 us.
                next_rows = locate(kv, next_slots, page_size, page_words, TOKEN_WORDS, PACKED)
                next_scale = load_scales(next_rows, 0, SCALES)
                next_following = load_scales(next_rows, 1, SCALES)
                next_slots = load_slots(line, (tile + 2) * 64 + token, limit, last_slot)
                wild |= store_tables(
                    rows, scale, following, unit, inverse_unit, dither, shared, stage, PART
                )
            target = left if step < 4 else right
            target.slice(32 * (step % 4), 32, dim=1).store(expand(codes))
            if step == 3:
                fence_async_shared()
                barrier()
                mbarrier.arrive(shared.left_full.index(stage), count=1)
        fence_async_shared()
        barrier()
        mbarrier.arrive(shared.right_full.index(stage), count=1)
        rows = next_rows
        scale = next_scale
        following = next_following
    async_copy.wait_group(0)
    gl.store(wild_ptr + PART, gl.max(gl.max(wild, 1), 0))
