"""Sparse attention on CPU: torch's threads, float32 arithmetic, bounded workspace.

A block is `BLOCK_QUERIES` query tokens over `CHUNK` tokens of each one's list: gather the rows,
decode them to float32, fold them into a running softmax. Its buffers, 20 MB, are kept between
calls: fresh buffers are fresh pages, and their faults took most of the time.

torch's own e4m3 cast is not vectorised and would take most of the rest. e4m3 bits shifted into a
float16 are the same number times 2^-8 (bias 7 against 15), subnormals included, so values are
decoded by integer operations on pairs, and the 2^8 goes into the scale. The two halves of the
pairs land in separate planes, which permutes the latent dims: q is permuted to match, and the
output is permuted back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...kv_cache import KVCache
from ...kv_layout import KVLayout
from ...reference import sink_factor, valid_indices

# A fixed chunk makes a query's bits independent of what else is in the batch. 8 x 512 rows are
# 9 MB of float32; 2 x 512 stay in L2 but meet four times as many barriers between the threads.
CHUNK = 512
BLOCK_QUERIES = 8

# Below this many rows times heads threads would wait for each other longer than they work; on a
# busy machine each of a block's thirty operations can then cost a time slice.
THREADED_WORK = 4096 * 16

_HALF_BITS = -0x4080  # 0xbf80: sign, four bits of exponent, three of mantissa


def run(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode; see interface.decode. Splits mean nothing here, and every row is batch invariant."""
    b, s_q, heads, d_qk = q.shape
    lengths = None if topk_length is None else topk_length.repeat_interleave(s_q)
    out, lse, _ = attend(
        q.reshape(b * s_q, heads, d_qk),
        cache,
        indices.reshape(b * s_q, indices.shape[-1]),
        lengths,
        attn_sink,
        scale,
    )
    return out.view(b, s_q, heads, cache.layout.d_v), lse.view(b, s_q, heads)


