"""The fault library: its models, what the gate makes of them, and that docs/faults.md is current.

The module's fixture runs every fault through the gate once; a test then looks at its part.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from sparse_mla.accuracy import budgets
from sparse_mla.accuracy.case import Inputs, Output, WriteInputs
from sparse_mla.accuracy.case_inputs import Draw, draw
from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.diagnose import NOTHING_FITS, diagnose, investigate, observe, verdict
from sparse_mla.accuracy.fault_gate import (
    Bench,
    FaultsReport,
    print_report,
    random_alarms,
    try_faults,
)
from sparse_mla.accuracy.faults import FAULTS, CleanKernel, get_fault
from sparse_mla.accuracy.faults_fault import Fault
from sparse_mla.accuracy.faults_kernel import EXACT, KERNEL, UNROUNDED, Arithmetic
from sparse_mla.accuracy.faults_reading import DuplicatesDropped
from sparse_mla.accuracy.faults_whole import LseBase2
from sparse_mla.accuracy.gate import FAILED, NOT_RUN, PASSED
from sparse_mla.accuracy.metrics import same_bits
from sparse_mla.accuracy.writes import storage_bytes
from sparse_mla.kv_cache import KVCache

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
NAMES = [fault.name for fault in FAULTS]
ATTENTION = [fault for fault in FAULTS if fault.op == "attention"]
WRITING = [fault for fault in FAULTS if fault.op == "kv_write"]

# A kernel under test orders its work as it likes; the models do not know how.
OTHER_ARITHMETIC = {
    "three splits": Arithmetic(splits=3),
    "chunks of 32": Arithmetic(chunk=32),
    "chunks of 128, fp16 weights": Arithmetic(weights=torch.float16, chunk=128, splits=2),
    "fp32 weights": Arithmetic(weights=None),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report() -> FaultsReport:
    return try_faults(random_cases=0)


def hostile(op: str = "decode") -> Inputs:
    """A call in which most conditions of `Fault.applies` hold."""
    spec = Draw(
        op=op,
        b=3,
        s_q=2 if op == "decode" else 3,
        h=5,
        topk=100,
        page_size=53,
        page_pad=48,
        holes="negative",
        scales="log_uniform",
        sink=(1.0, -2.0, 0.5),
        lengths=(100, 37, 80),
    )
    return draw(spec, 0, "hostile", CPU)


# What the gate and the diagnosis make of the library.


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_caught_and_named(report: FaultsReport, name: str) -> None:
    result = next(r for r in report.faults if r.fault.name == name)
    if result.not_run and result.case is None:
        pytest.skip("; ".join(result.not_run))
    assert result.caught
    assert result.named == name, result.diagnosis


@pytest.mark.slow
def test_clean_kernel_passes_the_catalogue(report: FaultsReport) -> None:
    assert report.alarms == ()
    assert report.passed + sum(prepared_not_run(case.name) for case in CASES) == len(CASES)


def prepared_not_run(name: str) -> bool:
    return "offsets" in name and Bench().run(CleanKernel(), BY_NAME[name]).status == NOT_RUN


@pytest.mark.slow
def test_no_false_alarm_in_2000_random_cases() -> None:
    assert random_alarms(range(1800)) == []
    split = CleanKernel(Arithmetic(splits=3, chunk=32))
    assert random_alarms(range(1800, 2000), kernel=split) == []


def test_random_cases_can_raise_an_alarm() -> None:
    assert random_alarms(range(20), kernel=get_fault("rope_not_read").kernel())


@pytest.mark.parametrize(
    "name",
    [
        "scale_pow2_down", "scale_bf16", "dequantised_bf16", "masked_slot_nan", "first_chunk_nan",
        "masked_chunk_counts", "finite_sentinel", "finite_maximum", "int32_overflow",
        "uint32_overflow", "index_too_large_loaded", "index_negative_loaded",
        "topk_length_ignored", "topk_length_one_short", "duplicates_dropped", "stale_metadata",
        "stale_schedule", "empty_row_nan", "empty_row_poisons_batch", "empty_row_lse",
        "nan_spreads", "empty_split_lse_zero", "first_query_indices", "first_query_mask",
        "heads_beyond_tail", "heads_leak", "head_padding_nan",
        "sink_in_lse", "sink_base2", "sink_ignored", "page_size_64", "packed_page_stride",
        "last_block_unmasked", "last_block_next_row", "nibbles_swapped", "planar_as_inline",
        "scale_table_off_by_pad", "page_padding_ignored", "outer_scale_forgotten", "ue8m0_bias",
        "extra_cache_ignored", "extra_indices_in_main", "extra_length_on_main",
    ],
)  # fmt: skip
def test_plain_input_does_not_show_it(name: str) -> None:
    """Without the cases made for it, the fault would be missed: those cases do the catching."""
    spec = Draw(b=2, h=16, topk=128, page_size=64, scales="pow2")
    plain = replace(BY_NAME["decode/gaussian"], build=lambda s, d: [draw(spec, s, "plain", d)])
    assert Bench().run(get_fault(name).kernel(), plain).status == PASSED


def test_summary_counts_what_was_missed() -> None:
    """A catalogue that cannot show a fault must be reported as missing it."""
    faults = [get_fault("rope_not_read"), get_fault("duplicates_dropped")]
    missing = try_faults(faults, [BY_NAME["decode/rope"]], random_cases=0)
    console = Console(width=120, record=True)
    assert print_report(missing, console) == 1
    assert console.export_text().rstrip().splitlines()[-1] == "1/2 faults caught"
    both = [BY_NAME["decode/rope"], BY_NAME["decode/duplicates"]]
    found = try_faults(faults, both, random_cases=1)
    assert print_report(found, console) == 0
    assert console.export_text().rstrip().splitlines()[-1] == "2/2 faults caught"


# The models.


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize(("chunk", "splits"), [(64, 1), (64, 2), (32, 3), (128, 7), (64, 1 << 20)])
def test_clean_model_is_the_oracle(op: str, chunk: int, splits: int) -> None:
    inputs = hostile(op)
    wanted = budgets.answer(inputs)
    kernel = CleanKernel(replace(EXACT, chunk=chunk, splits=splits))
    got = kernel.run(inputs, kernel.new_state())
    assert got.max_logits is not None
    torch.testing.assert_close(got.out.view(wanted.out.shape), wanted.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse.view(wanted.lse.shape), wanted.lse, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.max_logits.view(wanted.lse.shape), wanted.max_logits)


@pytest.mark.parametrize("name", [case.name for case in CASES if "/layout/" in case.name])
def test_clean_model_reads_every_layout(name: str) -> None:
    for inputs in BY_NAME[name].build(5, CPU):
        if isinstance(inputs, Inputs):
            same_as_the_oracle(inputs)


@pytest.mark.parametrize("name", [case.name for case in CASES if "/extra/" in case.name])
def test_clean_model_attends_to_two_caches(name: str) -> None:
    for inputs in BY_NAME[name].build(5, CPU):
        assert isinstance(inputs, Inputs)
        same_as_the_oracle(inputs)


def same_as_the_oracle(inputs: Inputs) -> None:
    wanted = budgets.answer(inputs)
    kernel = CleanKernel(replace(EXACT, chunk=32, splits=2))
    got = kernel.run(inputs, kernel.new_state())
    torch.testing.assert_close(got.out.view(wanted.out.shape), wanted.out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.lse.view(wanted.lse.shape), wanted.lse, rtol=1e-12, atol=0)


def test_clean_writer_is_the_cache_writer() -> None:
    for case in CASES:
        if case.op == "kv_write" and "offsets" not in case.name:
            for mine, theirs in zip(case.build(3, CPU), case.build(3, CPU), strict=True):
                assert isinstance(mine, WriteInputs) and isinstance(theirs, WriteInputs)
                CleanKernel().write(mine)
                theirs.cache.append(theirs.latent, theirs.rope, theirs.slots,
                                    scale_rounding=theirs.scale_rounding)  # fmt: skip
                mine_all, theirs_all = storage_bytes(mine.cache), storage_bytes(theirs.cache)
                assert torch.equal(mine_all, theirs_all), case.name


@pytest.mark.parametrize("fault", ATTENTION, ids=lambda fault: fault.name)
def test_applies_is_true_wherever_the_answer_changes(fault: Fault) -> None:
    """Where `applies` says no, the model answers as the clean kernel does, bit for bit."""
    names = (
        "decode/gaussian",
        "decode/gaussian/bf16",
        "prefill/gaussian/bf16_nope",
        "decode/holes/random",
        "decode/lengths/short",
        "decode/s_q/2",
        "decode/heads/5",
        "decode/heads/64",
        "decode/page_size/1",
        "decode/sink/finite",
        "decode/layout/v4_fp8",
        "decode/layout/v41_fp8_inline",
        "decode/layout/glm53_nope_nvfp4",
        "decode/layout/fp8_tensor",
        "decode/extra/v32_fp8+nvfp4_bf16_rope",
        "decode/extra/v4_fp8+v4_fp8/lengths",
        "dense_decode/gaussian",
        "dense_decode/causal",
        "dense_decode/layout/v32_fp8",
    )
    clean = CleanKernel(UNROUNDED)
    for name in names:
        (inputs,) = BY_NAME[name].build(0, CPU)
        assert isinstance(inputs, Inputs)
        if fault.can_show(inputs):
            continue
        wanted = clean.run(inputs, clean.new_state())
        for variant in range(len(fault.variants)):
            if {"chunk", "splits"} & set(fault.variants[variant]):
                continue
            kernel = fault.kernel(UNROUNDED, variant)
            got = kernel.run(inputs, kernel.new_state())
            assert same_bits(got, wanted), name


@pytest.mark.parametrize("fault", ATTENTION, ids=lambda fault: fault.name)
def test_empty_calls(fault: Fault) -> None:
    """No sequence, no entry, no page: the models answer instead of crashing."""
    cache = KVCache.empty(0, 64)
    for b, topk in ((0, 64), (2, 0), (2, 3)):
        q = torch.zeros(b, 1, 4, 576, dtype=torch.bfloat16)
        indices = torch.zeros(b, 1, topk, dtype=torch.int32)
        kernel = fault.kernel()
        output = kernel.run(Inputs("decode", q, cache, indices, 0.1), kernel.new_state())
        assert output.out.shape == (b, 1, 4, 512)


def test_unknown_fault_name() -> None:
    with pytest.raises(ValueError, match="no_such_fault"):
        get_fault("no_such_fault")


def test_names_agree_with_the_catalogue() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 24
    assert {name for case in CASES for name in case.shows} <= set(NAMES)


# The diagnosis.

TOLD_APART = {
    "scale_pow2_down": "decode/scales/log_uniform",
    "scale_bf16": "decode/scales/log_uniform",
    "dequantised_bf16": "decode/scales/log_uniform",
    "scale_neighbour_tile": "decode/scales/log_uniform",
    "first_chunk_nan": "decode/holes/chunk",
    "masked_chunk_counts": "decode/holes/chunk",
    "duplicates_dropped": "decode/duplicates",
    "stale_schedule": "decode/stale/longer",
    "merge_wrong_log_base": "decode/split",
    "empty_split_lse_zero": "decode/split/short",
    "rope_interleaved": "decode/rope",
    "p_fp8": "decode/gaussian",
    "logits_bf16": "decode/gaussian",
    "sink_base2": "decode/sink/finite",
    "nibbles_swapped": "decode/layout/glm53_nope_nvfp4",
    "planar_as_inline": "decode/layout/v41_fp8_planar",
    "scale_table_off_by_pad": "decode/layout/v4_fp8/full",
    "page_padding_ignored": "decode/layout/v4_fp8/full",
    "outer_scale_forgotten": "decode/layout/nvfp4_bf16_rope",
    "ue8m0_bias": "decode/layout/v41_fp8_inline",
    "extra_cache_ignored": "decode/extra/v4_fp8+v4_fp8",
    "extra_indices_in_main": "decode/extra/v41_fp8_planar+v41_fp4_planar/full",
    "extra_length_on_main": "decode/extra/v41_fp8_inline+v41_fp4_inline/lengths",
    "causal_off_by_one": "dense_decode/causal",
    "pages_contiguous": "dense_decode/page_size/53",
    "absent_page_loaded": "dense_decode/absent_pages",
}


def wide_holes(seed: int, device: torch.device) -> list[Inputs]:
    """Whole chunks of up to 128 are masked, at the front of one row and inside another."""
    inputs = draw(Draw(b=2, topk=512), seed, "wide holes", device)
    inputs.indices[0, 0, :256] = -1
    inputs.indices[1, 0, 128:384] = -1
    return [inputs]


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", OTHER_ARITHMETIC)
@pytest.mark.parametrize("name", TOLD_APART)
def test_named_whatever_the_arithmetic(name: str, arithmetic: str) -> None:
    """The wrong kernel has other chunks, splits and weights than the model of its fault."""
    work = OTHER_ARITHMETIC[arithmetic]
    if name == "p_fp8" and work.weights is None:
        pytest.skip("the fault is the precision of the weights")
    if name.startswith(("merge", "empty_split")) and work.splits == 1:
        work = replace(work, splits=4)  # without a split these faults do nothing
    kernel = get_fault(name).kernel()
    kernel.arithmetic = work
    case = BY_NAME[TOLD_APART[name]]
    if case.name == "decode/holes/chunk":
        case = replace(case, build=wide_holes)
    assert Bench().run(kernel, case).status == FAILED
    found, _ = investigate(kernel, [case], CASES, 0, CPU)
    assert found.name == name, found.text


def test_bf16_scales_times_values_in_bf16_are_named() -> None:
    """FlashMLA's arithmetic on Hopper: both roundings, of which the first is the fault's name."""
    kernel = get_fault("scale_bf16").kernel(variant=1)
    failing = [BY_NAME[f"decode/{name}"] for name in ("gaussian", "outlier_channels", "shifted")]
    found, _ = investigate(kernel, failing, CASES, 0, CPU)
    assert found.name == "scale_bf16" and "product bf16" in found.text


@pytest.mark.parametrize(
    "name",
    [
        "decode/gaussian",
        "decode/holes/chunk",
        "decode/nan/contained",
        "decode/sink/infinite",
        "kv_write/gaussian",
    ],
)
def test_a_clean_kernel_matches_no_fault(name: str) -> None:
    found = verdict(diagnose([observe(CleanKernel(), BY_NAME[name], 0, CPU)]))
    assert (found.name, found.tied, found.text) == (None, (), NOTHING_FITS)


class Shifted(CleanKernel):
    """A fault the library does not know: output dims rotated by one."""

    def run(self, inputs: Inputs, state: object) -> Output:
        output = super().run(inputs, state)
        return replace(output, out=output.out.roll(1, -1))


def test_an_unknown_fault_gets_no_name() -> None:
    cases = [BY_NAME["decode/gaussian"], BY_NAME["decode/rope"]]
    found, _ = investigate(Shifted(), cases, CASES, 0, CPU)
    assert found.name is None and found.text == NOTHING_FITS


class TwoFaults(DuplicatesDropped, LseBase2):
    """Wrong in two ways, of which one case shows one and the other both."""


def test_two_faults_are_not_taken_for_one() -> None:
    cases = [BY_NAME["decode/lse"], BY_NAME["decode/duplicates"]]
    found, _ = investigate(TwoFaults(), cases, CASES, 0, CPU)
    assert found.name is None
    assert "decode/lse matches lse_base2" in found.text


def test_ties_are_listed_and_resolved() -> None:
    """Both read NaN from padded pages of 61 tokens; other cases tell them apart."""
    spec = Draw(page_size=61, page_pad=112, topk=64)
    case = replace(BY_NAME["decode/gaussian"], build=lambda s, d: [draw(spec, s, "both", d)])
    kernel = get_fault("packed_page_stride").kernel()
    alone = verdict(diagnose([observe(kernel, case, 0, CPU)]))
    assert alone.name is None
    assert {match.fault.name for match in alone.tied} >= {"packed_page_stride", "page_size_64"}
    found, evidence = investigate(kernel, [case], CASES, 0, CPU)
    assert found.name == "packed_page_stride"
    assert len(evidence) > 1


def test_right_answers_rule_a_fault_out() -> None:
    """An output that looks like a fault, beside one where that fault would have shown."""
    log_uniform, amax = BY_NAME["decode/scales/log_uniform"], BY_NAME["decode/scales/amax"]
    wrong = observe(get_fault("scale_pow2_down").kernel(), log_uniform, 0, CPU)
    right = observe(CleanKernel(), amax, 0, CPU)
    assert verdict(diagnose([wrong])).name == "scale_pow2_down"
    assert verdict(diagnose([wrong, right])).name is None


class FlashMlaConvention(CleanKernel):
    """+inf as the lse of an empty row, and a fault."""

    def run(self, inputs: Inputs, state: object) -> Output:
        output = get_fault("rope_not_read").kernel().run(inputs, {})
        lse = torch.where(output.lse == float("-inf"), float("inf"), output.lse)
        return replace(output, lse=lse, empty_lse=float("inf"))


def test_lse_convention_is_not_a_fault() -> None:
    case = BY_NAME["decode/holes/some_rows_empty"]
    found, _ = investigate(FlashMlaConvention(), [case], CASES, 0, CPU)
    assert found.name == "rope_not_read"


def test_wrong_shape_is_no_crash() -> None:
    class Cut(CleanKernel):
        def run(self, inputs: Inputs, state: object) -> Output:
            output = super().run(inputs, state)
            return replace(output, out=output.out[..., :256])

    found = verdict(diagnose([observe(Cut(), BY_NAME["decode/gaussian"], 0, CPU)]))
    assert found.text == NOTHING_FITS


@pytest.mark.parametrize("fault", WRITING, ids=lambda fault: fault.name)
def test_writer_faults_leave_plain_tokens_alone(fault: Fault) -> None:
    """Except those about the slot, writer faults need their own inputs."""
    status = Bench().run(fault.kernel(), BY_NAME["kv_write/bf16_nope"]).status
    assert status == (FAILED if fault.name == "writer_slot_off_by_page" else PASSED)


# docs/faults.md.


def table_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "faults_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_document_lists_the_library() -> None:
    tool = table_tool()
    text = tool.DOCUMENT.read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run tools/faults_table.py --write"
    assert all(f"`{name}`" in tool.table() for name in NAMES)


def test_kernel_arithmetic_is_the_gates() -> None:
    """The mutants round as kernels do: bf16 weights and output, fp32 in between."""
    assert (KERNEL.compute, KERNEL.weights, KERNEL.output) == (
        torch.float32, torch.bfloat16, torch.bfloat16)  # fmt: skip
