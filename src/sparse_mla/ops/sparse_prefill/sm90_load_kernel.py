"""The work of the Hopper kernel for bf16 caches, and the group that loads it: Q and tiles of K."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from ..gluon_compat import barrier
from ..sm90_pairs_kernel import COPY_ROWS, INF, PAIR, TILE, copy_rows


@aggregate
class Items:
    """The work of a call: which item is which token, split and heads, and its list."""

    indices: gl.tensor
    stride_b: gl.tensor
    stride_s: gl.tensor
    s_q: gl.tensor
    heads: gl.tensor
    head_blocks: gl.tensor
    topk: gl.tensor
    splits: gl.tensor
    split_size: gl.tensor
    count: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.indices,
            self.stride_b,
            self.stride_s,
            self.s_q,
            self.heads,
            self.head_blocks,
            self.topk,
            self.splits,
            self.split_size,
            self.count,
        ) = fields

    @gluon.jit
    def token(self, item):
        return item // (self.head_blocks * self.splits)

    @gluon.jit
    def first_head(self, item):
        return (item % self.head_blocks) * TILE

    @gluon.jit
    def row(self, item):
        """The item's first row of the (partial) output, [splits, tokens, heads]."""
        tokens = self.count // (self.head_blocks * self.splits)
        split = (item // self.head_blocks) % self.splits
        row = (split.to(gl.int64) * tokens + self.token(item)) * self.heads
        return row + self.first_head(item)

    @gluon.jit
    def span(self, item, lengths):
        """The entries [first, last) of the token's list that belong to the item."""
        last = self.topk
        if lengths is not None:
            last = gl.minimum(gl.load(lengths + self.token(item) // self.s_q), last)
            last = gl.maximum(last, 0)
        first = ((item // self.head_blocks) % self.splits) * self.split_size
        return first, gl.minimum(last, first + self.split_size)

    @gluon.jit
    def pairs(self, item, lengths):
        """Pairs of tiles to go through: at least one, all masked, where the list is empty."""
        first, last = self.span(item, lengths)
        return gl.maximum((last - first + (PAIR - 1)) // PAIR, 1)

    @gluon.jit
    def line(self, item):
        """The token's list."""
        token = self.token(item)
        b = (token // self.s_q).to(gl.int64)
        return self.indices + b * self.stride_b + (token % self.s_q).to(gl.int64) * self.stride_s


@gluon.jit
def load_slots(line, entry, last):
    """The list's entries, -1 from `last` on."""
    return gl.load(line + entry, mask=entry < last, other=-1)


@gluon.jit
def load_tiles(
    items,
    shared,
    lengths,
    q_ptr,
    kv_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    page_stride,
    page_size,
    last_slot,
    D_ROPE: gl.constexpr,
    TOKEN_STRIDE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """The loader: Q of each item, then its tiles of K."""
    rows = gl.arange(0, TILE, layout=COPY_ROWS)
    item = gl.program_id(0)
    line = items.line(item)
    first, last = items.span(item, lengths)
    slots0 = load_slots(line, first + rows, last)
    slots1 = load_slots(line, first + TILE + rows, last)
    done = 0
    item_phase = 0
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        pairs = gl.maximum((last - first + (PAIR - 1)) // PAIR, 1)
        # Slots are loaded a pair ahead, across the items' border.
        next_item = gl.minimum(item + gl.num_programs(0), items.count - 1)
        next_line = items.line(next_item)
        next_first, next_last = items.span(next_item, lengths)

        token = items.token(item)
        head = items.first_head(item) + rows
        q_offset = (token // items.s_q).to(gl.int64) * q_stride_b
        q_offset += (token % items.s_q).to(gl.int64) * q_stride_s
        q_offsets = (q_offset + head.to(gl.int64) * q_stride_h) * 8
        mbarrier.wait(shared.q_free, item_phase ^ 1)
        copy_rows(shared.q_left.index(0), q_ptr, q_offsets, head < items.heads, 0, 256)
        copy_rows(shared.q_right.index(0), q_ptr, q_offsets, head < items.heads, 256, 256)
        if D_ROPE > 0:
            copy_rows(shared.q_rope.index(0), q_ptr, q_offsets, head < items.heads, 512, 64)
        async_copy.mbarrier_arrive(shared.q_full, increment_count=False)
        for j in range(pairs):
            phase = ((done + j) & 1) ^ 1
            if j + 1 < pairs:
                ahead = line + (first + (j + 1) * PAIR)
                left_over = last - (first + (j + 1) * PAIR)
            else:
                ahead = next_line + next_first
                left_over = next_last - next_first
            for stage in gl.static_range(2):
                slots = slots0 if stage == 0 else slots1
                ok = (slots >= 0) & (slots <= last_slot)
                slots = gl.where(ok, slots, 0)
                if PACKED:
                    offsets = slots.to(gl.int64) * TOKEN_STRIDE
                else:
                    offsets = (slots // page_size).to(gl.int64) * page_stride
                    offsets += (slots % page_size).to(gl.int64) * TOKEN_STRIDE
                offsets = offsets * 8
                mbarrier.wait(shared.left_free.index(stage), phase)
                copy_rows(shared.k_left.index(stage), kv_ptr, offsets, ok, 0, 256)
                async_copy.mbarrier_arrive(shared.left_full.index(stage), increment_count=False)
                mbarrier.wait(shared.right_free.index(stage), phase)
                shared.bias.index(stage).store(gl.where(ok, 0.0, -INF))
                copy_rows(shared.k_right.index(stage), kv_ptr, offsets, ok, 256, 256)
                if D_ROPE > 0:
                    copy_rows(shared.k_rope.index(stage), kv_ptr, offsets, ok, 512, 64)
                async_copy.mbarrier_arrive(shared.right_full.index(stage), increment_count=False)
                barrier()
                mbarrier.arrive(shared.right_full.index(stage), count=1)
                fresh = load_slots(ahead, stage * TILE + rows, left_over)
                if stage == 0:
                    slots0 = fresh
                else:
                    slots1 = fresh
        line = next_line
        first = next_first
        last = next_last
        done += pairs
        item_phase ^= 1
