"""Cases off the beaten path: sizes past the usual ones, strides and options of every kind.

Each of them shows a wrong kernel that every ordinary case lets pass: one that knows the sizes, the
strides or the sinks of models only.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kv_cache import KVCache
from .case import Case, Inputs
from .case_drawn import both, drawn, made_case
from .case_inputs import INT_MAX, INT_MIN, Draw, Extra, draw, made_tokens, move, normal, rng
from .case_special import boundary_slots, large_cache
from .cases_dense import Sequences, draw_sequences, seen
from .token_bytes import write_tokens


def _sizes() -> list[Case]:
    long = ("list_cut", "merge_wrong_log_base", "splits_averaged")
    return [
        *both(
            "topk/5000",
            "5000 indices: longer than models' lists",
            long,
            b=1,
            prefill_s_q=1,
            h=4,
            topk=5000,
        ),
        *both("topk/5", "5 indices", b=3, h=8, topk=5),
        drawn("decode/batch/200", "200 sequences", b=200, h=2, topk=24),
        drawn(
            "prefill/tokens/200",
            "200 query tokens",
            op="prefill",
            layout="bf16",
            page_size=1,
            s_q=200,
            h=2,
            topk=24,
        ),
        drawn("decode/s_q/9", "nine query tokens", ("first_query_indices",), s_q=9, h=4, topk=40),
        drawn(
            "decode/s_q/2_heads_128",
            "two query tokens of 128 heads",
            ("first_query_indices",),
            s_q=2,
            b=2,
            h=128,
            topk=70,
        ),
        drawn(
            "decode/s_q/4_heads_80/bf16",
            "four query tokens of 80 heads, bf16 cache",
            ("first_query_indices",),
            layout="bf16",
            s_q=4,
            b=2,
            h=80,
            topk=70,
        ),
        drawn("decode/page_size/1000", "1000 tokens per page", page_size=1000, topk=1200, h=4, b=2),
        *both(
            "lengths/extremes",
            "lengths of INT_MAX and INT_MIN, -1, and one past a multiple of 64",
            ("length_wraps", "topk_length_one_short"),
            topk=192,
            lengths=(INT_MAX, 65, INT_MIN, -1),
        ),
        *(
            drawn(
                f"decode/lengths/extremes/{layout}_64_heads",
                "such lengths where many heads' lists are cut into splits",
                ("length_wraps", "topk_length_one_short"),
                layout=layout,
                s_q=4,
                h=64,
                topk=192,
                lengths=(INT_MAX, 65, INT_MIN, -1),
            )
            for layout in ("v32_fp8", "bf16", "v4_fp8")
        ),
        made_case(
            "decode/cache/empty",
            "a cache without pages: whatever the lists hold, nothing is valid",
            ("empty_row_nan", "empty_row_lse"),
            _no_pages,
        ),
    ]


def _no_pages(seed: int, name: str, device: torch.device) -> list[Inputs]:
    inputs = draw(Draw(b=2, h=8, topk=70), seed, name, device)
    return [replace(inputs, cache=KVCache.empty(0, 64, device=device))]


def _memory() -> list[Case]:
    strides = ("packed_page_stride",)
    pool = ("storage_offset_ignored", *strides)
    cases = [
        drawn(
            f"decode/row_stride/{layout}",
            f"{layout}, {pad} bytes after each token, in a pool that begins elsewhere",
            pool,
            layout=layout,
            row_pad=pad,
            page_pad=256,
            base=4096 + 16,
            page_size=16,
            topk=100,
            h=8,
        )
        for layout, pad in (("v32_fp8", 112), ("bf16", 128), ("glm53_nope_fp8", 128))
    ]
    cases += [
        drawn(
            "decode/pool/v4_fp8",
            "v4_fp8 pages of a pool that begins elsewhere",
            pool,
            layout="v4_fp8",
            page_pad=4096,
            base=4096 + 16,
            page_size=16,
            topk=100,
            h=8,
        ),
        drawn(
            "prefill/row_stride/bf16",
            "rows further apart than they are wide, in a pool that begins elsewhere",
            pool,
            op="prefill",
            layout="bf16",
            row_pad=128,
            base=4096 + 16,
            page_size=1,
            s_q=4,
            topk=100,
            h=8,
        ),
        *both(
            "permuted",
            "q and indices in memory by heads and query tokens first",
            ("strides_from_shape",),
            b=3,
            s_q=2,
            h=6,
            topk=70,
            permuted=True,
        ),
        drawn(
            "decode/extra/permuted",
            "q and both lists in memory by query tokens first",
            ("strides_from_shape",),
            layout="v4_fp8",
            b=3,
            s_q=2,
            h=6,
            topk=70,
            permuted=True,
            extra=Extra("v4_fp8", topk=50, page_size=2),
        ),
        made_case(
            "decode/shared_list",
            "one list, expanded over all sequences and query tokens",
            ("strides_from_shape",),
            _shared_list,
        ),
        made_case(
            "decode/sliced",
            "two of three query tokens of a longer q and list",
            ("strides_from_shape",),
            _sliced,
        ),
        made_case(
            "decode/extra/offsets",
            "a second cache past 2^31 and 2^32 bytes beside a small one",
            ("int32_overflow", "uint32_overflow"),
            _large_extra,
        ),
    ]
    return cases


def _shared_list(seed: int, name: str, device: torch.device) -> list[Inputs]:
    inputs = draw(Draw(b=4, s_q=2, h=8, topk=100), seed, name, device)
    return [replace(inputs, indices=inputs.indices[:1, :1].expand(4, 2, -1))]


def _sliced(seed: int, name: str, device: torch.device) -> list[Inputs]:
    """The first two of three query tokens; the third is NaN, its list valid-looking."""
    inputs = draw(Draw(b=3, s_q=2, h=6, topk=70), seed, name, device)
    q = torch.full((3, 3, 6, 576), float("nan"), dtype=inputs.q.dtype, device=device)
    q[:, :2] = inputs.q
    lists = inputs.indices[:, :1].repeat(1, 3, 1)
    lists[:, :2] = inputs.indices
    return [replace(inputs, q=q[:, :2], indices=lists[:, :2])]


def _large_extra(seed: int, name: str, device: torch.device) -> list[Inputs]:
    """A small cache beside one past 2^32 bytes."""
    g = rng(seed, name)
    inputs = draw(Draw(layout="v4_fp8", b=3, h=4, topk=40), seed, name, device)
    layout = inputs.cache.layout
    cache = large_cache(layout.name, 64, None, device)
    slots = boundary_slots(cache)
    latent, rope = normal(g, len(slots), layout.latent.count), normal(g, len(slots), 64)
    write_tokens(cache, slots, made_tokens(layout, latent, rope, "amax", g))
    lists = torch.stack([slots[torch.randperm(len(slots), generator=g)] for _ in range(3)])
    lists = lists.unsqueeze(1).int().to(device)
    return [replace(inputs, extra_cache=cache, extra_indices=lists)]


def _options() -> list[Case]:
    """Scales, sinks and lengths that models do not have, or not together."""
    scale = ("softmax_scale_ignored",)
    heads = tuple(-2.0 + 8.3 * ((37 * head) % 128) / 128 for head in range(128))
    cases = [
        *both("scale", "a softmax scale of its own", scale, scale_by=1.37, h=8, topk=100),
        drawn(
            "decode/extra/scale",
            "a softmax scale of its own, two caches",
            scale,
            layout="v4_fp8",
            scale_by=0.61,
            h=8,
            topk=70,
            extra=Extra("v4_fp8", topk=50, page_size=2),
        ),
        *both(
            "sink/heads_128",
            "a sink with a long mantissa for each of 128 heads",
            ("sink_rounded", "sink_wrong_head", "sink_ignored"),
            sink=heads,
            h=128,
            b=2,
            topk=96,
            prefill_s_q=2,
        ),
        *both(
            "sink/overflow",
            "lse near 200, sinks beside it and 1000 away: neither has an exponential in fp32",
            ("sink_overflow",),
            logit_mean=200.0,
            sink=(199.3, 204.7, 1200.0, -1000.0, -3e38, 3e38),
            h=6,
            topk=100,
        ),
        *both(
            "logits/very_positive",
            "all logits near 7e4, past what fp16 holds",
            ("logits_clamped",),
            logit_mean=7e4,
            b=2,
            h=4,
            topk=100,
        ),
    ]
    for which, main, extra in (("main", (70, 9, 0), None), ("extra", None, (50, 9, 0))):
        cases.append(
            drawn(
                f"decode/extra/lengths_of_{which}",
                f"lengths for the {which} list only, no poison behind them",
                ("extra_length_on_main", "topk_length_ignored"),
                layout="v4_fp8",
                b=3,
                h=8,
                topk=70,
                page_size=16,
                full=True,
                lengths=main,
                extra=Extra("v4_fp8", topk=50, page_size=16, lengths=extra),
            )
        )
    return cases


def _sharp() -> list[Case]:
    """Many rows and tokens, all of which share a mean: a small gain has nothing to hide behind."""
    return both(
        "gain",
        "32 query tokens, 512 indices each, tokens with a common mean: gains of 1.5e-4 show",
        values="shifted",
        b=32,
        prefill_s_q=32,
        h=8,
        topk=512,
    )


def _dense() -> list[Case]:
    def drawn_dense(name: str, about: str, shows: tuple[str, ...], spec: Sequences) -> Case:
        def build(seed: int, name: str, device: torch.device) -> list[Inputs]:
            return [draw_sequences(spec, seed, name, device)]

        return made_case(f"dense_decode/{name}", about, shows, build)

    def scaled(seed: int, name: str, device: torch.device) -> list[Inputs]:
        made = draw_sequences(Sequences(h=8), seed, name, device)
        return [replace(made, scale=1.37 * made.scale)]

    def past_table(seed: int, name: str, device: torch.device) -> list[Inputs]:
        spec = Sequences(lengths=(256, 256, 256, 100), h=8, spare=0)
        made = draw_sequences(spec, seed, name, device)
        lengths = torch.tensor([256, 300, INT_MAX, 100], dtype=torch.int32, device=device)
        made = replace(made, cache_seqlens=lengths)
        return [replace(made, indices=seen(made))]

    def slices(seed: int, name: str, device: torch.device) -> list[Inputs]:
        made = draw_sequences(
            Sequences(lengths=(200, 64, 131), s_q=2, causal=True, h=6), seed, name, device
        )
        assert made.block_table is not None
        table = made.block_table.cpu()
        wide = torch.zeros(len(table), table.shape[1] + 5, dtype=torch.int32)
        wide[:, : table.shape[1]] = table
        q = made.q.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
        return [replace(made, q=q, block_table=move(wide[:, : table.shape[1]], device))]

    return [
        drawn_dense(
            "batch/40", "forty sequences", (), Sequences(tuple(range(1, 201, 5)), h=2, page_size=16)
        ),
        drawn_dense(
            "long", "4100 tokens and 7", ("list_cut",), Sequences((4100, 7), h=4, causal=True)
        ),
        made_case(
            "dense_decode/scale",
            "a softmax scale of its own",
            ("softmax_scale_ignored",),
            scaled,
        ),
        made_case(
            "dense_decode/lengths/past_table",
            "lengths past what the block table holds: the rest counts as absent",
            (),
            past_table,
        ),
        made_case(
            "dense_decode/strided",
            "q in memory by heads first, a block table that is a slice of a wider one",
            ("strides_from_shape",),
            slices,
        ),
    ]


SELDOM_CASES: tuple[Case, ...] = (
    *_sizes(),
    *_memory(),
    *_options(),
    *_sharp(),
    *_dense(),
)
