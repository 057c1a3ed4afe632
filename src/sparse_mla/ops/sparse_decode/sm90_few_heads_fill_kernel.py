"""The part of the Hopper kernel for few heads that fetches K: `produce`, four warps.

Slots become addresses a chunk of tiles at a time; rows are copied as they are, by cp.async, a tile
a stage of the ring.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..gluon_compat import async_load, barrier, reinterpret

BLOCK_T = gl.constexpr(32)  # tokens per tile
# Slots are resolved in chunks of this many tiles, at least as many as the ring has: two chunks of
# masks are kept, and when a chunk is all in the ring, the tiles of the chunk before it are done.
CHUNK_TILES = gl.constexpr(16)


@gluon.jit
def resolve(
    line,
    first,
    limit,
    last_slot,
    page_stride,
    page_size,
    TOKEN_STRIDE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Rows [CHUNK_TILES, BLOCK_T] of the list's entries from `first` on, in units of 16 bytes.

    -1 for invalid entries and from `limit` on.
    """
    SLOTS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    tile = gl.arange(0, CHUNK_TILES, layout=gl.SliceLayout(1, SLOTS))
    column = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, SLOTS))
    entry = first + tile[:, None] * BLOCK_T + column[None, :]
    slot = gl.load(line + entry, mask=entry < limit, other=-1)
    ok = (slot >= 0) & (slot <= last_slot)
    slot = gl.where(ok, slot, 0)
    if PACKED:
        row = slot.to(gl.int64) * (TOKEN_STRIDE // 16)
    else:
        row = (slot // page_size).to(gl.int64) * (page_stride // 16)
        row += (slot % page_size).to(gl.int64) * (TOKEN_STRIDE // 16)
    return gl.where(ok, row, -1)


@gluon.jit
def share_rows(rows, shared_rows, bias, chunk):
    """A chunk's rows for the producer, and for the consumers 0 or -inf to add to the logits."""
    shared_rows.store(rows)
    bias.index(chunk & 1).store(gl.where(rows >= 0, 0.0, float("-inf")))


@gluon.jit
def produce(
    kv_ptr,
    line,
    first,
    limit,
    tiles,
    last_slot,
    page_stride,
    page_size,
    latent,
    rope,
    scales,
    rows,
    bias,
    full,
    empty,
    TOKEN_STRIDE: gl.constexpr,
    PACKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring with the rows of the list's entries first..limit, tile by tile."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows_of = reinterpret(rows, gl.int64, [CHUNK_TILES, BLOCK_T], LINE)
    # A warp copies 128 bytes of four rows at a time, or all 128 bytes of RoPE of four rows.
    LATENT: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 4, 8], [1, 4, 1], [2, 0, 1])
    ROPE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 4, 2], [1, 4, 1], [2, 0, 1])
    SCALES: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    latent_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LATENT))
    rope_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, ROPE))
    group = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, LATENT)))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, LATENT)))
    latent_at = kv_ptr + (group[:, None, None] * 32 + word[None, None, :])
    rope_group = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, ROPE)))
    rope_word = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, ROPE)))
    rope_at = kv_ptr + (rope_group[:, None, None] * 8 + rope_word[None, None, :] + 132)
    scales_at = kv_ptr + (gl.arange(0, 4, layout=gl.SliceLayout(0, SCALES)) + 128)

    stage = 0
    phase = 1
    for chunk in range(gl.cdiv(tiles, CHUNK_TILES)):
        start = chunk * CHUNK_TILES
        # The next chunk's slots are on their way while this one's rows are copied.
        next_rows = resolve(
            line, first + (start + CHUNK_TILES) * BLOCK_T, limit, last_slot, page_stride, page_size,
            TOKEN_STRIDE, PACKED,
        )  # fmt: skip
        for tile in range(gl.minimum(tiles - start, CHUNK_TILES)):
            from_latent = rows_of.index(tile).load(latent_row)
            from_rope = rows_of.index(tile).load(rope_row)
            from_scales = rows_of.index(tile).load(gl.SliceLayout(1, SCALES))
            mbarrier.wait(empty.index(stage), phase)
            async_load(
                latent.index(stage),
                latent_at + (from_latent * 4)[None, :, None],
                mask=(from_latent >= 0)[None, :, None],
            )
            async_load(
                rope.index(stage),
                rope_at + (from_rope * 4)[None, :, None],
                mask=(from_rope >= 0)[None, :, None],
            )
            async_load(
                scales.index(stage),
                scales_at[None, :] + (from_scales * 4)[:, None],
                mask=(from_scales >= 0)[:, None],
            )
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            # One more arrival that also publishes the masks.
            mbarrier.arrive(full.index(stage), count=1)
            stage += 1
            wrap = stage == STAGES
            stage = gl.where(wrap, 0, stage)
            phase = gl.where(wrap, phase ^ 1, phase)
        # Only where another chunk follows: its masks replace those of the chunk before this one,
        # which are read for sure only once this chunk's tiles are all in the ring.
        if start + CHUNK_TILES < tiles:
            barrier()
            share_rows(next_rows, rows, bias, chunk + 1)
            barrier()
