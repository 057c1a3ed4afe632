"""Calls with more work than a GPU has multiprocessors.

Launchers choose kernels and plans by how much there is to do: other kernels for many blocks of
heads, lists that are not cut, items of several rounds dealt out or cut by their lengths. The other
cases are small; these are as large as it takes to meet what a serving engine's batches run.
"""

from __future__ import annotations

from .case import Case
from .case_drawn import drawn
from .case_inputs import Extra

# Of many sequences: full, empty, one entry, tiles' borders and between.
LENGTHS = (150, 0, 1, 64, 149, 65, 100, 37, 128, 129, 12)


def _fp8() -> list[Case]:
    """64 heads and more over FP8 caches: kernels of whole blocks of heads."""
    return [
        drawn("decode/busy/64_heads", "40 query tokens of 64 heads", b=20, s_q=2, h=64, topk=150),
        drawn(
            "decode/busy/scales/log_uniform",
            "40 query tokens of 64 heads, fp32 scales of all mantissas",
            ("scale_bf16", "scale_pow2_down"),
            scales="log_uniform",
            b=40,
            h=64,
            topk=260,
        ),
        drawn(
            "decode/busy/scales/wide",
            "36 query tokens of 64 heads, tiny or huge scales",
            ("scale_bf16",),
            scales="wide",
            b=36,
            h=64,
            topk=150,
        ),
        drawn(
            "decode/busy/scales/some_zero",
            "36 query tokens of 64 heads, some scales are zero",
            scales="some_zero",
            b=36,
            h=64,
            topk=150,
        ),
        drawn(
            "decode/busy/lengths",
            "40 query tokens of 70 heads, holes, lengths, sinks",
            ("topk_length_ignored", "topk_length_one_short", "sink_ignored"),
            b=40,
            h=70,
            topk=150,
            holes="random",
            lengths=LENGTHS,
            sink=(0.5, -1.0, 2.0),
        ),
        drawn("decode/busy/20_heads", "100 query tokens of 20 heads", b=100, h=20, topk=130),
        drawn(
            "prefill/busy/64_heads/v32_fp8",
            "40 query tokens of 64 heads, max_logits",
            op="prefill",
            page_size=1,
            s_q=40,
            h=64,
            topk=150,
        ),
    ]


def _lists() -> list[Case]:
    """More lists than multiprocessors, over one cache and over two."""
    cases = []
    for b, about in ((140, "a few more lists"), (270, "twice as many lists")):
        cases += [
            drawn(
                f"decode/busy/{b}_lists/v4_fp8",
                f"{about} than multiprocessors, lengths",
                ("topk_length_ignored", "topk_length_one_short"),
                layout="v4_fp8",
                b=b,
                h=8,
                topk=150,
                lengths=LENGTHS,
            ),
            drawn(
                f"decode/busy/{b}_lists/extra",
                f"{about} than multiprocessors, two caches, lengths of both",
                ("extra_length_on_main", "extra_cache_ignored"),
                layout="v4_fp8",
                b=b,
                h=4,
                topk=130,
                lengths=(130, 0, 64, 99, 1),
                extra=Extra("v4_fp8", topk=140, page_size=2, lengths=(0, 140, 65, 3, 128, 17, 64)),
            ),
        ]
    cases.append(
        drawn(
            "decode/busy/140_lists/64_heads",
            "a few more lists of 64 heads than multiprocessors, lengths",
            ("topk_length_ignored",),
            layout="v4_fp8",
            b=140,
            h=64,
            topk=70,
            lengths=(70, 0, 1, 64, 65),
        )
    )
    return cases


BUSY_CASES: tuple[Case, ...] = (*_fp8(), *_lists())
