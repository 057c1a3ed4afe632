"""The part of the Hopper kernel for bounded scales that fetches K, and what its parts share.

Shared memory holds K unscaled, as half tiles, [64 tokens, 256 dims] fp16, in three slots: the left
and the right half of a tile, and the left half of the next. Two warpgroups fill them, 32 tokens of
each tile each: raw rows land by cp.async in a buffer of one tile; a half is expanded as soon as its
slot is free, and the copy of the next tile's half starts in its place. Rows go through registers
nowhere: loads in flight need lines of L1, for which shared memory leaves no room. The order of dims
inside a group is permuted (`chunk_dims`) so that 16 raw bytes become two 16-byte chunks in
different swizzled panels, without bank conflicts.

A program's 226 KB: Q 72 KB, K 96 KB, raw rows 32 KB, K's RoPE part 8 KB, P 8 KB, scales, vectors.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..gluon_compat import barrier, reinterpret
from .sm90_many_heads_fill_kernel import FLAT as RAW_ROWS
from .sm90_many_heads_fill_kernel import (
    RAW,
    VECTOR,
    W32,
    gather,
    load_slots,
    row_words,
    tile_count,
)

FLAT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))

# Barriers, in one allocation; FULL and FREE have one for each slot of K.
FULL = gl.constexpr(0)
FREE = gl.constexpr(3)
P_FULL = gl.constexpr(6)
P_FREE = gl.constexpr(7)
Q_MET = gl.constexpr(8)
Q_FULL = gl.constexpr(9)
ROPE_FREE = gl.constexpr(10)
LAST_FULL = gl.constexpr(11)
BARRIERS = gl.constexpr(12)

# `latent`: two halves of Q, three slots for halves of K, and the raw bytes of a tile. `small`: the
# RoPE parts of Q and of K, and P.
K_SLOTS = gl.constexpr(2)
Q_ROPE = gl.constexpr(0)
K_ROPE = gl.constexpr(1)
P = gl.constexpr(2)

# Rows of `vectors`: the factor of a tile's rescaling; the bias of two tiles, fp16, +inf or -inf;
# the slots of the tile that is gathered, int32; the scales' unit.
DECAY = gl.constexpr(0)
BIAS = gl.constexpr(1)
SLOT = gl.constexpr(2)
UNIT = gl.constexpr(3)
VECTORS = gl.constexpr(4)

# Rows of a stage of `ratios`, columns of S by the thread that needs them (`column_scales`).
C0_OVER_C2 = gl.constexpr(0)
C1_OVER_C3 = gl.constexpr(1)
C2 = gl.constexpr(2)
C3 = gl.constexpr(3)
BY_THREAD = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
ROW_BY_THREAD = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))

# A program's unit is 2^-10 of (the power of two below) its first tile's largest scale; scales from
# 2^-2 to 2^15 units are in bounds. Weights are p * scale in fp16 with p up to 1, so at most 2^15,
# and the lowest scale's lose bits (below 2^-14) only where p is below 2^-12 of the row's largest.
LOWEST_SCALE = gl.constexpr(2.0**-2)
HIGHEST_SCALE = gl.constexpr(2.0**15)

# 32-bit words of half a row, [32 tokens, 64 words]. Gather: 16 lanes copy 256 contiguous bytes.
GATHER = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [2, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 64],
    )
)
# The RoPE part, [32 tokens, 32 words].
GATHER_ROPE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 32],
    )
)
# Conversion: 8 lanes take the 128 bytes of one token's group.
EXPAND = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 32], [16, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]],
        warp_bases=[[4, 0], [8, 0]],
        block_bases=[],
        shape=[32, 64],
    )
)
# Scales, one a thread, and those of both warpgroups' tokens.
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[32, 4],
    )
)
ALL_SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[32, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)


@gluon.jit
def expand(raw, tile, PART: gl.constexpr):
    """e4m3 words [32, 64] of two groups to fp16, stored into 32 rows of a [64, 256] tile."""
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
    words = gl.join(low, high).reshape([32, 2, 8, 2, 2, 2]).permute((0, 1, 3, 2, 4, 5))
    rows = reinterpret(tile, gl.int32, [64, 128], W32).slice(PART * 32, 32, dim=0)
    rows.store(words.reshape([32, 128]))


@gluon.jit
def load_scales(
    kv, slot, page_size, page_words, none, LAYOUT: gl.constexpr, TOKEN_WORDS: gl.constexpr,
    PACKED: gl.constexpr, TWIST: gl.constexpr = 0,
):  # fmt: skip
    """The rows' scales of group g ^ TWIST, [rows, 4] float32; `none` where invalid."""
    words = row_words(gl.maximum(slot, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT)) ^ TWIST
    valid = (slot >= 0)[:, None]
    bits = gl.load(kv + (words[:, None] + (128 + group)[None, :]), mask=valid, other=0)
    return gl.where(valid, bits.to(gl.float32, bitcast=True), none)


