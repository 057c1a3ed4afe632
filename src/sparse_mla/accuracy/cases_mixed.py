"""Cases that mix what the others have one at a time: layouts, heads, lists, lengths, sinks, pages.

Kernels choose their path by layout, heads, query tokens and lengths, and a mistake of one path
shows on no other. So every layout meets many heads with long lists and few heads with short ones,
and every pair of caches meets lengths and pages of all kinds.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kv_cache import KVCache
from ..kv_layout import LAYOUTS
from .case import Case, Inputs
from .case_drawn import both, drawn, made_case
from .case_inputs import (
    INT_MAX,
    INT_MIN,
    Draw,
    Extra,
    draw,
    fit_queries,
    made_tokens,
    normal,
    rng,
)
from .case_special import boundary_slots, room_for_large_cache
from .cases_dense import Sequences, draw_sequences
from .cases_layouts import PAIRS
from .token_bytes import unpack, write_tokens

MAIN = tuple(layout for layout in LAYOUTS.values() if not layout.extra_only)
MASKS = ("topk_length_ignored", "masked_slot_nan")
ORDER = ("gaussian", "heavy_tailed")
SINKS = (0.4, -1.3, 6.1, float("-inf"), 3.7)


def _layouts() -> list[Case]:
    """Every layout with many heads and long lists, with few of both, and in prefill."""
    cases = []
    for layout in MAIN:
        name = layout.name
        fp32 = layout.scales is not None and layout.scales.dtype == "fp32"
        scales, spread = ("log_uniform", 0.4) if fp32 else ("amax", 0.8)
        reading = ("scale_bf16",) * fp32
        cases += [
            drawn(
                f"decode/mixed/{name}/64_heads",
                "64 heads, two query tokens, lists of 1100, 0 and 515 with repeats and holes",
                (*reading, *MASKS, "sink_when_split", "first_query_indices"),
                layout=name,
                scales=scales,
                logit_std=spread,
                b=3,
                s_q=2,
                h=64,
                topk=1100,
                repeats_of=2,
                page_size=61,
                page_pad=64,
                lengths=(1100, 0, 515),
                holes="large",
                scale_by=0.8,
                sink=SINKS,
                repeats=3,
            ),
            drawn(
                f"decode/mixed/{name}/17_heads",
                "17 heads, three query tokens, pages of one token, sinks and a scale",
                (*MASKS, "heads_beyond_tail", "softmax_scale_ignored"),
                layout=name,
                scales=scales,
                b=3,
                s_q=3,
                h=17,
                topk=145,
                page_size=1,
                page_pad=64,
                lengths=(144, 16, 97),
                holes="random",
                sink=SINKS,
                scale_by=1.6,
                strided=True,
            ),
            drawn(
                f"prefill/mixed/{name}",
                "65 heads, lists of 700 entries and fewer, holes, sinks, max_logits",
                (*reading, *MASKS, "heads_beyond_tail"),
                op="prefill",
                layout=name,
                scales=scales,
                logit_std=spread,
                s_q=4,
                h=65,
                topk=700,
                repeats_of=2,
                page_size=53 if layout.quantised else 1,
                page_pad=64,
                lengths=(700, 333, 0, 64),
                holes="negative",
                scale_by=1.2,
                sink=SINKS,
                repeats=3,
            ),
        ]
    return cases


def _pairs() -> list[Case]:
    """Two caches: many heads, long lists, and pages, strides and lengths the other way round."""
    cases = []
    names = ("length_wraps", "extra_length_on_main", "extra_geometry")
    for main, extra in PAIRS:
        name, words = f"decode/extra/{main}+{extra}", f"{main} and {extra}"
        inline = not (LAYOUTS[main].planar or LAYOUTS[extra].planar)
        cases += [
            drawn(
                f"{name}/mixed",
                f"{words}: lengths past all bounds, pages of 16 and 53 in padded pools, 65 heads",
                (*names, "storage_offset_ignored"),
                layout=main,
                b=5,
                s_q=2,
                h=65,
                topk=70,
                page_size=16,
                page_pad=64,
                row_pad=64 * inline,
                base=4096 + 16,
                lengths=(33, INT_MAX, INT_MIN, 70, 0),
                sink=SINKS,
                extra=Extra(
                    extra,
                    topk=97,
                    page_size=53,
                    page_pad=256,
                    holes="random",
                    lengths=(INT_MAX, 96, 64, INT_MIN, 500),
                ),
            ),
            drawn(
                f"{name}/64_heads",
                f"{words}: 64 heads, 200 entries beside 900, sinks, either list empty or both",
                ("extra_cache_ignored", "sink_when_split", "extra_length_on_main"),
                layout=main,
                b=4,
                h=64,
                topk=200,
                page_pad=64,
                repeats_of=2,
                holes="large",
                lengths=(200, 0, 190, 0),
                sink=SINKS,
                scale_by=1.2,
                extra=Extra(extra, topk=900, page_size=2, page_pad=64, lengths=(900, 700, 0, 0)),
                repeats=3,
            ),
        ]
    cases.append(
        drawn(
            "decode/extra/heads_128",
            "128 heads, two query tokens, both lists with holes",
            ("extra_cache_ignored", "masked_slot_nan"),
            layout="v4_fp8",
            b=2,
            s_q=2,
            h=128,
            topk=128,
            holes="random",
            extra=Extra("v4_fp8", topk=300, page_size=2, holes="random"),
        )
    )
    return cases


def _heads_and_sinks() -> list[Case]:
    cases: list[Case] = []
    for h in (17, 40, 65, 100, 127):
        cases += both(
            f"heads/{h}",
            f"{h} query heads",
            ("heads_beyond_tail",) * (h % 8 != 0),
            h=h,
            b=2,
            topk=80,
            prefill_s_q=2,
        )
    near = tuple(42.0 + 6.3 * ((29 * head) % 64) / 64 for head in range(64))
    cases += both(
        "sink/coherent",
        "lse near 45 and sinks beside it: bf16 and fp16 hold neither",
        ("sink_rounded", "sink_ignored"),
        logit_mean=40.0,
        sink=near,
        h=64,
        b=2,
        topk=160,
        prefill_s_q=2,
    )
    cases += both(
        "sink/shifted",
        "tokens with a common mean and sinks: an output rounded before the sink is off twice",
        ("sink_ignored",),
        values="shifted",
        sink=(5.0, 5.9, 4.7, 6.6),
        b=8,
        h=16,
        topk=400,
        prefill_s_q=8,
    )
    cases += both(
        "sink/split",
        "long lists and sinks: kernels split them",
        ("sink_when_split", "sink_ignored"),
        sink=(5.0, 7.9, 6.7),
        b=1,
        h=8,
        topk=2048,
        prefill_s_q=1,
    )
    return cases


def _dense() -> list[Case]:
    def dense(name: str, about: str, shows: tuple[str, ...], spec: Sequences) -> Case:
        def build(seed: int, name: str, device: torch.device) -> list[Inputs]:
            return [draw_sequences(spec, seed, name, device)]

        return made_case(f"dense_decode/{name}", about, shows, build)

    causal = ("causal_last_tile_only", "causal_ignored", "causal_off_by_one")
    cases = [
        dense(
            "causal/across_tiles",
            "four query tokens whose ends lie on both sides of a border of 16 to 256 tokens",
            causal,
            Sequences(lengths=(17, 34, 65, 66, 67, 130, 258), s_q=4, h=8, causal=True),
        ),
        dense(
            "causal/long",
            "three query tokens of long sequences, causal",
            causal,
            Sequences(lengths=(1025, 3, 2050), s_q=3, h=4, page_size=16, causal=True),
        ),
    ]
    for layout in ("bf16", "bf16_nope", "fp8_tensor", "v32_fp8", "v4_fp8"):
        cases.append(
            dense(
                f"mixed/{layout}",
                f"{layout}, 65 heads, three query tokens, pages of 16 in a pool, some absent",
                (*causal, "absent_page_loaded"),
                Sequences(
                    lengths=(65, 400, 0, 130, 2),
                    s_q=3,
                    h=65,
                    layout=layout,
                    page_size=16,
                    page_pad=64,
                    causal=True,
                    absent=7,
                ),
            )
        )
    return cases


def _many_slots(seed: int, name: str, device: torch.device) -> list[Inputs]:
    """Rows of 304 bytes: slots either side of 2^24, where float32 has no odd numbers."""
    room_for_large_cache(device)
    g = rng(seed, name)
    layout = LAYOUTS["glm53_nope_nvfp4"]
    cache = KVCache.empty(2**24 // 64 + 4, 64, layout, device=device)
    slots = torch.unique(torch.cat([boundary_slots(cache), 2**24 + torch.arange(-8, 200)]))
    latent = normal(g, len(slots), layout.latent.count)
    tokens = made_tokens(layout, latent, latent[:, :64], "amax", g)
    write_tokens(cache, slots, tokens)
    spec = Draw(layout=layout.name)
    q = fit_queries(normal(g, 3, 4, layout.d_qk), unpack(layout, tokens, None), spec, layout)
    lists = torch.stack([slots[torch.randperm(len(slots), generator=g)[:130]] for _ in range(3)])
    q, lists = q.unsqueeze(1).to(device), lists.unsqueeze(1).int().to(device)
    return [Inputs("decode", q, cache, lists, layout.d_qk**-0.5)]


def _again() -> list[Case]:
    """Several calls of one caller that differ in what metadata does not hold."""

    def two_caches(seed: int, name: str, device: torch.device) -> list[Inputs]:
        first = Draw(
            layout="v4_fp8",
            b=3,
            h=8,
            topk=96,
            lengths=(96, 10, 64),
            sink=(1.0, -1.0),
            extra=Extra("v4_fp8", topk=130, page_size=2, lengths=(130, 2, 65)),
        )
        second = replace(
            first,
            lengths=(3, 96, 70),
            sink=(4.0, 2.0),
            scale_by=1.7,
            extra=Extra("v4_fp8", topk=130, page_size=2, lengths=(0, 129, 130)),
        )
        return [draw(spec, seed, f"{name}/{i}", device) for i, spec in enumerate((first, second))]

    def tensor_scale(seed: int, name: str, device: torch.device) -> list[Inputs]:
        specs = [Draw(layout="fp8_tensor", b=2, h=8, topk=96, values=values) for values in ORDER]
        return [draw(spec, seed, f"{name}/{i}", device) for i, spec in enumerate(specs)]

    return [
        made_case(
            "decode/stale/extra",
            "two caches, then other lengths of both lists, other sinks and another scale",
            ("stale_metadata", "stale_schedule"),
            two_caches,
        ),
        made_case(
            "decode/stale/tensor_scale",
            "one scale for the whole cache, then a cache with another one",
            ("stale_tensor_scale",),
            tensor_scale,
        ),
    ]


MIXED_CASES: tuple[Case, ...] = (
    *_layouts(),
    *_pairs(),
    *_heads_and_sinks(),
    *_dense(),
    *_again(),
    made_case(
        "decode/offsets/slots",
        "slots either side of 2^24, tokens either side of 2^31 and 2^32 bytes",
        ("slot_24_bits", "int32_overflow", "uint32_overflow"),
        _many_slots,
    ),
)