def attend(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of n query tokens over their own lists of slots.

    Args:
        q: [n, h, d_qk] bf16. indices: [n, topk] int32. lengths: [n] int32 or None.

    Returns:
        out [n, h, d_v] bf16, lse [n, h] float32, max_logits [n, h] float32; natural logarithms,
        -inf for a query with nothing valid.
    """
    n, heads, _ = q.shape
    if heads == 1:
        # One head would make the products matrix-vector, whose bits depend on batch and threads.
        sink = None if attn_sink is None else attn_sink.expand(2)
        out, lse, max_logits = attend(q.expand(n, 2, -1), cache, indices, lengths, sink, scale)
        return out[:, :1].contiguous(), lse[:, :1].contiguous(), max_logits[:, :1].contiguous()
    out = torch.zeros(n, heads, cache.layout.d_v, dtype=torch.bfloat16)
    lse = torch.full((n, heads), float("-inf"))
    max_logits = lse.clone()
    gather = _Gather(cache)
    with torch.no_grad(), _threads_for(indices.numel() * max(heads, 16)):
        for start in range(0, n, BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            limit = None if lengths is None else lengths[part]
            valid = valid_indices(indices[part], cache.num_slots, limit)
            query = gather.permute_query(q[part].float() * scale)
            values, lse[part], max_logits[part] = _attend(query, gather, indices[part], valid)
            if attn_sink is not None:
                values *= sink_factor(lse[part], attn_sink)[..., None]
            out[part] = values
    return out, lse, max_logits


def _attend(
    query: torch.Tensor, gather: _Gather, indices: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A few queries [m, h, d_qk] float32, already scaled, over their lists [m, topk]."""
    m, heads, _ = query.shape
    d_v = gather.layout.d_v
    acc = torch.zeros(m, heads, d_v)
    total = torch.zeros(m, heads)
    peak = torch.full((m, heads), float("-inf"))
    all_valid = bool(valid.all())
    for first in range(0, indices.shape[1], CHUNK):
        chunk = slice(first, first + CHUNK)
        ok = None if all_valid else valid[:, chunk]
        if ok is not None and not bool(ok.any()):
            continue
        keys = gather(indices[:, chunk], ok)
        # The product is 1.2x faster as tokens by heads, everything after it as heads by tokens.
        by_token = scratch("by_token", (m, keys.shape[1], heads), torch.float32)
        torch.bmm(keys, query.transpose(1, 2), out=by_token)
        logits = scratch("logits", (m, heads, keys.shape[1]), torch.float32)
        logits.copy_(by_token.transpose(1, 2))
        if ok is not None:
            logits.masked_fill_(~ok[:, None], float("-inf"))
        new_peak = torch.maximum(peak, logits.amax(-1))
        # A query with nothing valid so far has peak -inf; subtracting 0 instead keeps exp at 0.
        base = torch.where(new_peak == float("-inf"), 0.0, new_peak)
        p = logits.sub_(base[..., None]).exp_()
        decay = torch.exp(peak - base)
        total = total * decay + p.sum(-1)
        acc.mul_(decay[..., None]).baddbmm_(p, keys[..., :d_v])
        peak = new_peak
    lse = peak + torch.log(total)
    acc /= torch.where(total == 0, 1.0, total)[..., None]
    return gather.unpermute_output(acc), lse, peak


@contextmanager
def _threads_for(work: int) -> Iterator[None]:
    """One thread for little work, the caller's number for more."""
    before = torch.get_num_threads()
    if work >= THREADED_WORK or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised buffer that this thread keeps; the next call by the same name reuses it."""
    buffers: dict[str, torch.Tensor] = _kept.__dict__
    size = math.prod(shape)
    if name not in buffers or buffers[name].numel() < size:
        # A tensor made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffers[name] = torch.empty(size, dtype=dtype)
    return buffers[name][:size].view(shape)


class _Gather:
    """Reads tokens of a cache as float32 rows; a quantised latent has its even dims first."""

    def __init__(self, cache: KVCache) -> None:
        self.layout: KVLayout = cache.layout
        self.page_size = cache.page_size
        self.num_slots = cache.num_slots
        self.rows = cache.rows_view()
        self.words = _word_view(cache)
        # The row table that `words` indexes starts a row every `unit` bytes.
        self.unit = 0 if self.words is None else self.words.stride(0) * 4
        self.page_stride = cache.pages.stride(0)
        self.token_stride = cache.token_stride

    def permute_query(self, q: torch.Tensor) -> torch.Tensor:
        """Dims of q [..., d_qk] in the order of the rows."""
        if not self.layout.quantised:
            return q
        width = self.layout.latent.count
        return torch.cat([_even_first(q[..., :width]), q[..., width:]], dim=-1)

    def unpermute_output(self, out: torch.Tensor) -> torch.Tensor:
        """Dims of out [..., d_v] back in the layout's order."""
        if not self.layout.quantised:
            return out
        return out.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    def __call__(self, indices: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Rows [m, t, d_qk] float32 of indices [m, t]; entries not valid read as zero rows."""
        m, t = indices.shape
        slots = indices.reshape(-1)
        if valid is not None:
            slots = slots.masked_fill(~valid.reshape(-1), 0)
        if self.words is None:
            slots = slots.long()
            rows = self.rows[slots // self.page_size, slots % self.page_size]
            raw = rows.contiguous().view(torch.int32)
        else:
            raw = scratch("raw", (m * t, self.words.shape[1]), torch.int32)
            torch.index_select(self.words, 0, self._row_numbers(slots), out=raw)
        if valid is not None:
            raw.masked_fill_(~valid.reshape(-1, 1), 0)
        return self._decode(raw).view(m, t, -1)

    def _row_numbers(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the slots' rows are in `words`."""
        if self.page_stride == self.page_size * self.token_stride == self.page_size * self.unit:
            return slots
        slots = slots.long()
        page = slots // self.page_size
        offset = slots - page * self.page_size
        return (page * self.page_stride + offset * self.token_stride) // self.unit

    def _decode(self, raw: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        count, width = raw.shape[0], layout.latent.count
        rows = scratch("rows", (count, layout.d_qk), torch.float32)
        if layout.scales is None:
            return rows.copy_(raw.view(torch.bfloat16)[:, : layout.d_qk])
        codes = raw.view(torch.uint8)[:, layout.latent.offset :][:, :width]
        halves = _e4m3_to_half_planes(codes.view(torch.int16))
        latent = rows[:, :width].view(count, 2, layout.scales.count, layout.tile // 2)
        latent.copy_(halves.view(latent.shape))
        first = layout.scales.offset // 4
        scales = raw.view(torch.float32)[:, first : first + layout.scales.count] * 256.0
        latent.mul_(scales[:, None, :, None])
        if _has_nan(codes):
            rows[:, :width][_even_first((codes & 0x7F) == 0x7F)] = float("nan")
        if layout.rope is not None:
            first = layout.rope.offset // 2
            rows[:, width:] = raw.view(torch.bfloat16)[:, first : first + layout.rope.count]
        return rows


def _even_first(x: torch.Tensor) -> torch.Tensor:
    """The last dim's even entries, then its odd ones."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _word_view(cache: KVCache) -> torch.Tensor | None:
    """The cache as overlapping int32 rows, one every gcd of the strides; None if misaligned."""
    stride = cache.pages.stride(0)
    unit = math.gcd(stride, cache.token_stride)
    start = cache.pages.storage_offset()
    aligned = cache.pages.untyped_storage().data_ptr() % 4 == 0
    if unit % 4 or start % 4 or not aligned or cache.num_slots == 0:
        return None
    row_bytes = cache.layout.row_bytes
    last = (cache.num_pages - 1) * stride + (cache.page_size - 1) * cache.token_stride
    span = cache.pages.as_strided((last + row_bytes,), (1,)).view(torch.int32)
    return span.as_strided((last // unit + 1, row_bytes // 4), (unit // 4, 1))


def _e4m3_to_half_planes(packed: torch.Tensor) -> torch.Tensor:
    """e4m3 pairs [n, w] int16 as float16 [n, 2, w], each value times 2^-8.

    Plane 0 holds the low bytes, plane 1 the high ones. A byte in the top half of a 16-bit lane,
    shifted right by one with its sign kept, has sign, exponent and mantissa where float16 has
    them, but for the sign's copy. The NaN code comes out as 480 * 2^-8.
    """
    planes = scratch("planes", (packed.shape[0], 2, packed.shape[1]), torch.int16)
    torch.bitwise_left_shift(packed, 8, out=planes[:, 0])
    planes[:, 0].bitwise_right_shift_(1)
    torch.bitwise_right_shift(packed, 1, out=planes[:, 1])
    return planes.bitwise_and_(_HALF_BITS).view(torch.float16)


def _has_nan(codes: torch.Tensor) -> bool:
    """Whether e4m3 codes, uint8 [n, w], hold a NaN: the largest int8 0x7f or uint8 0xff."""
    # Rows first: torch reduces a strided matrix to one number five times slower.
    largest_signed = int(codes.view(torch.int8).amax(1).amax())
    return largest_signed == 0x7F or int(codes.amax(1).amax()) == 0xFF
