"""Sparse attention on CPU: torch's threads, float32 arithmetic, bounded workspace.

Tokens are gathered in blocks of `BLOCK_ROWS` rows, decoded to float32 and folded into a running
softmax, so that memory never depends on topk or on the number of queries.

torch's own e4m3 cast is not vectorised and would take most of the time. e4m3 bits shifted into a
float16 are the same number times 2^-8 (bias 7 against 15), subnormals included, so four values
are decoded at once by integer operations on an int32 word, and the 2^8 goes into the scale. The
two halves of the words land in separate planes, which permutes the latent dims: q is permuted to
match, and the output is permuted back.
"""

from __future__ import annotations

import math

import torch

from ...kv_cache import KVCache
from ...kv_layout import KVLayout
from ...reference import sink_factor, valid_indices

# 1024 rows of 576 floats are 2.4 MB: with the raw bytes about what two cores' L2 holds.
BLOCK_ROWS = 1024
# Queries handled together; their accumulators stay in cache beside the rows.
BLOCK_QUERIES = 8

_HIGH_SIGNS = -0x7FFF8000  # 0x80008000
_HIGH_MAGNITUDES = 0x3F803F80


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
    """Decode; see interface.decode. Splits mean nothing here."""
    b, s_q, heads, d_qk = q.shape
    lengths = None if topk_length is None else topk_length.repeat_interleave(s_q)
    out, lse, _ = attend(
        q.reshape(b * s_q, heads, d_qk),
        cache,
        indices.reshape(b * s_q, indices.shape[-1]),
        lengths,
        attn_sink,
        scale,
        batch_invariant,
    )
    return out.view(b, s_q, heads, cache.layout.d_v), lse.view(b, s_q, heads)


