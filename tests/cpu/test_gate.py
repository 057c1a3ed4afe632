"""The gate: wrong kernels fail, missing ones are not offered, what cannot run is never passed."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from gate_kernels import Folding, Ideal

from sparse_mla.accuracy import gate, writes
from sparse_mla.accuracy.case import Case, Inputs, NotOffered, Output, WriteInputs
from sparse_mla.accuracy.case_inputs import NotRun
from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.gate import FAILED, NOT_OFFERED, NOT_RUN, PASSED, run_case
from sparse_mla.accuracy.providers import ModuleProvider
from sparse_mla.kv_cache import KVCache

BY_NAME = {c.name: c for c in CASES}
GAUSSIAN = BY_NAME["decode/gaussian"]


class Pow2(Ideal):
    """Scales rounded down to powers of two."""

    name = "pow2"

    def run(self, inputs: Inputs, state: Any) -> Output:
        cache = inputs.cache
        rows = cache.rows_view().clone()
        bits = rows[..., 512:528].contiguous().view(torch.int32) & 0x7F800000
        rows[..., 512:528] = bits.view(torch.uint8)
        wrong = KVCache.from_tensor(rows, cache.layout)
        return super().run(replace(inputs, cache=wrong), state)


class Moving(Ideal):
    """Every second call differs in its last bit."""

    name = "moving"
    calls = 0

    def run(self, inputs: Inputs, state: Any) -> Output:
        output = super().run(inputs, state)
        self.calls += 1
        if self.calls % 2 == 0:
            output.lse.add_(1e-6)
        return output


class Scribbler(Ideal):
    name = "scribbler"

    def run(self, inputs: Inputs, state: Any) -> Output:
        output = super().run(inputs, state)
        inputs.cache.pages[0, 0] ^= 1
        return output


class Crashing(Ideal):
    name = "crashing"

    def run(self, inputs: Inputs, state: Any) -> Output:
        raise RuntimeError("an illegal memory access\nwas encountered")


class Nothing(Ideal):
    name = "nothing"

    def run(self, inputs: Inputs, state: Any) -> Output:
        raise NotOffered("no such op")

    def write(self, inputs: WriteInputs) -> None:
        raise NotImplementedError("no writer")


class StateReuser(Ideal):
    """Keeps the first call's lengths in its state, as stale metadata does."""

    name = "stale"

    def new_state(self) -> dict[str, Any]:
        return {}

    def run(self, inputs: Inputs, state: Any) -> Output:
        lengths = state.setdefault("lengths", inputs.topk_length)
        return super().run(replace(inputs, topk_length=lengths), state)


def test_pow2_is_caught_on_arbitrary_scales_only() -> None:
    assert run_case(Pow2(), GAUSSIAN).status == FAILED
    assert run_case(Pow2(), BY_NAME["decode/scales/pow2"]).status == PASSED
    real = run_case(Pow2(), BY_NAME["decode/real/amax/0"])
    assert real.status == FAILED and real.outputs
    assert run_case(Pow2(), BY_NAME["decode/real/pow2"]).status == PASSED


def test_scales_rounded_to_bf16_are_caught() -> None:
    class Bf16(Pow2):
        def run(self, inputs: Inputs, state: Any) -> Output:
            cache = inputs.cache
            rows = cache.rows_view().clone()
            scales = rows[..., 512:528].contiguous().view(torch.float32)
            rows[..., 512:528] = scales.bfloat16().float().view(torch.uint8)
            wrong = KVCache.from_tensor(rows, cache.layout)
            return Folding().run(replace(inputs, cache=wrong), state)

    for name in ("decode/scales/below_bf16_midpoint", "decode/logits/coherent"):
        assert run_case(Bf16(), BY_NAME[name]).status == FAILED


def test_moving_bits_fail_only_where_calls_repeat() -> None:
    result = run_case(Moving(), BY_NAME["decode/repeats"])
    assert result.status == FAILED and "10 of 19 repeated calls" in result.detail


def test_changed_inputs_are_noticed() -> None:
    result = run_case(Scribbler(), GAUSSIAN)
    assert result.status == FAILED and "changed its input cache" in result.detail


def test_a_crash_is_a_failure_in_one_line() -> None:
    result = run_case(Crashing(), GAUSSIAN)
    assert result.status == FAILED
    assert result.detail == "RuntimeError: an illegal memory access was encountered"


