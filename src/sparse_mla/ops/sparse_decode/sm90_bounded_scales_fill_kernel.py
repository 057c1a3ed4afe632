"""The part of the Hopper kernel for bounded scales that fetches K, and what its parts share.

Shared memory holds K unscaled, as half tiles, [64 tokens, 256 dims] fp16, in three slots: the left
and the right half of a tile, and the left half of the next. Two warpgroups fill them, 32 tokens of
each tile each: raw rows land by cp.async in a buffer of one tile; a half is expanded as soon as its
slot is free, and the copy of the next tile's half starts in its place. Rows go through registers
nowhere: loads in flight need lines of L1, for which shared memory leaves no room. The order of dims
inside a group is permuted (`chunk_dims`) so that 16 raw bytes become two 16-byte chunks in
different swizzled panels, without bank conflicts.

A program's 232276 of 232448 bytes: Q 72 KB, K 96 KB, raw rows 32 KB, logits or P 16 KB, K's RoPE
part 8 KB, scales, vectors.
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
S_FULL = gl.constexpr(7)
Q_MET = gl.constexpr(8)
Q_READ = gl.constexpr(9)
ROPE_FREE = gl.constexpr(10)
LOGITS_DONE = gl.constexpr(11)
P_READ = gl.constexpr(12)
UNIT_FULL = gl.constexpr(13)
LAST_FULL = gl.constexpr(14)
BARRIERS = gl.constexpr(15)

# `latent`: two halves of Q, three slots for halves of K, and the raw bytes of a tile. `rope`: the
# RoPE parts of Q and K.
K_SLOTS = gl.constexpr(2)
Q_ROPE = gl.constexpr(0)
K_ROPE = gl.constexpr(1)

# Rows of `vectors`: the bias of two tiles, fp16, +inf or -inf; the slots of the tile that is
# gathered, int32.
BIAS = gl.constexpr(0)
SLOT = gl.constexpr(1)
VECTORS = gl.constexpr(2)

# A program's unit is 2^-3 of (the power of two below) its first tile's largest scale; scales from
# 2^-9 to 2^8 units are in bounds. Weights are p * scale in fp16 with p up to 2^7, so below 2^15,
# and the lowest scale's lose bits (below 2^-14) only where p is below 2^-12 of the row's largest.
LOWEST_SCALE = gl.constexpr(2.0**-9)
HIGHEST_SCALE = gl.constexpr(2.0**8)

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
    PACKED: gl.constexpr,
):  # fmt: skip
    """The rows' scales, [rows, 4] float32; `none` where invalid."""
    words = row_words(gl.maximum(slot, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    valid = (slot >= 0)[:, None]
    bits = gl.load(kv + (words[:, None] + (128 + group)[None, :]), mask=valid, other=0)
    return gl.where(valid, bits.to(gl.float32, bitcast=True), none)


@gluon.jit
def unit_of(scale):
    """2^-3 of the power of two below the largest scale, within 2^+-63, and 1 / it, float32 bits."""
    exponent = gl.max(gl.max((scale.to(gl.int32, bitcast=True) >> 23) & 0xFF, 1), 0)
    exponent = gl.where(exponent == 0, 127, gl.minimum(gl.maximum(exponent, 67), 187)) - 3
    return exponent << 23, (254 - exponent) << 23


@gluon.jit
def store_weights(scale, inverse_unit, dither, weights, stage, PART: gl.constexpr):
    """The scales in units as fp16, for P; returns 1 where one is out of bounds, else 0.

    dither: of 2^13, added before the lower 13 bits are cut off, different for each token: scales
    of one mantissa would all round the same way and leave a gain error of up to 2.4e-4.
    """
    scale = scale * inverse_unit
    bounded = (scale >= LOWEST_SCALE) & (scale < HIGHEST_SCALE)
    bits = (scale.to(gl.int32, bitcast=True) + dither) & -8192
    table = weights.index(stage).slice(PART * 32, 32, dim=1).permute((1, 0))
    table.store(bits.to(gl.float32, bitcast=True).to(gl.float16))
    return gl.where(bounded, 0, 1)


@gluon.jit
def prefetch_rows(kv, slot, page_size, page_words, TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr):
    """Ask L2 for the 656 bytes of the rows in `slot` [32, 4]; four threads share a row."""
    words = row_words(gl.maximum(slot, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    part = gl.arange(0, 4, layout=gl.SliceLayout(0, SCALES))[None, :]
    at = gl.where(slot >= 0, (kv + (words + part * 32)).to(gl.int64), -1)
    gl.inline_asm_elementwise(
        """{
        .reg .pred valid;
        setp.ge.s64 valid, $1, 0;
        @valid prefetch.global.L2 [$1];
        @valid prefetch.global.L2 [$1 + 256];
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [at],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def store_bias(slot, biases, stage, PART: gl.constexpr):
    """+inf for valid tokens, -inf for the others."""
    bias = gl.where(slot >= 0, float("inf"), float("-inf")).to(gl.float16)
    biases.index(stage).slice(PART * 32, 32).store(bias)


@gluon.jit
def fill(
    kv, line, limit, last_slot, page_size, page_words, wild_ptr,
    latent, rope, scales, weights, vectors, bars,
    TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr, AHEAD: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Fetch 32 tokens of every tile: tokens 32 PART to 32 PART + 31.

    wild_ptr: [2] int32; element PART becomes 1 if a scale is out of bounds, else 0.
    """
    tiles = tile_count(limit)
    row = PART * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, SCALES))
    rows = row[:, None] + gl.full([32, 4], 0, gl.int32, layout=SCALES)
    slot = load_slots(line, row, limit, last_slot)
    all_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ALL_SCALES))
    all_slots = load_slots(line, all_rows, limit, last_slot)
    for j in gl.static_range(1, AHEAD):
        later = load_slots(line, j * 64 + rows, limit, last_slot)
        prefetch_rows(kv, later, page_size, page_words, TOKEN_WORDS, PACKED)
    later = load_slots(line, AHEAD * 64 + rows, limit, last_slot)
    slots = reinterpret(vectors, gl.int32, [VECTORS, 64], VECTOR).index(SLOT)
    slots = slots.slice(PART * 32, 32)
    biases = reinterpret(vectors, gl.float16, [2 * VECTORS, 64], VECTOR)
    raw = reinterpret(latent.index(RAW), gl.int32, [4, 32, 64], RAW_ROWS)
    raw_left = raw.index(PART)
    raw_right = raw.index(2 + PART)
    k_rope = reinterpret(rope.index(K_ROPE), gl.int32, [64, 32], W32).slice(PART * 32, 32, dim=0)
    slots.store(slot)
    gather(kv, slots, page_size, page_words, raw_left, 0, GATHER, TOKEN_WORDS, PACKED)
    gather(kv, slots, page_size, page_words, k_rope, 132, GATHER_ROPE, TOKEN_WORDS, PACKED)
    async_copy.commit_group()
    gather(kv, slots, page_size, page_words, raw_right, 64, GATHER, TOKEN_WORDS, PACKED)
    async_copy.commit_group()
    store_bias(slot, biases, 0, PART)
    scale = load_scales(kv, all_slots, page_size, page_words, 0.0, ALL_SCALES, TOKEN_WORDS, PACKED)
    unit, inverse_unit = unit_of(scale)
    unit = unit.to(gl.float32, bitcast=True)
    inverse_unit = inverse_unit.to(gl.float32, bitcast=True)
    dither = ((row * 37) & 63)[:, None] * 128 + 64
    scale = load_scales(kv, slot, page_size, page_words, unit, SCALES, TOKEN_WORDS, PACKED)
    wild = gl.full([32, 4], 0, gl.int32, layout=SCALES)
    slot = load_slots(line, 64 + row, limit, last_slot)
    table = scales.slice(PART * 32, 32, dim=1).permute((1, 0))
    for i in range(tiles):
        stage = i & 1
        left = 2 * i
        async_copy.wait_group(1)
        mbarrier.wait(bars.index(FREE + left % 3), ((left // 3) & 1) ^ 1)
        barrier()
        slots.store(slot)
        expand(raw_left.load(EXPAND), latent.index(K_SLOTS + left % 3), PART)
        mbarrier.wait(bars.index(LOGITS_DONE), stage ^ 1)
        table.store(scale)
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
        wild = wild | store_weights(scale, inverse_unit, dither, weights, stage, PART)
        fence_async_shared()
        barrier()
        mbarrier.arrive(bars.index(FULL + right % 3), count=1)
        scale = load_scales(kv, slot, page_size, page_words, unit, SCALES, TOKEN_WORDS, PACKED)
        store_bias(slot, biases, stage ^ 1, PART)
        slot = load_slots(line, (i + 2) * 64 + row, limit, last_slot)
        mbarrier.wait(bars.index(ROPE_FREE), stage)
        gather(kv, slots, page_size, page_words, k_rope, 132, GATHER_ROPE, TOKEN_WORDS, PACKED)
        async_copy.commit_group()
        gather(kv, slots, page_size, page_words, raw_right, 64, GATHER, TOKEN_WORDS, PACKED)
        async_copy.commit_group()
        prefetch_rows(kv, later, page_size, page_words, TOKEN_WORDS, PACKED)
        later = load_slots(line, (i + 1 + AHEAD) * 64 + rows, limit, last_slot)
    async_copy.wait_group(0)
    if PART == 0:  # the unit takes the place of the last tile's scales
        mbarrier.wait(bars.index(LOGITS_DONE), (tiles - 1) & 1)
        units = gl.full([64], unit, gl.float32, layout=gl.SliceLayout(1, ALL_SCALES))
        reinterpret(scales, gl.float32, [4, 64], VECTOR).index(0).store(units)
        barrier()
        mbarrier.arrive(bars.index(UNIT_FULL), count=1)
    gl.store(wild_ptr + PART, gl.max(gl.max(wild, 1), 0))
