"""The part of the Hopper kernel for many heads that fetches K, and what its parts share.

Shared memory holds K as half tiles, [64 tokens, 256 dims] fp16, in three slots: the left and the
right half of a tile, and the left half of the next. Raw rows land by cp.async in a buffer of one
tile; `fill` expands a half as soon as its slot is free and starts the copy of the next tile's half
in its place. The order of dims inside a group is permuted (`chunk_dims`) so that 16 raw bytes
become two 16-byte chunks in different swizzled panels, without bank conflicts.

A program's 232440 of 232448 bytes: Q 72 KB, K 96 KB, raw rows 32 KB, P 16 KB, RoPE 8 KB, vectors.
Every buffer that a warpgroup captures costs 16 bytes more; hence few allocations.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..gluon_compat import async_load, barrier, reinterpret

F16 = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
W32 = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# Barriers, in one allocation; FULL and FREE have one for each slot of K.
FULL = gl.constexpr(0)
FREE = gl.constexpr(3)
ROPE_FREE = gl.constexpr(6)
P_FULL = gl.constexpr(7)
P_FREE = gl.constexpr(8)
Q_MET = gl.constexpr(9)
Q_FULL = gl.constexpr(10)
LAST_FULL = gl.constexpr(11)
BARRIERS = gl.constexpr(12)

# `latent`: two halves of Q, three slots for halves of K, and the raw bytes of a tile. `small`: the
# RoPE parts of Q and of K, and P in two.
K_SLOTS = gl.constexpr(2)
RAW = gl.constexpr(5)

# Rows of `vectors`: P's base; the bias of two tiles, fp16, +inf or -inf; the slots of the tile
# that is gathered, int32.
BASE = gl.constexpr(0)
BIAS = gl.constexpr(1)
SLOT = gl.constexpr(2)
VECTORS = gl.constexpr(3)

# 32-bit words of half a row, [64 tokens, 64 words]. Gather: 16 lanes copy 256 contiguous bytes.
GATHER = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [8, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
# The RoPE part, [64 tokens, 32 words], and the scales, [64 tokens, 4 words].
GATHER_ROPE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [2, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
GATHER_SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0]],
        lane_bases=[[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
# Slots, one a lane (twice), in the warp that gathers the row.
SLOTS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[1], [2], [4], [8], [0]],
        warp_bases=[[16], [32]],
        block_bases=[],
        shape=[64],
    )
)
# Conversion: 8 lanes take the 128 bytes of one token's group.
EXPAND = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 32], [16, 0], [32, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]],
        warp_bases=[[4, 0], [8, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
# Slots for the prefetch: two lanes a row, [64, 2].
SLOT_PAIRS = gl.constexpr(gl.BlockedLayout([1, 1], [16, 2], [4, 1], [1, 0]))


@gluon.jit
def chunk_dims(columns):
    """The latent dims in the columns of a [64, 256] tile of Q, K or the output.

    A group of 128 dims fills two panels of 64 columns: dims 16 j .. 16 j + 7 are chunk j of the
    first panel, dims 16 j + 8 .. 16 j + 15 chunk j of the second.
    """
    panel = (columns >> 6) & 1
    chunk = (columns >> 3) & 7
    dims = (columns >> 7) * 128 + chunk * 16 + panel * 8 + (columns & 7)
    return gl.max_contiguous(gl.multiple_of(dims, 8), 8)


@gluon.jit
def tile_count(limit):
    """Tiles of a list of `limit` entries; a list without entries is one tile, all masked."""
    return gl.maximum((limit + 63) // 64, 1)


@gluon.jit
def wait_half(bars, half):
    """Wait for half tile `half` (2 i is the left half of tile i) and return its slot."""
    mbarrier.wait(bars.index(FULL + half % 3), (half // 3) & 1)
    return half % 3


@gluon.jit
def free_half(bars, half):
    """The half tile has been read by the whole warpgroup."""
    barrier()
    mbarrier.arrive(bars.index(FREE + half % 3), count=1)


@gluon.jit
def row_words(slot, page_size, page_words, TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr):
    """Where a slot's row starts, in 32-bit words, int64; a multiple of 4."""
    if PACKED:
        return slot.to(gl.int64) * TOKEN_WORDS
    else:
        words = (slot // page_size).to(gl.int64) * page_words
        return words + (slot % page_size).to(gl.int64) * TOKEN_WORDS


@gluon.jit
def load_slots(line, entry, limit, last_slot):
    """The index list's entries, -1 where they are invalid or past its end."""
    slot = gl.load(line + entry, mask=entry < limit, other=-1)
    return gl.where(slot <= last_slot, gl.maximum(slot, -1), -1)


@gluon.jit
def expand(raw, tile):
    """e4m3 words [64, 64] of two groups to fp16, stored into a [64, 256] tile of K."""
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
    words = gl.join(low, high).reshape([64, 2, 8, 2, 2, 2]).permute((0, 1, 3, 2, 4, 5))
    reinterpret(tile, gl.int32, [64, 128], W32).store(words.reshape([64, 128]))


@gluon.jit
def gather(
    kv, slots, page_size, page_words, target, WORD: gl.constexpr, LAYOUT: gl.constexpr,
    TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Copy words WORD, WORD + 1, ... of each slot's row to `target` [64, n]; 0 where invalid."""
    row: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    slot = slots.load(row)
    words = row_words(gl.maximum(slot, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    column = gl.arange(0, target.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    at = gl.multiple_of(words, 4)[:, None] + (column + WORD)[None, :]
    async_load(target, kv + at, mask=(slot >= 0)[:, None])


@gluon.jit
def gather_small(
    kv, slot, slots, page_size, page_words, small, scales, vectors, stage,
    TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Copy the scales and the RoPE part of a tile and store its bias."""
    bias = reinterpret(vectors.index(BIAS), gl.float16, [2, 64], VECTOR).index(stage)
    bias.store(gl.where(slot >= 0, float("inf"), float("-inf")).to(gl.float16))
    table = reinterpret(scales, gl.int32, [2, 4, 64], FLAT).index(stage).permute((1, 0))
    gather(kv, slots, page_size, page_words, table, 128, GATHER_SCALES, TOKEN_WORDS, PACKED)
    table = reinterpret(small.index(1), gl.int32, [64, 32], W32)
    gather(kv, slots, page_size, page_words, table, 132, GATHER_ROPE, TOKEN_WORDS, PACKED)
    async_copy.commit_group()


@gluon.jit
def prefetch_rows(kv, slot, page_size, page_words, TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr):
    """Ask L2 for the 656 bytes of the rows in `slot` [64, 2]; two threads share a row."""
    words = row_words(gl.maximum(slot, 0), page_size, page_words, TOKEN_WORDS, PACKED)
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, SLOT_PAIRS))[None, :]
    at = gl.where(slot >= 0, (kv + (words + half * 32)).to(gl.int64), -1)
    gl.inline_asm_elementwise(
        """{
        .reg .pred valid;
        setp.ge.s64 valid, $1, 0;
        @valid prefetch.global.L2 [$1];
        @valid prefetch.global.L2 [$1 + 256];
        @valid prefetch.global.L2 [$1 + 512];
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [at],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fill(
    kv, line, limit, last_slot, page_size, page_words,
    latent, small, scales, vectors, bars,
    TOKEN_WORDS: gl.constexpr, PACKED: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Fetch K: gather the next tile's rows while the warpgroups attend, and expand them."""
    tiles = tile_count(limit)
    entry = gl.arange(0, 64, layout=SLOTS)
    pair = gl.arange(0, 64, layout=gl.SliceLayout(1, SLOT_PAIRS))[:, None]
    pair += gl.arange(0, 2, layout=gl.SliceLayout(0, SLOT_PAIRS))[None, :] * 0
    for j in gl.static_range(1, AHEAD):
        later = load_slots(line, j * 64 + pair, limit, last_slot)
        prefetch_rows(kv, later, page_size, page_words, TOKEN_WORDS, PACKED)
    later = load_slots(line, AHEAD * 64 + pair, limit, last_slot)
    slot = load_slots(line, entry, limit, last_slot)
    raw = reinterpret(latent.index(RAW), gl.int32, [2, 64, 64], FLAT)
    slots = reinterpret(vectors.index(SLOT), gl.int32, [64], VECTOR)
    slots.store(slot)
    gather(kv, slots, page_size, page_words, raw.index(0), 0, GATHER, TOKEN_WORDS, PACKED)
    gather(kv, slots, page_size, page_words, raw.index(1), 64, GATHER, TOKEN_WORDS, PACKED)
    async_copy.commit_group()
    gather_small(
        kv, slot, slots, page_size, page_words, small, scales, vectors, 0, TOKEN_WORDS, PACKED
    )
    for i in range(tiles):
        slot = load_slots(line, (i + 1) * 64 + entry, limit, last_slot)
        left = 2 * i
        async_copy.wait_group(1)
        barrier()
        mbarrier.wait(bars.index(FREE + left % 3), ((left // 3) & 1) ^ 1)
        expand(raw.index(0).load(EXPAND), latent.index(K_SLOTS + left % 3))
        fence_async_shared()
        async_copy.wait_group(0)
        slots.store(slot)
        barrier()
        mbarrier.arrive(bars.index(FULL + left % 3), count=1)
        gather(kv, slots, page_size, page_words, raw.index(0), 0, GATHER, TOKEN_WORDS, PACKED)

        right = left + 1
        mbarrier.wait(bars.index(FREE + right % 3), ((right // 3) & 1) ^ 1)
        expand(raw.index(1).load(EXPAND), latent.index(K_SLOTS + right % 3))
        fence_async_shared()
        barrier()
        mbarrier.arrive(bars.index(FULL + right % 3), count=1)
        gather(kv, slots, page_size, page_words, raw.index(1), 64, GATHER, TOKEN_WORDS, PACKED)
        async_copy.commit_group()
        prefetch_rows(kv, later, page_size, page_words, TOKEN_WORDS, PACKED)
        later = load_slots(line, (i + 1 + AHEAD) * 64 + pair, limit, last_slot)

        # The scales' place is free once both halves of the tile before have been used.
        before = (left + 2) % 3
        mbarrier.wait(bars.index(FREE + before), ((left + 2) // 3 & 1) ^ 1)
        mbarrier.wait(bars.index(ROPE_FREE), i & 1)
        gather_small(
            kv, slot, slots, page_size, page_words, small, scales, vectors, (i + 1) & 1,
            TOKEN_WORDS, PACKED,
        )  # fmt: skip
    async_copy.wait_group(0)