def attend(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of n query tokens over their own lists of slots.

    Args:
        q: [n, h, d_qk] bf16. indices: [n, topk] int32. lengths: [n] int32 or None.
        batch_invariant: cut every list into the same blocks, however many queries there are. A
            lone query takes 1.35 times as long then.

    Returns:
        out [n, h, d_v] bf16, lse [n, h] float32, max_logits [n, h] float32; natural logarithms,
        -inf for a query with nothing valid.
    """
    n, heads, _ = q.shape
    layout = cache.layout
    gather = _Gather(cache)
    out = torch.zeros(n, heads, layout.d_v, dtype=torch.bfloat16)
    lse = torch.full((n, heads), float("-inf"))
    max_logits = lse.clone()
    for start in range(0, n, BLOCK_QUERIES):
        part = slice(start, start + BLOCK_QUERIES)
        queries = BLOCK_QUERIES if batch_invariant else min(BLOCK_QUERIES, n - start)
        limit = None if lengths is None else lengths[part]
        valid = valid_indices(indices[part], cache.num_slots, limit)
        values, lse[part], max_logits[part] = _attend_block(
            q[part], gather, indices[part], valid, scale, BLOCK_ROWS // queries
        )
        if attn_sink is not None:
            values *= sink_factor(lse[part], attn_sink)[..., None]
        out[part] = values.to(torch.bfloat16)
    return out, lse, max_logits


def _attend_block(
    q: torch.Tensor,
    gather: _Gather,
    indices: torch.Tensor,
    valid: torch.Tensor,
    scale: float,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, heads, _ = q.shape
    layout = gather.layout
    query = gather.permute_query(q.float() * scale)
    acc = torch.zeros(n, heads, layout.d_v)
    total = torch.zeros(n, heads)
    peak = torch.full((n, heads), float("-inf"))
    for first in range(0, indices.shape[1], step):
        ok = valid[:, first : first + step]
        if not bool(ok.any()):
            continue
        keys = gather(indices[:, first : first + step], ok)
        logits = torch.bmm(query, keys.transpose(1, 2))
        logits.masked_fill_(~ok[:, None, :], float("-inf"))
        new_peak = torch.maximum(peak, logits.amax(-1))
        # A query with nothing valid so far has peak -inf; subtracting 0 instead keeps exp at 0.
        base = torch.where(new_peak == float("-inf"), 0.0, new_peak)
        p = logits.sub_(base[..., None]).exp_()
        decay = torch.exp(peak - base)
        total = total * decay + p.sum(-1)
        acc.mul_(decay[..., None]).baddbmm_(p, keys[..., : layout.d_v])
        peak = new_peak
    lse = peak + torch.log(total)
    acc /= torch.where(total == 0, 1.0, total)[..., None]
    return gather.unpermute_output(acc), lse, peak


class _Gather:
    """Reads tokens of a cache as float32 rows, latent dims in `order`."""

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
        # Latent dim stored at position (plane, word, half) by the word-wise decode.
        d = torch.arange(self.layout.latent.count).view(-1, 2, 2)
        self.order = d.permute(2, 0, 1).reshape(-1)

    def permute_query(self, q: torch.Tensor) -> torch.Tensor:
        if not self.layout.quantised:
            return q
        width = self.layout.latent.count
        return torch.cat([q[..., :width][..., self.order], q[..., width:]], dim=-1)

    def unpermute_output(self, out: torch.Tensor) -> torch.Tensor:
        if not self.layout.quantised:
            return out
        restored = torch.empty_like(out)
        restored[..., self.order] = out
        return restored

    def __call__(self, indices: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Rows [n, t, d_qk] float32 of indices [n, t]; invalid entries read as zero rows."""
        n, t = indices.shape
        slots = indices.reshape(-1).long().masked_fill_(~valid.reshape(-1), 0)
        page = torch.div(slots, self.page_size, rounding_mode="floor")
        offset = slots - page * self.page_size
        if self.words is not None:
            at = (page * self.page_stride + offset * self.token_stride) // self.unit
            raw = self.words.index_select(0, at)
        else:
            raw = self.rows[page, offset].contiguous().view(torch.int32)
        if not bool(valid.all()):
            raw.masked_fill_(~valid.reshape(-1, 1), 0)
        return self._decode(raw).view(n, t, -1)

    def _decode(self, raw: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        rows = torch.empty(raw.shape[0], layout.d_qk)
        width = layout.latent.count
        if layout.scales is None:
            rows.copy_(raw.view(torch.bfloat16)[:, : layout.d_qk])
            return rows
        packed = raw[:, layout.latent.offset // 4 : layout.latent.offset // 4 + width // 4]
        halves = _e4m3_to_half_planes(packed)
        latent = rows[:, :width].view(raw.shape[0], 2, layout.scales.count, layout.tile // 2)
        latent.copy_(halves.view(latent.shape))
        scales = layout.scales.read(raw.view(torch.uint8)) * 256.0
        latent.mul_(scales[:, None, :, None])
        nan = _nan_bytes(packed)
        if nan is not None:
            rows[:, :width][nan[:, self.order]] = float("nan")
        if layout.rope is not None:
            rows[:, width:] = layout.rope.read(raw.view(torch.uint8))
        return rows


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
    """e4m3 words [n, w] int32 as float16 [n, 2, 2 w], each value times 2^-8.

    Plane 0 holds bytes 0 and 2 of every word, plane 1 bytes 1 and 3. The NaN code comes out as
    480 * 2^-8.
    """
    planes = torch.empty(packed.shape[0], 2, packed.shape[1], dtype=torch.int32)
    torch.bitwise_left_shift(packed, 8, out=planes[:, 0])
    planes[:, 1] = packed
    magnitudes = torch.bitwise_right_shift(planes, 1).bitwise_and_(_HIGH_MAGNITUDES)
    return planes.bitwise_and_(_HIGH_SIGNS).bitwise_or_(magnitudes).view(torch.float16)


def _nan_bytes(packed: torch.Tensor) -> torch.Tensor | None:
    """Which of the e4m3 bytes in [n, w] int32 are NaN, [n, 4 w] bool; None if there are none."""
    raw = packed.contiguous().view(torch.uint8)
    # 0x7f is the largest int8 and 0xff the largest uint8: two reductions, no temporary.
    if int(raw.view(torch.int8).amax()) < 0x7F and int(raw.amax()) < 0xFF:
        return None
    return (raw & 0x7F) == 0x7F
