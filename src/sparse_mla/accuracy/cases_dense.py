"""Cases of dense decode: whole sequences through a block table.

As everywhere, what no query may see is 0xFF bytes: pages of nobody, the end of each last page. Past
a sequence's pages the block table holds numbers that look like pages, and numbers that do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kv_layout import get_layout
from .case import Case, Inputs
from .case_inputs import (
    INT_MAX,
    INT_MIN,
    VALUES,
    Draw,
    fit_queries,
    made_tokens,
    move,
    normal,
    poisoned_cache,
    rng,
    scale_for,
)
from .case_special import large_cache
from .token_bytes import unpack, write_tokens


@dataclass(frozen=True)
class Sequences:
    """What a call looks like.

    Attributes:
        lengths: tokens of each sequence; less than 0 counts as 0.
        shared: this many first pages are the same for all sequences that are long enough.
        absent: every so many-th page of a sequence is one that the cache does not have; 0: none.
        spare: entries of the block table past the longest sequence.
        page_pad: bytes between pages, a multiple of 16.
    """

    lengths: tuple[int, ...] = (200, 64, 131)
    s_q: int = 1
    h: int = 16
    layout: str = "bf16"
    page_size: int = 64
    causal: bool = False
    values: str = "gaussian"
    logit_std: float = 0.8
    shared: int = 0
    absent: int = 0
    spare: int = 2
    page_pad: int = 0


def draw_sequences(spec: Sequences, seed: int, name: str, device: torch.device) -> Inputs:
    """Make the call that `spec` describes; the same bytes for the same (spec, seed, name)."""
    g = rng(seed, name)
    layout, size, b = get_layout(spec.layout), spec.page_size, len(spec.lengths)
    lengths = torch.tensor(spec.lengths, dtype=torch.int32)
    counts = [-(-max(length, 0) // size) for length in spec.lengths]
    pages = sum(counts) + 3
    order = torch.randperm(pages, generator=g).tolist()
    width = max([*counts, 0]) + spec.spare
    garbage = torch.tensor([INT_MAX, INT_MIN, -1, pages, order[-1]], dtype=torch.int64)
    table = garbage[torch.randint(0, len(garbage), (b, width), generator=g)]
    common = [order.pop() for _ in range(spec.shared)]
    slots = []
    for i, count in enumerate(counts):
        own = common[: min(spec.shared, count)]
        own = own + [order.pop() for _ in range(count - len(own))]
        table[i, :count] = torch.tensor(own, dtype=torch.int64)
        token = torch.arange(max(spec.lengths[i], 0))
        slots.append(table[i][token // size] * size + token % size)
        if spec.absent:
            missing = torch.arange(count)[spec.absent - 1 :: spec.absent]
            table[i, missing] = garbage[torch.arange(len(missing)) % 4]
    live = torch.unique(torch.cat([*slots, torch.zeros(0, dtype=torch.int64)]))
    latent = VALUES[spec.values](g, len(live), layout.latent.count)
    rope = VALUES[spec.values](g, len(live), 64)
    scale = scale_for(layout, latent)
    cache = poisoned_cache(pages, size, layout, spec.page_pad, device, scale)
    tokens = made_tokens(layout, latent, rope, "amax", g, scale)
    write_tokens(cache, live, tokens)
    q = normal(g, b * spec.s_q, spec.h, layout.d_qk)
    if len(live):
        drawn = Draw(layout=spec.layout, logit_std=spec.logit_std)
        q = fit_queries(q, unpack(layout, tokens, scale), drawn, layout)
    made = Inputs(
        op="dense_decode",
        q=move(q.to(torch.bfloat16).view(b, spec.s_q, spec.h, layout.d_qk), device),
        cache=cache,
        indices=torch.empty(0),
        scale=layout.d_qk**-0.5,
        block_table=move(table.to(torch.int32), device),
        cache_seqlens=move(lengths, device),
        causal=spec.causal,
    )
    return replace(made, indices=seen(made))


def seen(call: Inputs) -> torch.Tensor:
    """The slots that each query token of a dense call sees, [b, s_q, T] int32, -1 elsewhere.

    Written out sequence by sequence, apart from the emulated kernel's way, which faults change.
    """
    assert call.block_table is not None and call.cache_seqlens is not None
    b, s_q = call.q.shape[:2]
    size, pages = call.cache.page_size, call.cache.num_pages
    width = call.block_table.shape[1] * size
    lists = torch.full((b, s_q, width), -1, dtype=torch.int64)
    for i in range(b):
        length = min(max(int(call.cache_seqlens[i]), 0), width)
        for s in range(s_q):
            for place in range(max(length - s_q + s + 1, 0) if call.causal else length):
                page = int(call.block_table[i, place // size])
                if 0 <= page < pages:
                    lists[i, s, place] = page * size + place % size
    return lists.to(torch.int32).to(call.q.device)


def _case(
    name: str, about: str, shows: tuple[str, ...] = (), quick: bool = False, **fields: Any
) -> Case:
    name = f"dense_decode/{name}"
    spec = Sequences(**fields)

    def build(seed: int, device: torch.device) -> list[Inputs]:
        return [draw_sequences(spec, seed, name, device)]

    return Case(name, "dense_decode", about, shows, build, quick=quick)


def _offsets() -> Case:
    """Pages 64 MiB apart: numbers 31 to 33 and 63 to 65 lie either side of 2^31 and 2^32 bytes."""
    name = "dense_decode/offsets"

    def build(seed: int, device: torch.device) -> list[Inputs]:
        g = rng(seed, name)
        cache = large_cache("bf16", 64, 2**26, device)
        table = torch.tensor([[31, 33, 32], [65, 63, 64]], dtype=torch.int32)
        slots = (table.long()[..., None] * 64 + torch.arange(64)).flatten()
        tokens = made_tokens(
            cache.layout, normal(g, len(slots), 512), normal(g, len(slots), 64), "amax", g
        )
        write_tokens(cache, slots, tokens)
        q = normal(g, 2, 8, 576)
        q = fit_queries(q, unpack(cache.layout, tokens, None), Draw(layout="bf16"), cache.layout)
        made = Inputs(
            op="dense_decode",
            q=q.view(2, 1, 8, 576).to(device),
            cache=cache,
            indices=torch.empty(0),
            scale=576**-0.5,
            block_table=table.to(device),
            cache_seqlens=torch.tensor([192, 150], dtype=torch.int32, device=device),
        )
        return [replace(made, indices=seen(made))]

    about = "pages either side of 2^31 and 2^32 bytes"
    return Case(name, "dense_decode", about, ("int32_overflow", "uint32_overflow"), build)


def _stale() -> Case:
    """Two calls of one caller, the second with other lengths and pages."""
    name = "dense_decode/stale"
    first = Sequences(lengths=(40, 100, 10, 64))
    specs = (first, replace(first, lengths=(90, 30, 128, 65)))

    def build(seed: int, device: torch.device) -> list[Inputs]:
        return [draw_sequences(spec, seed, f"{name}/{i}", device) for i, spec in enumerate(specs)]

    about = "scheduling metadata reused with other lengths"
    return Case(name, "dense_decode", about, ("first_sequence_length",), build)


_TABLE = ("pages_contiguous", "first_sequence_table", "table_stride_of_pages")
_CAUSAL = ("causal_ignored", "causal_from_start", "causal_off_by_one")

DENSE_CASES = (
    _case(
        "gaussian",
        "sequences of several lengths",
        (*_TABLE, "last_page_unmasked", "sequence_one_short", "first_sequence_length"),
        quick=True,
    ),
    _case("heavy_tailed", "heavy tailed tokens", values="heavy_tailed"),
    _case("outlier_channels", "outlier channels", values="outlier_channels"),
    _case("logits/large", "logits past 100", logit_std=40.0),
    _case("logits/flat", "q = 0: all weights are equal", logit_std=0.0, lengths=(333, 200)),
    _case("causal", "four query tokens, causal", _CAUSAL, quick=True, causal=True, s_q=4),
    _case(
        "causal/short",
        "fewer tokens than query tokens: the first ones see nothing",
        _CAUSAL,
        causal=True,
        s_q=3,
        lengths=(1, 2, 3, 64, 0),
    ),
    _case("s_q", "four query tokens that all see everything", s_q=4, lengths=(70, 129)),
    _case(
        "lengths",
        "ends of pages, no tokens, one token, a negative length",
        ("last_page_unmasked", "sequence_one_short"),
        lengths=(0, 1, 63, 64, 65, -5, 128, 257),
        h=8,
    ),
    _case("lengths/all_empty", "no sequence has a token", lengths=(0, 0)),
    _case("shared_pages", "sequences that share their first pages", shared=2, lengths=(140, 300)),
    _case(
        "absent_pages",
        "pages that the cache does not have: INT_MAX, INT_MIN, -1 and its size",
        ("absent_page_loaded",),
        absent=2,
        lengths=(64 * 9, 200, 64),
    ),
    *(
        _case(
            f"page_size/{size}",
            f"pages of {size} tokens, {pad} bytes apart",
            (*_TABLE, "last_page_unmasked"),
            page_size=size,
            page_pad=pad,
            lengths=(100, 37),
            causal=True,
            s_q=2,
        )
        for size, pad in ((1, 0), (16, 64), (53, 0), (256, 1024))
    ),
    *(
        _case(f"heads/{h}", f"{h} heads", h=h, s_q=2, causal=True, lengths=(90, 64))
        for h in (1, 5, 20, 64, 96, 128)
    ),
    _case("batch/0", "no sequences", lengths=()),
    *(
        _case(f"layout/{layout}", layout, layout=layout, lengths=(150, 33), s_q=2, causal=True)
        for layout in ("bf16_nope", "fp8_tensor", "v32_fp8", "v4_fp8")
    ),
    _offsets(),
    _stale(),
)
