"""Calls that real kernels got wrong (docs/faults.md), by name: for every backend and layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from drawn import (
    INT_MAX,
    INT_MIN,
    Call,
    decode_call,
    drawn_tokens,
    generator,
    poison_unselected,
    prefill_call,
)
from sparse_mla import LAYOUTS as KNOWN
from sparse_mla import KVCache

# Those with kernels, and all that may stand alone.
LAYOUTS = ["v32_fp8", "bf16", "bf16_nope"]
ALL_LAYOUTS = [name for name, layout in KNOWN.items() if not layout.extra_only]


def _redrawn(call: Call, change: Callable[[torch.Tensor, int], None]) -> Call:
    """The call with its indices changed in place, on a fresh cache poisoned to match."""
    cache = call.cache
    fresh = decode_call(
        cache.layout.name, pages=cache.num_pages, page_size=cache.page_size, topk=400, b=40
    ).cache
    made = generator(11)
    latent, rope = drawn_tokens(cache.layout, fresh.num_slots, made, spread=0.0)
    fresh.append(latent, rope, torch.arange(fresh.num_slots))
    changed = Call(call.q, fresh, call.indices.clone(), call.options)
    change(changed.indices, fresh.num_slots)
    poison_unselected(changed)
    return changed


def _chunk_invalid(start: int, stop: int) -> Callable[[str], Call]:
    def make(layout: str) -> Call:
        def change(indices: torch.Tensor, num_slots: int) -> None:
            indices[..., start:stop] = -1

        return _redrawn(decode_call(layout, heads=5, topk=192, invalid=0.0), change)

    return make


def empty_rows_among_full_ones(layout: str) -> Call:
    def change(indices: torch.Tensor, num_slots: int) -> None:
        indices[0] = -1
        indices[2, 1] = INT_MAX
        indices[3, 0] = num_slots

    return _redrawn(decode_call(layout, b=4, s_q=2, heads=3, sink=True), change)


def nothing_valid_anywhere(layout: str) -> Call:
    return decode_call(layout, b=3, heads=3, invalid=1.1, sink=True)


def every_kind_of_invalid(layout: str) -> Call:
    def change(indices: torch.Tensor, num_slots: int) -> None:
        wrong = [-1, -2, -64, INT_MIN, INT_MIN + 1, num_slots, num_slots + 1, INT_MAX, INT_MAX - 1]
        indices[..., ::3] = torch.tensor(wrong * 12, dtype=torch.int32)[
            : indices[0, 0, ::3].numel()
        ]
        indices[..., 1] = num_slots - 1  # the last slot is valid, and so is the first
        indices[..., 2] = 0

    return _redrawn(decode_call(layout, heads=5), change)


def duplicates(layout: str) -> Call:
    def change(indices: torch.Tensor, num_slots: int) -> None:
        indices[..., 1::2] = indices[..., :1]

    return _redrawn(decode_call(layout, heads=4, invalid=0.0), change)


def other_tokens_for_each_query(layout: str) -> Call:
    """s_q = 3 with disjoint lists, one of them empty."""

    def change(indices: torch.Tensor, num_slots: int) -> None:
        third = num_slots // 3
        for s in range(3):
            indices[:, s] = indices[:, s].clamp(0, num_slots - 1) % third + s * third
        indices[1, 1] = -1

    return _redrawn(decode_call(layout, s_q=3, heads=6, invalid=0.0), change)


def very_negative_logits(layout: str) -> Call:
    """Every logit is the same, -65536 or near it: below any mask sentinel, weights equal."""
    call = decode_call(layout, heads=3, topk=70)
    n = call.cache.num_slots
    kind = call.cache.layout
    rope = kind.rope
    latent = torch.randn(n, kind.latent.count, generator=generator(12))
    latent[:, :128] = 0.0
    latent[:, 0] = 256.0
    scale = torch.ones(1) if kind.tensor_scale else None
    cache = KVCache.empty(call.cache.num_pages, call.cache.page_size, layout, tensor_scale=scale)
    cache.append(
        latent, torch.zeros(n, 64) if rope else None, torch.arange(n), scale_rounding="pow2"
    )
    q = torch.zeros_like(call.q)
    q[..., 0] = -256.0
    made = Call(q, cache, call.indices, {"scale": 1.0})
    poison_unselected(made)
    return made


def sinks_of_every_size(layout: str) -> Call:
    call = decode_call(layout, heads=8)
    inf = float("inf")
    call.options["attn_sink"] = torch.tensor([-inf, inf, -60.0, 60.0, 0.0, 3.0, -3.0, 1e30])
    return call


def lengths_beyond_the_list(layout: str) -> Call:
    """Lengths 0, negative, 1, exactly topk and more; entries past them look valid and are NaN."""
    call = decode_call(layout, b=6, heads=4, topk=90, invalid=0.1)
    lengths = torch.tensor([0, -5, 1, 90, INT_MAX, 64], dtype=torch.int32)
    made = Call(call.q, call.cache, call.indices, {"topk_length": lengths})
    poison_unselected(made)
    return made


def strided_query_and_indices(layout: str) -> Call:
    call = decode_call(layout, b=3, s_q=2, heads=5, topk=70)
    d = call.q.shape[-1]
    wide = torch.full((2, 3, 7, d + 8), float("nan"), dtype=torch.bfloat16).transpose(0, 1)
    q = wide[:, :, 1:6, :d]
    q.copy_(call.q)
    # What lies behind a list is valid-looking and must not be taken for part of it.
    lists = torch.zeros(2, 3, 100, dtype=torch.int32).transpose(0, 1)
    indices = lists[..., 9:79]
    indices.copy_(call.indices)
    assert q.stride(-1) == indices.stride(-1) == 1 and not q.is_contiguous()
    return Call(q, call.cache, indices, call.options)


def padded_pages(layout: str) -> Call:
    return decode_call(layout, page_size=61, page_stride=128 * 1024, heads=5)


def padded_rows(layout: str) -> Call:
    call = decode_call(layout, heads=5)
    cache = call.cache
    if cache.layout.planar:  # has no padded rows
        return call
    size = cache.layout.row_bytes
    pool = torch.full((cache.num_pages, 3, cache.page_size, size + 48), 0xFF, dtype=torch.uint8)
    view = pool[:, 1, :, :size]
    view.copy_(cache.rows_view())
    return Call(
        call.q,
        KVCache.from_tensor(view, layout, tensor_scale=cache.tensor_scale),
        call.indices,
        call.options,
    )


DECODE_CALLS: dict[str, Callable[[str], Call]] = {
    "first chunk invalid": _chunk_invalid(0, 64),
    "middle chunk invalid": _chunk_invalid(64, 128),
    "last chunk invalid": _chunk_invalid(128, 192),
    "all but the last entry invalid": _chunk_invalid(0, 191),
    "empty rows among full ones": empty_rows_among_full_ones,
    "nothing valid anywhere": nothing_valid_anywhere,
    "every kind of invalid": every_kind_of_invalid,
    "duplicates": duplicates,
    "other tokens for each query": other_tokens_for_each_query,
    "very negative logits": very_negative_logits,
    "sinks of every size": sinks_of_every_size,
    "lengths beyond the list": lengths_beyond_the_list,
    "strided query and indices": strided_query_and_indices,
    "padded pages": padded_pages,
    "padded rows": padded_rows,
}

PREFILL_CALLS: dict[str, Callable[[str], Call]] = {
    "plain": lambda layout: prefill_call(layout, heads=5),
    "one token per page": lambda layout: prefill_call(layout, page_size=1, pages=300, heads=5),
    "a length and a sink": lambda layout: prefill_call(
        layout, s_q=5, heads=5, lengths=True, sink=True
    ),
    "nothing valid anywhere": lambda layout: prefill_call(layout, heads=2, invalid=1.1, sink=True),
    "many heads": lambda layout: prefill_call(layout, s_q=2, heads=33),
    "no entries": lambda layout: prefill_call(layout, topk=0),
}