@gluon.jit
def load_first_scale(
    kv, slot, page_size, page_words, none, TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr
):
    """The rows' scales of group 0, [rows] float32; `none` where invalid."""
    words = row_words(gl.maximum(slot, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    bits = gl.load(kv + words + 128, mask=slot >= 0, other=0)
    return gl.where(slot >= 0, bits.to(gl.float32, bitcast=True), none)


@gluon.jit
def load_tile_scales(
    kv, slot, page_size, page_words, none, TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr
):
    """What `store_scales` wants: the scales, those of the groups two on, those of group 0."""
    scale = load_scales(kv, slot, page_size, page_words, none, SCALES, TOKEN_WORDS, PACKED)
    partner = load_scales(
        kv, slot, page_size, page_words, none, SCALES, TOKEN_WORDS, PACKED, TWIST=2
    )
    first = load_first_scale(kv, slot, page_size, page_words, none, TOKEN_WORDS, PACKED)
    return scale, partner, first


@gluon.jit
def unit_of(scale):
    """2^-10 of the power of two below the largest scale, 2^-70 to 2^50, and 1 / it, as bits."""
    exponent = gl.max(gl.max((scale.to(gl.int32, bitcast=True) >> 23) & 0xFF, 1), 0)
    exponent = gl.where(exponent == 0, 127, gl.minimum(gl.maximum(exponent, 67), 187)) - 10
    return exponent << 23, (254 - exponent) << 23


@gluon.jit
def store_scales(
    scale, partner, first, inverse_unit, dither, ratios, inverses, weights, stage,
    PART: gl.constexpr,
):  # fmt: skip
    """What logits and P are scaled by, for 32 tokens; 1 where a scale is out of bounds, else 0.

    Args:
        dither: of 2^13, added before the lower 13 bits are cut off for fp16, different for each
            token: scales of one mantissa would all round the same way, up to 2.4e-4 of gain error.
        ratios: [2, 4, 4, 8, 2] float32; c0/c2, c1/c3, c2, c3, column 8 j + 2 l + e at [l, j, e].
        inverses: [2, 4, 8, 2] float32, 1/c0 likewise.
        weights: [2, 4, 64] fp16, the scales in units.
    """
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, SCALES))[None, :]
    group += gl.full([32, 4], 0, gl.int32, layout=SCALES)
    values = gl.where(group < 2, scale / partner, scale)
    target = ratios.index(stage).slice(PART * 4, 4, dim=2)
    target.store(values.reshape([4, 4, 2, 4]).permute((3, 1, 0, 2)))
    target = inverses.index(stage).slice(PART * 4, 4, dim=1)
    target.store((1.0 / first).reshape([4, 4, 2]).permute((1, 0, 2)))
    scale = scale * inverse_unit
    bounded = (scale >= LOWEST_SCALE) & (scale < HIGHEST_SCALE)
    bits = (scale.to(gl.int32, bitcast=True) + dither) & -8192
    target = weights.index(stage).slice(PART * 32, 32, dim=1).permute((1, 0))
    target.store(bits.to(gl.float32, bitcast=True).to(gl.float16))
    return gl.where(bounded, 0, 1)


@gluon.jit
def store_bias(slot, biases, stage, PART: gl.constexpr):
    """+inf for valid tokens, -inf for the others."""
    bias = gl.where(slot >= 0, float("inf"), float("-inf")).to(gl.float16)
    biases.index(stage).slice(PART * 32, 32).store(bias)


