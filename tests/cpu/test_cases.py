"""The catalogue: deterministic, poisoned where it says so, and passed by every correct kernel."""

from __future__ import annotations

import pytest
import torch
from gate_kernels import Folding, Ideal

from sparse_mla import reference
from sparse_mla.accuracy import budgets, case_inputs, case_special
from sparse_mla.accuracy.case import Case, Inputs
from sparse_mla.accuracy.case_inputs import Draw, draw
from sparse_mla.accuracy.cases import CASES, random_case
from sparse_mla.accuracy.gate import PASSED, prepare, run_case
from sparse_mla.kv_layout import LAYOUTS

CPU = torch.device("cpu")
KERNELS = (Ideal(), Folding(), Folding(16))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_correct_kernels_pass(case: Case) -> None:
    ready = prepare(case)
    if ready.reason is not None:
        pytest.skip(ready.reason)
    for kernel in KERNELS:
        result = run_case(kernel, case, prepared=ready)
        assert result.status == PASSED, f"{kernel.name}: {result.detail}"


@pytest.mark.parametrize("block", range(8))
def test_random_cases_raise_no_alarm(block: int) -> None:
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        case = random_case(seed)
        ready = prepare(case)
        for kernel in KERNELS:
            result = run_case(kernel, case, prepared=ready)
            assert result.status == PASSED, f"{seed}, {kernel.name}: {case.about}: {result.detail}"


def test_names_are_unique_and_ops_agree() -> None:
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.name.split("/")[0] == case.op


def test_every_fault_line_has_a_case() -> None:
    needed = {
        "scale_pow2_down", "scale_bf16", "scale_neighbour_tile", "scale_neighbour_token",
        "masked_slot_nan", "first_chunk_nan", "masked_chunk_counts", "finite_sentinel",
        "int32_overflow", "uint32_overflow", "index_too_large_loaded", "index_negative_loaded",
        "topk_length_ignored", "duplicates_dropped", "stale_metadata", "empty_row_nan",
        "empty_row_poisons_batch", "empty_row_lse", "merge_wrong_log_base",
        "empty_split_lse_zero", "first_query_indices", "rope_not_read", "rope_scaled",
        "rope_interleaved", "heads_beyond_tail", "head_padding_nan", "p_rounded_before_sum",
        "sink_in_lse", "sink_base2", "page_size_64", "last_block_unmasked", "race", "lse_base2",
        "writer_zero_tile_nan", "writer_no_saturation", "writer_slot_off_by_page",
        "nibbles_swapped", "planar_as_inline", "scale_table_off_by_pad", "page_padding_ignored",
        "outer_scale_forgotten", "ue8m0_bias", "extra_cache_ignored", "extra_indices_in_main",
        "extra_length_on_main", "writer_planar_as_inline", "causal_ignored", "causal_from_start",
        "causal_off_by_one", "last_page_unmasked", "sequence_one_short", "first_sequence_length",
        "first_sequence_table", "table_stride_of_pages", "pages_contiguous", "absent_page_loaded",
    }  # fmt: skip
    shown = {name for case in CASES for name in case.shows}
    assert needed <= shown


def test_every_layout_has_cases() -> None:
    ops = ("decode", "prefill", "dense_decode", "kv_write")
    seen: dict[str, set[str]] = {op: set() for op in ops}
    beside = set()
    for case in CASES:
        if "offsets" in case.name or "real" in case.name:
            continue
        for call in case.build(0, CPU):
            seen[case.op].add(call.cache.layout.name)
            if isinstance(call, Inputs) and call.extra_cache is not None:
                beside.add(call.extra_cache.layout.name)
    alone = {name for name, layout in LAYOUTS.items() if not layout.extra_only}
    assert seen["decode"] == alone and seen["kv_write"] == set(LAYOUTS)
    assert seen["prefill"] == alone
    assert seen["dense_decode"] == {"bf16", "bf16_nope", "fp8_tensor", "v32_fp8", "v4_fp8"}
    assert beside >= set(LAYOUTS) - alone


def test_dense_calls_amount_to_their_lists() -> None:
    """The gate's oracle reads lists; the one for dense calls reads tables and lengths."""
    for case in (case for case in CASES if case.op == "dense_decode"):
        for call in case.build(0, CPU):
            assert isinstance(call, Inputs)
            assert call.block_table is not None and call.cache_seqlens is not None
            wanted = reference.dense_decode(
                call.q,
                call.cache,
                call.block_table,
                call.cache_seqlens,
                scale=call.scale,
                causal=call.causal,
            )
            made = budgets.answer(call)
            same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True, "msg": case.name}
            torch.testing.assert_close(made.out, wanted.out.flatten(0, 1), **same)
            torch.testing.assert_close(made.lse, wanted.lse.flatten(0, 1), **same)


