"""Sparse attention on CPU: torch's threads, float32 arithmetic, bounded workspace.

A block is `BLOCK_QUERIES` query tokens over `CHUNK` tokens of each one's list: gather the rows,
decode them to float32, fold them into a running softmax. Its buffers, 20 MB, are kept between
calls: fresh buffers are fresh pages, and their faults took most of the time. Several caches are
attended to one after the other and merged by their running sums. cpu_rows.py reads the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...kv_cache import KVCache
from ...reference import sink_factor, valid_indices
from .cpu_rows import RowReader, scratch
from .source import Source

# A fixed chunk makes a query's bits independent of what else is in the batch. 8 x 512 rows are
# 9 MB of float32; 2 x 512 stay in L2 but meet four times as many barriers between the threads.
CHUNK = 512
BLOCK_QUERIES = 8

# Below this many rows times heads threads would wait for each other longer than they work; on a
# busy machine each of a block's thirty operations can then cost a time slice.
THREADED_WORK = 4096 * 16

Lists = tuple[KVCache, torch.Tensor, torch.Tensor | None]
"""A cache, and what each of n query tokens selects: indices [n, topk] int32, lengths [n]."""


def run(
    q: torch.Tensor,
    sources: list[Source],
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode; see interface.decode. Splits mean nothing here, and every row is batch invariant."""
    b, s_q, heads, d_qk = q.shape
    lists = [_per_token(source, b * s_q, s_q) for source in sources]
    out, lse, _ = attend(q.reshape(b * s_q, heads, d_qk), lists, attn_sink, scale)
    return out.view(b, s_q, heads, out.shape[-1]), lse.view(b, s_q, heads)


def _per_token(source: Source, tokens: int, s_q: int) -> Lists:
    lengths = None if source.lengths is None else source.lengths.repeat_interleave(s_q)
    return source.cache, source.indices.reshape(tokens, source.indices.shape[-1]), lengths


def attend(
    q: torch.Tensor, lists: Sequence[Lists], attn_sink: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of n query tokens, q [n, h, d_qk] bf16, over their own lists of slots.

    Returns:
        out [n, h, d_v] bf16, lse [n, h] float32, max_logits [n, h] float32; natural logarithms,
        -inf for a query with nothing valid.
    """
    n, heads, _ = q.shape
    if heads == 1:
        # One head would make the products matrix-vector, whose bits depend on batch and threads.
        sink = None if attn_sink is None else attn_sink.expand(2)
        out, lse, max_logits = attend(q.expand(n, 2, -1), lists, sink, scale)
        return out[:, :1].contiguous(), lse[:, :1].contiguous(), max_logits[:, :1].contiguous()
    out = torch.zeros(n, heads, lists[0][0].layout.d_v, dtype=torch.bfloat16)
    lse = torch.full((n, heads), float("-inf"), dtype=torch.float32, device="cpu")
    max_logits = lse.clone()
    readers = [RowReader(cache) for cache, _, _ in lists]
    entries = sum(indices.numel() for _, indices, _ in lists)
    with torch.no_grad(), _threads_for(entries * max(heads, 16)):
        for start in range(0, n, BLOCK_QUERIES):
            block = slice(start, start + BLOCK_QUERIES)
            query = q[block].float() * scale
            parts = []
            for (cache, indices, lengths), reader in zip(lists, readers, strict=True):
                limit = None if lengths is None else lengths[block]
                valid = valid_indices(indices[block], cache.num_slots, limit)
                parts.append(_attend(query, reader, indices[block], valid))
            acc, total, peak = _merge(parts)
            acc /= torch.where(total == 0, 1.0, total)[..., None]
            lse[block] = peak + torch.log(total)
            max_logits[block] = peak
            if attn_sink is not None:
                acc *= sink_factor(lse[block], attn_sink)[..., None]
            out[block] = acc
    return out, lse, max_logits


Partial = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Sums of a few queries over some tokens: acc [m, h, d_v], the weights' total and peak [m, h]."""


def _merge(parts: list[Partial]) -> Partial:
    """The sums over the tokens of all parts."""
    acc, total, peak = parts[0]
    for more, more_total, more_peak in parts[1:]:
        new_peak = torch.maximum(peak, more_peak)
        base = _finite_base(new_peak)
        decay, more_decay = torch.exp(peak - base), torch.exp(more_peak - base)
        total = total * decay + more_total * more_decay
        acc = acc * decay[..., None] + more * more_decay[..., None]
        peak = new_peak
    return acc, total, peak


def _finite_base(peak: torch.Tensor) -> torch.Tensor:
    """What to subtract from logits: 0 for a query with nothing valid, which keeps exp(-inf) 0."""
    return torch.where(peak == float("-inf"), 0.0, peak)


def _attend(
    query: torch.Tensor, read: RowReader, indices: torch.Tensor, valid: torch.Tensor
) -> Partial:
    """A few queries [m, h, d_qk] float32, already scaled, over their lists [m, topk]."""
    m, heads, _ = query.shape
    d_v = read.layout.d_v
    query = read.permute_query(query)
    acc = query.new_zeros(m, heads, d_v)
    total = query.new_zeros(m, heads)
    peak = query.new_full((m, heads), float("-inf"))
    all_valid = bool(valid.all())
    for first in range(0, indices.shape[1], CHUNK):
        chunk = slice(first, first + CHUNK)
        ok = None if all_valid else valid[:, chunk]
        if ok is not None and not bool(ok.any()):
            continue
        keys = read(indices[:, chunk], ok)
        # The product is 1.2x faster as tokens by heads, everything after it as heads by tokens.
        by_token = scratch("by_token", (m, keys.shape[1], heads), torch.float32)
        torch.bmm(keys, query.transpose(1, 2), out=by_token)
        logits = scratch("logits", (m, heads, keys.shape[1]), torch.float32)
        logits.copy_(by_token.transpose(1, 2))
        if ok is not None:
            logits.masked_fill_(~ok[:, None], float("-inf"))
        new_peak = torch.maximum(peak, logits.amax(-1))
        base = _finite_base(new_peak)
        p = logits.sub_(base[..., None]).exp_()
        decay = torch.exp(peak - base)
        total = total * decay + p.sum(-1)
        acc.mul_(decay[..., None]).baddbmm_(p, keys[..., :d_v])
        peak = new_peak
    return read.unpermute_output(acc), total, peak


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