@gluon.jit
def fill(
    kv, line, limit, last_slot, page_size, page_words, wild_ptr,
    latent, small, ratios, inverses, weights, vectors, bars,
    TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Fetch 32 tokens of every tile: tokens 32 PART to 32 PART + 31.

    wild_ptr: [2] int32; element PART becomes 1 if a scale is out of bounds, else 0.
    """
    tiles = tile_count(limit)
    row = PART * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, SCALES))
    all_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ALL_SCALES))
    all_slots = load_slots(line, all_rows, limit, last_slot)
    slot = load_slots(line, row, limit, last_slot)
    slots = reinterpret(vectors.index(SLOT), gl.int32, [64], VECTOR).slice(PART * 32, 32)
    biases = reinterpret(vectors.index(BIAS), gl.float16, [2, 64], VECTOR)
    raw = reinterpret(latent.index(RAW), gl.int32, [4, 32, 64], RAW_ROWS)
    raw_left = raw.index(PART)
    raw_right = raw.index(2 + PART)
    k_rope = reinterpret(small.index(K_ROPE), gl.int32, [64, 32], W32).slice(PART * 32, 32, dim=0)
    slots.store(slot)
    gather(kv, slots, page_size, page_words, raw_left, 0, GATHER, TOKEN_WORDS, PACKED)
    async_copy.commit_group()
    store_bias(slot, biases, 0, PART)
    gather(kv, slots, page_size, page_words, k_rope, 132, GATHER_ROPE, TOKEN_WORDS, PACKED)
    async_copy.commit_group()
    gather(kv, slots, page_size, page_words, raw_right, 64, GATHER, TOKEN_WORDS, PACKED)
    async_copy.commit_group()
    scale = load_scales(kv, all_slots, page_size, page_words, 0.0, ALL_SCALES, TOKEN_WORDS, PACKED)
    unit, inverse_unit = unit_of(scale)
    unit = unit.to(gl.float32, bitcast=True)
    inverse_unit = inverse_unit.to(gl.float32, bitcast=True)
    if PART == 0:
        units = gl.full([64], unit, gl.float32, layout=gl.SliceLayout(1, ALL_SCALES))
        vectors.index(UNIT).store(units)
    dither = ((row * 37) & 63)[:, None] * 128 + 64
    scale, partner, first = load_tile_scales(
        kv, slot, page_size, page_words, unit, TOKEN_WORDS, PACKED
    )
    wild = store_scales(
        scale, partner, first, inverse_unit, dither, ratios, inverses, weights, 0, PART
    )
    slot = load_slots(line, 64 + row, limit, last_slot)
    for i in range(tiles):
        left = 2 * i
        async_copy.wait_group(1)
        mbarrier.wait(bars.index(FREE + left % 3), ((left // 3) & 1) ^ 1)
        barrier()
        scale, partner, first = load_tile_scales(
            kv, slot, page_size, page_words, unit, TOKEN_WORDS, PACKED
        )
        later = load_slots(line, (i + 2) * 64 + row, limit, last_slot)
        slots.store(slot)
        expand(raw_left.load(EXPAND), latent.index(K_SLOTS + left % 3), PART)
        fence_async_shared()
        barrier()
        mbarrier.arrive(bars.index(FULL + left % 3), count=1)
        gather(kv, slots, page_size, page_words, raw_left, 0, GATHER, TOKEN_WORDS, PACKED)
        async_copy.commit_group()

        right = left + 1
        async_copy.wait_group(1)
        mbarrier.wait(bars.index(FREE + right % 3), ((right // 3) & 1) ^ 1)
        barrier()
        expand(raw_right.load(EXPAND), latent.index(K_SLOTS + right % 3), PART)
        fence_async_shared()
        barrier()
        mbarrier.arrive(bars.index(FULL + right % 3), count=1)
        # The scales' place is free once both halves of the tile before have been used.
        before = (left + 2) % 3
        mbarrier.wait(bars.index(FREE + before), ((left + 2) // 3 & 1) ^ 1)
        wild |= store_scales(
            scale, partner, first, inverse_unit, dither, ratios, inverses, weights, (i + 1) & 1,
            PART,
        )  # fmt: skip
        mbarrier.wait(bars.index(ROPE_FREE), i & 1)
        store_bias(slot, biases, (i + 1) & 1, PART)
        gather(kv, slots, page_size, page_words, k_rope, 132, GATHER_ROPE, TOKEN_WORDS, PACKED)
        async_copy.commit_group()
        gather(kv, slots, page_size, page_words, raw_right, 64, GATHER, TOKEN_WORDS, PACKED)
        async_copy.commit_group()
        slot = later
    async_copy.wait_group(0)
    gl.store(wild_ptr + PART, gl.max(gl.max(wild, 1), 0))