def test_what_a_dense_call_does_not_see_is_nan() -> None:
    case = next(c for c in CASES if c.name == "dense_decode/page_size/53")
    (call,) = case.build(0, CPU)
    assert isinstance(call, Inputs)
    live = torch.isfinite(call.cache.read(torch.arange(call.cache.num_slots))).all(1)
    assert set(live.nonzero().flatten().tolist()) == set(call.indices.unique().tolist()) - {-1}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not LAYOUTS[name].extra_only])
def test_everything_unselected_is_nan_in_every_layout(layout: str) -> None:
    inputs = draw(Draw(b=2, topk=40, page_size=61, page_pad=64, layout=layout), 0, "x", CPU)
    rows = inputs.cache.read(torch.arange(inputs.cache.num_slots))
    live = torch.isfinite(rows).all(1)
    assert not live[0] and live[-1] and bool(torch.isnan(rows[~live]).all())
    full = draw(Draw(b=2, topk=40, page_size=61, layout=layout, full=True), 0, "x", CPU)
    assert bool(full.cache.read(torch.arange(full.cache.num_slots)).isfinite().all())


def test_same_seed_same_bytes() -> None:
    spec = Draw(b=2, topk=64, scales="log_uniform", holes="random")
    a, b, c = (draw(spec, seed, "x", CPU) for seed in (3, 3, 4))
    assert torch.equal(a.q, b.q) and torch.equal(a.indices, b.indices)
    assert torch.equal(a.cache.pages, b.cache.pages)
    assert not torch.equal(a.indices, c.indices)


def test_everything_unselected_is_nan() -> None:
    inputs = draw(Draw(b=2, topk=40, page_size=61, page_pad=64, layout="bf16"), 0, "x", CPU)
    rows = inputs.cache.read(torch.arange(inputs.cache.num_slots))
    live = torch.isfinite(rows).all(1)
    assert not live[0] and live[-1]
    assert bool(torch.isnan(rows[~live]).all())
    assert set(inputs.indices.unique().tolist()) <= set(live.nonzero().flatten().tolist())
    storage = torch.empty(0, dtype=torch.uint8).set_(inputs.cache.pages.untyped_storage())
    assert bool((storage.view(inputs.cache.num_pages, -1)[:, -64:] == 0xFF).all())


def test_entries_past_the_length_look_valid_and_are_nan() -> None:
    inputs = draw(Draw(b=2, topk=64, lengths=(10, 64)), 0, "x", CPU)
    beyond = inputs.indices[0, 0, 10:]
    assert bool(((beyond >= 0) & (beyond < inputs.cache.num_slots)).all())
    assert bool(torch.isnan(inputs.cache.read(beyond)).all())


@pytest.mark.parametrize("scales", sorted(case_inputs.SCALES))
def test_scales_are_what_they_say(scales: str) -> None:
    g = case_inputs.rng(0, "scales")
    made = case_inputs.SCALES[scales](g, 500, 4)
    mantissa = torch.frexp(made)[0] * 2
    bf16 = made.to(torch.bfloat16).float() / made - 1
    if scales.endswith("bf16_midpoint"):
        sign = -1 if scales.startswith("below") else 1
        assert bool((sign * bf16 > 3e-3).all())
    if scales == "below_pow2":
        assert bool((mantissa > 1.97).all())
    zeros = float((made == 0).double().mean())
    assert 0.25 < zeros < 0.4 if scales == "some_zero" else zeros == 0
    assert bool((made >= 0).all() and torch.isfinite(made).all())


def test_queries_give_the_logits_asked_for() -> None:
    inputs = draw(Draw(b=8, logit_std=3.0), 0, "x", CPU)
    keys = inputs.cache.read(inputs.indices[0, 0])
    logits = inputs.q[0, 0].double() @ keys.T * inputs.scale
    assert float(logits.std()) == pytest.approx(3.0, rel=0.2)


def test_offsets_cross_both_boundaries() -> None:
    case = next(c for c in CASES if c.name == "decode/offsets/packed")
    (call,) = case.build(0, CPU)
    assert isinstance(call, Inputs)
    offsets = call.indices.long().unique() * call.cache.token_stride
    for limit in (2**31, 2**32):
        assert bool((offsets < limit).any() and (offsets > limit).any())
        assert bool(((offsets < limit) & (offsets + call.cache.token_stride > limit)).any())


def test_very_negative_logits_are_below_sentinels() -> None:
    case = next(c for c in CASES if c.name == "decode/logits/very_negative")
    ready = prepare(case)
    assert ready.expected[0] is not None
    assert float(ready.expected[0].ref.max_logits.max()) < -5e4


def test_two_level_weight_is_representable_in_fp16_only() -> None:
    weight = torch.tensor(case_special.TWO_LEVEL)
    assert float(weight.half()) == case_special.TWO_LEVEL
    assert float(weight.bfloat16()) / case_special.TWO_LEVEL - 1 < -2.5e-3
