"""Cases of every cache layout beyond the first ones, and of two caches at once."""

from __future__ import annotations

from ..kv_layout import LAYOUTS, KVLayout
from .case import Case
from .case_drawn import drawn
from .case_inputs import Extra

NEW = tuple(
    layout
    for layout in LAYOUTS.values()
    if layout.name not in ("v32_fp8", "bf16", "bf16_nope") and not layout.extra_only
)

# As models and engines pair them; the last two differ in everything that two caches can.
PAIRS = (
    ("v4_fp8", "v4_fp8"),
    ("v41_fp8_planar", "v41_fp4_planar"),
    ("v41_fp8_inline", "v41_fp4_inline"),
    ("v32_fp8", "nvfp4_bf16_rope"),
    ("glm53_nope_nvfp4", "bf16_nope"),
)


def _reading(layout: KVLayout, page_size: int = 64) -> tuple[str, ...]:
    """The faults in reading that this layout, in pages of that size, can have."""
    scales = layout.scales
    names = []
    if layout.latent.dtype == "e2m1":
        names.append("nibbles_swapped")
    if layout.planar:
        names.append("planar_as_inline")
    if layout.planar and layout.page_bytes(page_size) != page_size * layout.bytes_per_token:
        names.append("page_padding_ignored")
    if layout.name == "v4_fp8":
        names.append("scale_table_off_by_pad")
    if layout.outer is not None or layout.tensor_scale:
        names.append("outer_scale_forgotten")
    if scales is not None and scales.dtype == "ue8m0":
        names.append("ue8m0_bias")
    return tuple(names)


def _single(layout: KVLayout) -> list[Case]:
    name = layout.name
    fp32 = ("scale_pow2_down", "scale_bf16", "dequantised_bf16")
    stored = layout.scales is not None and layout.scales.dtype == "fp32"
    return [
        drawn(
            f"decode/layout/{name}",
            f"{name}, pages of 64 tokens",
            _reading(layout),
            layout=name,
            topk=128,
            quick=name in ("v4_fp8", "glm53_nope_nvfp4"),
        ),
        # Every slot a token, every byte a number in every format: a wrong read shows which it is.
        drawn(
            f"decode/layout/{name}/full",
            f"{name}, no poison anywhere: wrong reads give numbers",
            _reading(layout, 16),
            layout=name,
            topk=128,
            values="narrow",
            full=True,
            page_size=16,
        ),
        drawn(
            f"decode/layout/{name}/tiles",
            f"{name}, a magnitude of its own for every 128 channels",
            (*_reading(layout), "scale_neighbour_tile", *fp32 * (stored or layout.tensor_scale)),
            layout=name,
            topk=96,
            values="tile_magnitudes",
        ),
        drawn(
            f"decode/layout/{name}/sparse_tiles",
            f"{name}, a third of the 128-channel tiles all zero, zeros of both signs",
            ("fp8_fnuz",) * (layout.latent.dtype == "e4m3"),
            layout=name,
            topk=96,
            values="sparse_tiles",
        ),
        drawn(
            f"decode/layout/{name}/hostile",
            f"{name}, pages of 53 in a padded pool, -1, short lengths, sinks, s_q 2, 5 heads",
            ("packed_page_stride", "page_size_64", "masked_slot_nan", "topk_length_ignored"),
            layout=name,
            b=3,
            s_q=2,
            h=5,
            topk=130,
            page_size=53,
            page_pad=4096,
            holes="random",
            lengths=(130, 65, 7),
            sink=(1.0, -2.0, 0.5),
            strided=True,
            quick=name == "v4_fp8",
        ),
        drawn(
            f"prefill/layout/{name}",
            f"prefill straight from {name}",
            (),
            op="prefill",
            layout=name,
            s_q=4,
            h=8,
            topk=96,
            page_size=61,
        ),
    ]


def _pairs() -> list[Case]:
    cases: list[Case] = []
    lengths = ("extra_length_on_main", "topk_length_ignored")
    for main, extra in PAIRS:
        name = f"decode/extra/{main}+{extra}"
        words = f"{main} and {extra}"
        reading = (*_reading(LAYOUTS[main]), *_reading(LAYOUTS[extra], 16))
        cases += [
            drawn(
                name,
                f"{words}, attended together",
                ("extra_cache_ignored", *reading),
                layout=main,
                b=3,
                h=8,
                topk=128,
                extra=Extra(extra, topk=100),
                quick=main == "v4_fp8",
            ),
            drawn(
                f"{name}/full",
                f"{words}: any slot of either is a token",
                ("extra_indices_in_main", "extra_cache_ignored"),
                layout=main,
                b=3,
                h=8,
                topk=96,
                page_size=16,
                full=True,
                extra=Extra(extra, topk=96, page_size=16),
            ),
            drawn(
                f"{name}/lengths",
                f"{words}, short lengths in both, no poison behind them",
                lengths,
                layout=main,
                b=4,
                h=8,
                topk=96,
                full=True,
                lengths=(96, 10, 0, 33),
                extra=Extra(extra, topk=96, page_size=64, lengths=(5, 70, 96, 33)),
                quick=main == "v4_fp8",
            ),
            drawn(
                f"{name}/hostile",
                f"{words}: page sizes 53 and 2, padded pools, -1, short lengths, s_q 2, sinks",
                ("packed_page_stride", "page_size_64", "extra_cache_ignored", *lengths),
                layout=main,
                b=3,
                s_q=2,
                h=5,
                topk=70,
                page_size=53,
                page_pad=128,
                holes="random",
                lengths=(70, 12, 50),
                sink=(0.5, -1.0),
                strided=True,
                extra=Extra(
                    extra,
                    topk=65,
                    page_size=2,
                    page_pad=64,
                    holes="large",
                    lengths=(3, 65, 40),
                ),
            ),
        ]
    main, extra = PAIRS[1]
    cases += [
        drawn(
            "decode/extra/main_empty",
            "an empty main list beside a full extra one",
            ("extra_cache_ignored",),
            layout=main,
            topk=0,
            h=8,
            extra=Extra(extra, topk=100),
        ),
        drawn(
            "decode/extra/extra_empty",
            "an empty extra list beside a full main one",
            layout=main,
            topk=100,
            h=8,
            extra=Extra(extra, topk=0),
        ),
        drawn(
            "decode/extra/rows_empty",
            "rows with nothing valid in one list, in the other, in both",
            ("empty_row_nan", "empty_row_lse", "extra_cache_ignored"),
            layout=main,
            b=6,
            h=8,
            topk=64,
            holes="some_rows_empty",
            lengths=(0, 64, 64, 64, 0, 64),
            extra=Extra(extra, topk=64, lengths=(64, 0, 64, 64, 0, 64)),
        ),
        drawn(
            "decode/extra/split",
            "128 entries and 1024 beside them: kernels split them",
            ("merge_wrong_log_base",),
            layout="v4_fp8",
            b=1,
            h=8,
            topk=128,
            extra=Extra("v4_fp8", topk=1024, page_size=2),
        ),
    ]
    return cases


LAYOUT_CASES: tuple[Case, ...] = (*(case for layout in NEW for case in _single(layout)), *_pairs())
