"""Adapters of modules with FlashMLA's names: refusals, padding as engines do it, what is said."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from sparse_mla.accuracy import gate
from sparse_mla.accuracy.case import Case
from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.gate import CRASHED, FAILED, NOT_OFFERED, NOT_RUN, PASSED, run_case
from sparse_mla.accuracy.providers import ModuleProvider, pad
from sparse_mla.compat import flash_mla

BY_NAME = {case.name: case for case in CASES}


def make_module(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, ...], topk: int) -> str:
    """A module that answers right but refuses other head counts and topk, as FlashMLA does."""
    module = types.ModuleType("picky_flash_mla")

    def refuse(q: torch.Tensor, indices: torch.Tensor) -> None:
        if q.shape[-2] not in heads:
            raise RuntimeError(f"Unsupported h_q: {q.shape[-2]}")
        if indices.shape[-1] % topk:
            raise RuntimeError(f"Assertion error: topk {indices.shape[-1]}")

    def decode(q: torch.Tensor, k: torch.Tensor, *args: Any) -> Any:
        refuse(q, args[8])
        return flash_mla.flash_mla_with_kvcache(q, k, *args)

    def prefill(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, *args: Any) -> Any:
        refuse(q, indices)
        return flash_mla.flash_mla_sparse_fwd(q, kv, indices, *args)

    module.flash_mla_with_kvcache = decode  # type: ignore[attr-defined]
    module.flash_mla_sparse_fwd = prefill  # type: ignore[attr-defined]
    module.get_mla_metadata = flash_mla.get_mla_metadata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def first_case(op: str, shows: str | None = None) -> str:
    for case in CASES:
        if case.op == op and (shows is None or shows in case.shows):
            return case.name
    raise LookupError(f"no {op} case shows {shows}")


@pytest.mark.parametrize("op", ("decode", "prefill"))
def test_refused_heads_are_padded_and_said(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    provider = ModuleProvider(make_module(monkeypatch, (64, 128), 1))
    result = run_case(provider, BY_NAME[f"{op}/gaussian" if op == "decode" else first_case(op)])
    assert result.status == PASSED
    assert "heads padded" in result.detail
    assert "Unsupported h_q" in result.detail


@pytest.mark.parametrize("fault", ("heads_beyond_tail", "last_block_unmasked"))
def test_cases_about_what_is_padded_are_not_offered(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name = make_module(monkeypatch, (64, 128), 128)
    result = run_case(ModuleProvider(name), BY_NAME[first_case("decode", fault)])
    assert result.status == NOT_OFFERED


def test_a_refusal_that_padding_does_not_cure_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_case(ModuleProvider(make_module(monkeypatch, (), 1)), BY_NAME["decode/gaussian"])
    assert result.status == FAILED
    assert "Unsupported h_q" in result.detail


def test_what_is_not_implemented_for_the_padded_shape_is_not_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = make_module(monkeypatch, (64,), 1)
    picky = sys.modules[name].flash_mla_with_kvcache

    def decode(q: torch.Tensor, k: torch.Tensor, *args: Any) -> Any:
        if q.shape[-2] == 64 and k.dtype == torch.bfloat16:
            raise NotImplementedError("FP8 caches only")
        return picky(q, k, *args)

    monkeypatch.setattr(sys.modules[name], "flash_mla_with_kvcache", decode)
    result = run_case(ModuleProvider(name), BY_NAME["decode/gaussian/bf16"])
    assert (result.status, result.detail) == (NOT_OFFERED, "FP8 caches only")


def test_nothing_is_padded_for_a_module_that_takes_the_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = make_module(monkeypatch, tuple(range(1, 129)), 1)
    result = run_case(ModuleProvider(name), BY_NAME["decode/gaussian"])
    assert result.status == PASSED
    assert result.detail == ""


def test_pad_reaches_the_shapes_that_flash_mla_takes() -> None:
    for case in CASES:
        if case.op == "kv_write" or not case.quick:
            continue
        for call in case.build(0, torch.device("cpu")):
            padded, what = pad(call)
            assert padded.q.shape[-2] in (64, 128)
            assert padded.indices.shape[-1] % 128 == 0
            assert ("heads" in what) == (call.q.shape[-2] not in (64, 128))


def test_after_a_lost_context_the_rest_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = ModuleProvider(make_module(monkeypatch, (), 1))
    monkeypatch.setattr(gate, "context_lost", lambda device: True)
    cases = [BY_NAME["decode/gaussian"], BY_NAME["prefill/gaussian"]]
    results = gate.run_catalogue([provider], cases)
    assert [r.status for r in results] == [CRASHED, NOT_RUN]
    assert results[1].detail == ("the CUDA context was lost in decode/gaussian on picky_flash_mla")


SHIM = "sparse_mla.compat.flash_mla"
DECODE_CASES = [
    case
    for case in CASES
    if case.name.startswith(("decode/layout/", "decode/extra/")) and "bf16_nope" not in case.name
]


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_our_drop_in_module_takes_every_layout(case: Case) -> None:
    """What FlashMLA's rule by width does not tell apart goes by name."""
    result = run_case(ModuleProvider(SHIM), case)
    assert result.status == PASSED, result.detail


def test_a_module_without_names_for_layouts_does_not_offer_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FlashMLA's own signature: two FP8 layouts by q's width, and no others."""
    provider = ModuleProvider(SHIM)
    ours = provider.module.flash_mla_with_kvcache

    def theirs(*arguments: Any) -> Any:
        return ours(*arguments)

    monkeypatch.setattr(provider.module, "flash_mla_with_kvcache", theirs)
    for name, status in (
        ("decode/layout/v4_fp8", PASSED),
        ("decode/extra/v4_fp8+v4_fp8", PASSED),
        ("decode/layout/v41_fp8_inline", NOT_OFFERED),
        ("decode/extra/v41_fp8_inline+v41_fp4_inline", NOT_OFFERED),
        ("decode/extra/glm53_nope_nvfp4+bf16_nope", NOT_OFFERED),
    ):
        assert run_case(provider, BY_NAME[name]).status == status, name