def test_not_offered_is_not_passed() -> None:
    for name in ("decode/gaussian", "kv_write/gaussian"):
        result = run_case(Nothing(), BY_NAME[name])
        assert result.status == NOT_OFFERED and result.detail


@pytest.mark.parametrize(
    "error", [NotRun("too small"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_what_cannot_be_built_is_not_run(error: Exception) -> None:
    def build(seed: int, device: torch.device) -> list[Inputs]:
        raise error

    case = Case("x", "decode", "", (), build)
    assert run_case(Ideal(), case).status == NOT_RUN


def test_calls_of_a_case_share_a_state() -> None:
    result = run_case(StateReuser(), BY_NAME["decode/stale/longer"])
    assert result.status == FAILED and "call 2 of 2" in result.detail
    assert run_case(StateReuser(), BY_NAME["decode/lengths/short"]).status == PASSED


def test_catalogue_shares_inputs_and_reports_in_order() -> None:
    seen: list[str] = []
    results = gate.run_catalogue(
        [Ideal(), Nothing()],
        [GAUSSIAN, BY_NAME["kv_write/gaussian"]],
        on_result=lambda result, ready: seen.append(result.implementation),
    )
    assert seen == ["ideal", "nothing", "ideal", "nothing"]
    assert [r.status for r in results] == [PASSED, NOT_OFFERED, PASSED, NOT_OFFERED]


def _append(change: str) -> type[Ideal]:
    class Writer(Ideal):
        name = change

        def write(self, inputs: WriteInputs) -> None:
            super().write(inputs)
            cache = inputs.cache
            slot = int(inputs.slots[inputs.slots >= 0][0])
            row = cache.rows_view()[slot // cache.page_size, slot % cache.page_size]
            if change == "value":
                row[7] ^= 0x08
            elif change == "scale":
                row[512:528].view(torch.float32).mul_(1 + 1e-5)
            elif change == "rope":
                row[600] ^= 1
            elif change == "elsewhere":
                writes.storage_bytes(cache)[-1] ^= 1

    return Writer


@pytest.mark.parametrize("change", ["value", "scale", "rope", "elsewhere"])
def test_one_wrong_byte_of_a_writer_is_seen(change: str) -> None:
    assert run_case(_append("none")(), BY_NAME["kv_write/page_stride"]).status == PASSED
    assert run_case(_append(change)(), BY_NAME["kv_write/page_stride"]).status == FAILED


def _module(name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    sys.modules[name] = module


def _flash_decode(q, k_cache, block_table, seqlens, d_v, meta, splits, scale, causal, fp8,  # type: ignore[no-untyped-def]
                  indices, sink, extra, extra_indices, length, extra_length):  # fmt: skip
    assert fp8, "is_fp8_kvcache must be True when sparse attention is enabled"
    assert meta == "meta" and k_cache.dtype == torch.float8_e4m3fn and k_cache.shape[2] == 1
    cache = KVCache.from_tensor(k_cache, "v32_fp8")
    inputs = Inputs("decode", q, cache, indices, scale, length, sink)
    output = Ideal().run(inputs, None)
    lse = torch.where(output.lse.isinf(), float("inf"), output.lse)
    return output.out, lse.transpose(1, 2)


def test_a_provider_with_flash_mla_names() -> None:
    _module(
        "peer_without_prefill",
        flash_mla_with_kvcache=_flash_decode,
        get_mla_metadata=lambda: ("meta", None),
    )
    provider = ModuleProvider("peer_without_prefill")
    for name in ("decode/gaussian", "decode/lengths/zero", "decode/s_q/2", "decode/sink/finite"):
        assert run_case(provider, BY_NAME[name]).status == PASSED
    for name in ("prefill/gaussian", "decode/gaussian/bf16", "kv_write/gaussian"):
        result = run_case(provider, BY_NAME[name])
        assert result.status == NOT_OFFERED, result.detail
    assert "no flash_mla_sparse_fwd" in run_case(provider, BY_NAME["prefill/gaussian"]).detail


def test_a_module_without_the_names_is_refused() -> None:
    with pytest.raises(ImportError, match="flash_mla_with_kvcache"):
        ModuleProvider("json")
