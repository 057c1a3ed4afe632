"""Which CTA of the Hopper kernel attends which part of which sequence, worked out on the device.

No host reads a length, so a graph replays with other ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from ..sm90_pairs_kernel import PAIR, TILE

# Sequences that `plan` looks at together.
TOGETHER = gl.constexpr(256)
PLAN = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))


@aggregate
class Work:
    """What a CTA attends: `segments` pieces of sequences, from unit `first` of `sequence` on.

    A unit is a pair of tiles or, where sequences are cut by their own lengths alone (CHUNKED), one
    such piece.
    """

    seqlens: gl.tensor  # [b] int32
    table: gl.tensor  # [b, max_pages] int32
    table_stride: gl.tensor
    max_tokens: gl.tensor  # what the table reaches
    s_q: gl.tensor
    heads: gl.tensor
    block: gl.tensor  # the CTA's 64 rows of each sequence
    part: gl.tensor
    sequence: gl.tensor
    first: gl.tensor
    units: gl.tensor
    segments: gl.tensor
    max_chunks: gl.tensor
    min_chunk: gl.tensor  # pairs

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.seqlens,
            self.table,
            self.table_stride,
            self.max_tokens,
            self.s_q,
            self.heads,
            self.block,
            self.part,
            self.sequence,
            self.first,
            self.units,
            self.segments,
            self.max_chunks,
            self.min_chunk,
        ) = fields

    @gluon.jit
    def rows(self):
        """Rows of a sequence."""
        return self.s_q * self.heads

    @gluon.jit
    def segment(self, sequence, first, units, CHUNKED: gl.constexpr, ROW_LIMITS: gl.constexpr):
        """The segment that begins at unit `first` of a sequence with `units` left to the CTA.

        Returns:
            tokens of the sequence; the segment's pairs of tiles, from and to; whether it is all of
            the sequence; its slot among the partial results; the next sequence, first and units.
        """
        length = gl.load(self.seqlens + sequence)
        length = gl.maximum(gl.minimum(length, self.max_tokens), 0)
        pairs = pairs_of(length)
        if CHUNKED:
            chunk = chunk_of(pairs, self.max_chunks, self.min_chunk)
            start = first * chunk
            end = gl.minimum(start + chunk, pairs)
            taken = 1
            slot = sequence * self.max_chunks + first
        else:
            start = first
            end = gl.minimum(start + units, pairs)
            taken = end - start
            # A part's first and last segments are the only ones that can be pieces.
            slot = self.part * 2 + gl.where(sequence == self.sequence, 0, 1)
        ended = end == pairs
        whole = (start == 0) & ended
        if ROW_LIMITS:
            # No row of this block sees more than its last row.
            query = gl.minimum((self.block * TILE + (TILE - 1)) // self.heads, self.s_q - 1)
            seen = pairs_of(length - self.s_q + query + 1)
            end = gl.maximum(gl.minimum(end, seen), start + 1)
        next_sequence = gl.where(ended, sequence + 1, sequence)
        next_first = gl.where(ended, 0, first + taken)
        return length, start, end, whole, slot, next_sequence, next_first, units - taken


@gluon.jit
def pairs_of(length):
    """Pairs of tiles to go through for so many tokens: at least one, all masked if need be."""
    return gl.maximum((length + (PAIR - 1)) // PAIR, 1)


@gluon.jit
def chunk_of(pairs, max_chunks, min_chunk):
    """Pairs of a piece, by the sequence's own length."""
    return gl.maximum((pairs + max_chunks - 1) // max_chunks, min_chunk)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _units(seqlens, start, b, max_tokens, max_chunks, min_chunk, CHUNKED: gl.constexpr):
    """Units of TOGETHER sequences from `start` on, 0 where there is none, and which exist."""
    index = start + gl.arange(0, TOGETHER, layout=PLAN)
    there = index < b
    length = gl.load(seqlens + index, mask=there, other=0)
    units = pairs_of(gl.maximum(gl.minimum(length, max_tokens), 0))
    if CHUNKED:
        chunk = chunk_of(units, max_chunks, min_chunk)
        units = (units + chunk - 1) // chunk
    return gl.where(there, units, 0), there


@gluon.jit
def plan(seqlens, b, max_tokens, max_chunks, min_chunk, part, parts, CHUNKED: gl.constexpr):
    """This part's share of all units: its first sequence, the unit there, units, segments."""
    total = 0
    most = 0
    for start in range(0, b, TOGETHER):
        units, _ = _units(seqlens, start, b, max_tokens, max_chunks, min_chunk, CHUNKED)
        total += gl.sum(units, 0)
        most = gl.maximum(most, gl.max(units, 0))
    size = (total + parts - 1) // parts
    if not CHUNKED:
        # Sequences of one length are left whole where that costs less than merging their pieces.
        whole = (size + most - 1) // most * most
        size = gl.where((total == most * b) & (whole * 16 <= size * 17), whole, size)
    begin = part * size
    end = gl.minimum(begin + size, total)
    sequence = 0
    before = 0  # units before `sequence`
    last = 0
    carry = 0
    for start in range(0, b, TOGETHER):
        units, there = _units(seqlens, start, b, max_tokens, max_chunks, min_chunk, CHUNKED)
        ends = carry + gl.associative_scan(units, 0, _add)
        over = there & (ends <= begin)
        sequence += gl.sum(over.to(gl.int32), 0)
        before = gl.maximum(before, gl.max(gl.where(over, ends, 0), 0))
        last += gl.sum((there & (ends < end)).to(gl.int32), 0)
        carry += gl.sum(units, 0)
    units = gl.maximum(end - begin, 0)
    segments = units if CHUNKED else last - sequence + 1
    return sequence, begin - before, units, gl.where(units > 0, segments, 0)
