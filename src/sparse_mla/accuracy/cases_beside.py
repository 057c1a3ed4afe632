"""Cases about what stands beside a call: rows with NaN, the calls before it in the same memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from .case import Case, Inputs
from .case_drawn import Build, drawn, made_case
from .case_inputs import Draw, Extra, draw
from .cases_dense import Sequences, draw_sequences


def _nan_beside(op: str, layout: str, s_q: int, extra: bool = False) -> Build:
    """NaN in one query and in a token that another query selects; rows beside them stay clean."""

    def build(seed: int, name: str, device: torch.device) -> list[Inputs]:
        spec = Draw(
            op=op,
            layout=layout,
            b=6,
            s_q=s_q,
            h=4,
            topk=64,
            page_size=64 if op == "decode" else 1,
            extra=Extra(layout, topk=20) if extra else None,
        )
        inputs = draw(spec, seed, name, device)
        q = inputs.q.view(-1, 4, inputs.q.shape[-1])
        q[1, 2, 17], q[-2, 0, 500] = float("nan"), float("-inf")
        lists = inputs.extra_indices if extra else inputs.indices
        assert lists is not None
        lists = lists.clone()
        lists.view(-1, lists.shape[-1])[4, 5] = 0
        if extra:
            return [replace(inputs, extra_indices=lists)]
        return [replace(inputs, indices=lists)]

    return build


def _nan_dense(seed: int, name: str, device: torch.device) -> list[Inputs]:
    spec = Sequences(lengths=(70, 130, 64, 33), s_q=2, h=4)
    made = draw_sequences(spec, seed, name, device)
    made.q[1, 0, 2, 17] = float("nan")
    assert made.block_table is not None
    row = made.cache.rows_view().view(torch.bfloat16)
    row[int(made.block_table[2, 0]), 5, 100] = float("nan")
    return [made]


def _contained() -> list[Case]:
    shows = ("nan_spreads",)
    about = "NaN and Inf in two queries and in a selected token"
    return [
        made_case(
            f"{op}/nan/{name}", f"{about}, {words}", shows, _nan_beside(op, layout, s_q, extra)
        )
        for op, name, words, layout, s_q, extra in (
            ("decode", "s_q", "three query tokens a sequence", "v32_fp8", 3, False),
            ("decode", "bf16", "bf16 cache", "bf16", 1, False),
            ("decode", "extra", "the token in the second cache", "v4_fp8", 2, True),
            ("prefill", "contained", "prefill", "bf16", 8, False),
        )
    ] + [made_case("dense_decode/nan", f"{about} of dense sequences", shows, _nan_dense)]


def _same_buffers(
    first: Draw, second: Draw, seed: int, name: str, device: torch.device
) -> list[Inputs]:
    """Two calls in the same memory, as a CUDA graph replays them; the second has other contents."""
    calls = [draw(spec, seed, f"{name}/{i}", device) for i, spec in enumerate((first, second))]
    names = ("q", "indices", "topk_length", "attn_sink", "extra_indices")
    kept = calls[0]
    made = []
    for call in calls:
        pairs = [(kept.cache.pages, call.cache.pages.clone())]
        if kept.extra_cache is not None and call.extra_cache is not None:
            pairs.append((kept.extra_cache.pages, call.extra_cache.pages.clone()))
        for part in names:
            buffer, held = getattr(kept, part), getattr(call, part)
            if buffer is not None:
                pairs.append((buffer, held.clone()))
        made.append(replace(kept, contents=tuple(pairs)))
    return made


def _again() -> list[Case]:
    shows = ("stale_buffers", "stale_metadata")
    about = "the same memory for every call, filled anew each time: cache, q, lists, lengths"

    def plain(seed: int, name: str, device: torch.device) -> list[Inputs]:
        spec = Draw(b=3, h=8, topk=192, page_size=16, lengths=(17, 192, 64), sink=(1.0, -1.0))
        other = replace(spec, lengths=(192, 3, 130), sink=(-2.0, 3.0), holes="random")
        return _same_buffers(spec, other, seed, name, device)

    def two_caches(seed: int, name: str, device: torch.device) -> list[Inputs]:
        spec = Draw(layout="v4_fp8", b=3, h=8, topk=64, extra=Extra("v4_fp8", topk=70, page_size=2))
        return _same_buffers(spec, replace(spec, holes="front"), seed, name, device)

    def rows(seed: int, name: str, device: torch.device) -> list[Inputs]:
        spec = Draw(op="prefill", layout="bf16", page_size=1, s_q=4, h=8, topk=100)
        return _same_buffers(spec, replace(spec, holes="random"), seed, name, device)

    def same_cache(seed: int, name: str, device: torch.device) -> list[Inputs]:
        first, second = (
            draw(Draw(b=4, h=8, topk=128), seed, f"{name}/{i}", device) for i in range(2)
        )
        lists = first.indices.flip(0, 2).clone()
        return [first, replace(first, q=second.q, indices=lists)]

    return [
        made_case("decode/stale/same_buffers", about, shows, plain),
        made_case("decode/stale/same_buffers/extra", about, shows, two_caches),
        made_case("prefill/stale/same_buffers", about, shows, rows),
        made_case(
            "decode/stale/same_cache", "other queries over the same cache", shows[1:], same_cache
        ),
        drawn(
            "decode/repeats/extra",
            "two caches, 5 times the same call, bit for bit",
            ("race",),
            layout="v4_fp8",
            b=2,
            h=8,
            topk=512,
            repeats=5,
            extra=Extra("v4_fp8", topk=128, page_size=2),
        ),
        made_case(
            "dense_decode/repeats",
            "5 times the same call, bit for bit",
            ("race",),
            lambda seed, name, device: [
                draw_sequences(Sequences((700, 300), h=8), seed, name, device)
            ],
            repeats=5,
        ),
    ]


BESIDE_CASES: tuple[Case, ...] = (*_contained(), *_again())
