"""Which work a program of the Hopper kernel for expanded caches does, and how parts are merged.

An item is a query token and 64 of its heads; its tiles are those of its list in the main cache,
then those of its list in the extra cache, two (a pair) at a time. Programs take items in one of
four ways, and write what covers an item only in part to slots of a workspace:

- **Whole**: in turn; no item is cut.
- **By shape**: `whole` items go to the programs in turn, each of the others is cut into `splits`.
- **Sorted**: the longest items go to the programs in turn, forth and back, so that whoever got a
  long one gets a short one next. No item is cut.
- **Balanced**: the lists' lengths are counted on the device, and all items laid end to end, each
  one unit for its beginning and one for every pair, are cut into equal parts, one a program.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_wait

from ..gluon_compat import barrier
from .triton_kernel import sink_factor
from .triton_rows_kernel import to_bf16

# The plans, see above; those up to SORTED cut no item.
WHOLE = gl.constexpr(0)
SORTED = gl.constexpr(1)
BY_SHAPE = gl.constexpr(2)
BALANCED = gl.constexpr(3)
# The most items of a program where they are sorted.
ROUNDS = gl.constexpr(16)
# Sequences whose lengths are summed up at a time.
CHUNK = gl.constexpr(512)
CHUNK_LAYOUT = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@aggregate
class Shape:
    """The sizes of a call."""

    s_q: gl.tensor
    heads: gl.tensor
    head_blocks: gl.tensor
    topk: gl.tensor
    extra_topk: gl.tensor
    count: gl.tensor  # items
    whole: gl.tensor  # items that are not cut, where the plan is by shape
    splits: gl.tensor
    split_pairs: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.s_q,
            self.heads,
            self.head_blocks,
            self.topk,
            self.extra_topk,
            self.count,
            self.whole,
            self.splits,
            self.split_pairs,
        ) = fields

    @gluon.jit
    def items(self):
        """Items, or parts of them, where the plan is by shape."""
        return self.whole + (self.count - self.whole) * self.splits

    @gluon.jit
    def item_of(self, number):
        """The item that part `number` of the plan by shape belongs to."""
        cut = number - self.whole
        return gl.where(cut < 0, number, self.whole + cut // self.splits)

    @gluon.jit
    def sequence(self, item):
        return item // (self.head_blocks * self.s_q)

    @gluon.jit
    def token(self, item):
        return item // self.head_blocks

    @gluon.jit
    def first_head(self, item):
        return (item % self.head_blocks) * 64

    @gluon.jit
    def row(self, item):
        """The item's first row of the output, [tokens, heads]."""
        return self.token(item).to(gl.int64) * self.heads + self.first_head(item)


@aggregate
class Query:
    """Where Q is; strides in units of 8 elements."""

    pointer: gl.tensor
    stride_b: gl.tensor
    stride_s: gl.tensor
    stride_h: gl.tensor

    @gluon.constexpr_function
    def __init__(self, *fields):
        self.pointer, self.stride_b, self.stride_s, self.stride_h = fields


@gluon.jit
def entries(limit, lengths, b):
    """How many entries of a list count."""
    if lengths is not None:
        limit = gl.maximum(gl.minimum(gl.load(lengths + b), limit), 0)
    return limit


@gluon.jit
def pair_count(main, extra):
    """Pairs of tiles of lists with so many entries: at least one, all masked, if all are empty."""
    return gl.maximum((((main + 63) // 64) + ((extra + 63) // 64) + 1) // 2, 1)


@aggregate
class Work:
    """A program's items [begin, end) by `step`; balanced: its units [first, last) of all."""

    begin: gl.tensor
    end: gl.tensor
    step: gl.tensor
    start: gl.tensor  # the unit where item `begin` starts
    first: gl.tensor
    last: gl.tensor
    own: gl.tensor  # sorted: pointer to all programs' items [programs, ROUNDS]

    @gluon.constexpr_function
    def __init__(self, *fields):
        self.begin, self.end, self.step, self.start, self.first, self.last, self.own = fields

    @gluon.jit
    def item(self, shape, number, PLAN: gl.constexpr):
        """The item that `number`, from `begin` to `end` by `step`, stands for."""
        if PLAN == BY_SHAPE:
            number = shape.item_of(number)
        if PLAN == SORTED:
            number = gl.load(self.own + gl.program_id(0) * ROUNDS + number)
        return number

    @gluon.jit
    def cut(self, shape, item, start, pairs, PLAN: gl.constexpr):
        """The program's part of an item that starts at unit `start` and has `pairs`.

        Returns the pairs [first, last) and the workspace's slot, -1 for none.
        """
        if PLAN <= SORTED:
            first = item * 0
            last = pairs
            slot = first - 1
        elif PLAN == BALANCED:
            first = gl.maximum(self.first - start - 1, 0)
            last = gl.minimum(self.last - start - 1, pairs)
            covered = (first == 0) & (last == pairs)
            slot = 2 * gl.program_id(0) + (item != self.begin).to(gl.int32)
            slot = gl.where(covered, -1, slot)
        else:
            cut = item - shape.whole
            part = gl.where(cut < 0, 0, cut % shape.splits)
            first = part * shape.split_pairs
            # A part past the end goes through a masked pair.
            last = gl.minimum(first + shape.split_pairs, gl.maximum(pairs, first + 1))
            last = gl.where(cut < 0, pairs, last)
            slot = gl.where(cut < 0, -1, cut)
        return first, last, slot


@gluon.jit
def plan_by_shape(shape):
    pid = gl.program_id(0)
    zero = pid * 0
    return Work(pid, shape.items(), gl.num_programs(0), zero, zero, zero, zero)


@gluon.jit
def chunk_units(shape, lengths, extra_lengths, at):
    """Units of all items of sequences `at`; 0 past the last sequence."""
    per_sequence = shape.s_q * shape.head_blocks
    b = at + gl.arange(0, CHUNK, layout=CHUNK_LAYOUT)
    ok = b * per_sequence < shape.count
    main = gl.full([CHUNK], 0, gl.int32, layout=CHUNK_LAYOUT) + shape.topk
    extra = gl.full([CHUNK], 0, gl.int32, layout=CHUNK_LAYOUT) + shape.extra_topk
    if lengths is not None:
        main = gl.minimum(gl.load(lengths + b, mask=ok, other=0), main)
        main = gl.maximum(main, 0)
    if extra_lengths is not None:
        extra = gl.minimum(gl.load(extra_lengths + b, mask=ok, other=0), extra)
        extra = gl.maximum(extra, 0)
    pairs = pair_count(main, extra)
    return b, pairs, gl.where(ok, (pairs + 1) * per_sequence, 0)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def largest(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return (
        gl.maximum(a0, b0),
        gl.maximum(a1, b1),
        gl.maximum(a2, b2),
        gl.maximum(a3, b3),
        gl.maximum(a4, b4),
        gl.maximum(a5, b5),
        gl.maximum(a6, b6),
    )


@gluon.jit
def find(shape, lengths, extra_lengths, unit, other):
    """For each of two units the sequence it belongs to, where that starts, and an item's pairs."""
    zero = unit * 0
    b, begins, pairs = zero, zero, zero
    other_b, other_begins, other_pairs = zero, zero, zero
    before = zero
    for at in range(0, shape.count // (shape.s_q * shape.head_blocks), CHUNK):
        sequences, in_item, units = chunk_units(shape, lengths, extra_lengths, at)
        ends = gl.associative_scan(units, 0, add) + before
        starts = ends - units
        here = (ends > unit) & (starts <= unit)
        there = (ends > other) & (starts <= other)
        # One reduction, so that the warps meet once.
        found = gl.reduce(
            (
                gl.where(here, sequences, 0),
                gl.where(here, starts, 0),
                gl.where(here, in_item, 0),
                gl.where(there, sequences, 0),
                gl.where(there, starts, 0),
                gl.where(there, in_item, 0),
                ends,
            ),
            0,
            largest,
        )
        b = gl.maximum(b, found[0])
        begins = gl.maximum(begins, found[1])
        pairs = gl.maximum(pairs, found[2])
        other_b = gl.maximum(other_b, found[3])
        other_begins = gl.maximum(other_begins, found[4])
        other_pairs = gl.maximum(other_pairs, found[5])
        before = found[6]
    return b, begins, pairs, other_b, other_begins, other_pairs


@gluon.jit
def plan_balanced(shape, lengths, extra_lengths, meta_ptr):
    """This program's share; in meta [programs, 4] the item that others have to finish.

    meta: the item or -1, its first slot, the number of slots; the second slot belongs to the next
    program and so on.
    """
    pid = gl.program_id(0)
    per_sequence = shape.s_q * shape.head_blocks
    total = pid * 0
    for at in range(0, shape.count // per_sequence, CHUNK):
        _, _, units = chunk_units(shape, lengths, extra_lengths, at)
        total = total + gl.sum(units, 0)
    # At least two units each, so that there is at least one pair; the first `longer` programs have
    # one more than the others.
    programs = gl.minimum(gl.num_programs(0), total // 2)
    share = total // programs
    longer = total - share * programs
    idle = pid >= programs
    first = gl.where(idle, 0, pid * share + gl.minimum(pid, longer))
    last = gl.where(idle, 2, first + share + (pid < longer).to(gl.int32))
    # A beginning alone at the end of the share is left to the next program.
    b, begins, pairs, final_b, final_begins, final_pairs = find(
        shape, lengths, extra_lengths, first, last - 2
    )
    nth = (first - begins) // (pairs + 1)
    begin = b * per_sequence + nth
    start = begins + nth * (pairs + 1)
    nth = (last - 2 - final_begins) // (final_pairs + 1)
    final = final_b * per_sequence + nth
    final_start = final_begins + nth * (final_pairs + 1)
    finish = final_start + final_pairs + 1
    split = (last < finish) & (first <= final_start + 1) & (pid < programs)
    # Whose is the last unit of the item?
    unit = finish - 1 - longer * (share + 1)
    owner = gl.where(unit < 0, (finish - 1) // (share + 1), longer + unit // share)
    gl.store(meta_ptr + pid * 4, gl.where(split, final, -1))
    gl.store(meta_ptr + pid * 4 + 1, 2 * pid + (final != begin).to(gl.int32))
    gl.store(meta_ptr + pid * 4 + 2, owner - pid + 1)
    end = gl.where(idle, begin, final + 1)
    return Work(begin, end, gl.to_tensor(1), start, first, last, pid * 0)


@gluon.jit
def plan_sorted(shape, lengths, extra_lengths, own_ptr, SEQUENCES: gl.constexpr):
    """This program's items, written to own [programs, ROUNDS]; at most SEQUENCES sequences."""
    rows: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, rows)
    by_column: gl.constexpr = gl.SliceLayout(0, rows)
    per_sequence = shape.s_q * shape.head_blocks
    sequences = shape.count // per_sequence
    mine = gl.arange(0, SEQUENCES, layout=by_row)
    keys = sequence_key(shape, lengths, extra_lengths, mine, sequences, SEQUENCES)
    rank = gl.zeros([SEQUENCES], gl.int32, layout=by_row)
    for at in range(0, sequences, 16):
        others = at + gl.arange(0, 16, layout=by_column)
        theirs = sequence_key(shape, lengths, extra_lengths, others, sequences, SEQUENCES)
        rank += gl.sum((theirs[None, :] > keys[:, None]).to(gl.int32), 1)
    # Forth and back: who got a long item gets a short one next.
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    number = gl.arange(0, ROUNDS, layout=by_column)
    place = number * programs + gl.where(number % 2 == 0, pid, programs - 1 - pid)
    is_mine = rank[:, None] == (place // per_sequence)[None, :]
    items = mine[:, None] * per_sequence + (place % per_sequence)[None, :]
    own = gl.max(gl.where(is_mine, items, -1), 0)
    gl.store(own_ptr + pid * ROUNDS + number, own)
    barrier()
    count = gl.sum((place < shape.count).to(gl.int32), 0)
    zero = pid * 0
    return Work(zero, count, gl.to_tensor(1), zero, zero, zero, own_ptr)


@gluon.jit
def sequence_key(shape, lengths, extra_lengths, at, sequences, SEQUENCES: gl.constexpr):
    """Greater for a sequence of more tiles, then for an earlier one; -1 past the last."""
    ok = at < sequences
    main = at * 0 + shape.topk
    extra = at * 0 + shape.extra_topk
    if lengths is not None:
        main = gl.maximum(gl.minimum(gl.load(lengths + at, mask=ok, other=0), main), 0)
    if extra_lengths is not None:
        extra = gl.maximum(gl.minimum(gl.load(extra_lengths + at, mask=ok, other=0), extra), 0)
    pairs = pair_count(main, extra)
    return gl.where(ok, pairs * SEQUENCES + (SEQUENCES - 1 - at), -1)


@triton.jit(do_not_specialize=["heads", "head_blocks", "whole", "splits"])
def merge(
    parts_ptr,  # [slots, 64, 512] float32, each row normalised
    parts_lse_ptr,  # [slots, 64] float32, log2
    meta_ptr,  # [programs, 4] int32 of a balanced plan, or None
    sink_ptr,  # [heads] float32, or None
    out_ptr,  # [tokens, heads, 512] bf16
    lse_ptr,  # [tokens, heads] float32, natural
    heads,
    head_blocks,
    whole,
    splits,
    BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,  # slots that are loaded at a time
):
    """Merge the slots of one cut item's head; grid (cut items, 64, 512 / BLOCK_D)."""
    cut = tl.program_id(0)
    row = tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    gdc_wait()
    if meta_ptr is not None:
        item = tl.load(meta_ptr + cut * 4)
        slot = tl.load(meta_ptr + cut * 4 + 1)
        count = tl.load(meta_ptr + cut * 4 + 2)
        following = 2 * (cut + 1)
        step = 2
    else:
        item = whole + cut
        slot = cut * splits
        count = splits
        following = slot + 1
        step = 1
    head = (item % head_blocks) * 64 + row
    if (item >= 0) & (head < heads):
        peak = float("-inf")
        total = 0.0
        out = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, count, TOGETHER):
            nth = start + tl.arange(0, TOGETHER)
            ok = nth < count
            at = tl.where(nth == 0, slot, following + (nth - 1) * step).to(tl.int64) * 64 + row
            lse = tl.load(parts_lse_ptr + at, mask=ok, other=float("-inf"))
            part = tl.load(
                parts_ptr + at[:, None] * 512 + dims[None, :], mask=ok[:, None], other=0.0
            )
            before = peak
            peak = tl.maximum(peak, tl.max(lse, 0))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            decay = tl.exp2(before - base)
            # A part with nothing valid has weight 0 and zeros.
            weight = tl.exp2(lse - base)
            total = total * decay + tl.sum(weight, 0)
            out = out * decay + tl.sum(part * weight[:, None], 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        merged = (base + tl.log2(total)) * 0.6931471805599453
        factor = tl.where(total == 0.0, 0.0, 1.0 / total)
        if sink_ptr is not None:
            factor = factor * sink_factor(merged, tl.load(sink_ptr + head))
        to = (item // head_blocks).to(tl.int64) * heads + head
        tl.store(out_ptr + to * 512 + dims, to_bf16(out * factor))
        tl.store(lse_ptr + to, merged, mask=tl.program_id(2) == 0)
