"""Prefill on the CPU backend against the oracle."""

from __future__ import annotations

import pytest
import torch

from drawn import Call, assert_exact_but_for_rounding, generator, prefill_call
from hostile import ALL_LAYOUTS as LAYOUTS
from hostile import PREFILL_CALLS
from sparse_mla import KVCache, prefill
from sparse_mla.ops.sparse_prefill.interface import rows_as_cache


def check(call: Call, kv: torch.Tensor | KVCache | None = None) -> None:
    out, max_logits, lse = prefill(
        call.q, call.cache if kv is None else kv, call.indices, backend="cpu", **call.options
    )
    want = call.oracle()
    assert_exact_but_for_rounding(out, lse, want)
    assert max_logits.dtype == torch.float32 and max_logits.shape == lse.shape
    some = want.max_logits > float("-inf")
    assert torch.equal(max_logits > float("-inf"), some)
    assert ((max_logits.double() - want.max_logits)[some].abs() <= 3e-5).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PREFILL_CALLS)
def test_hostile(layout: str, name: str) -> None:
    check(PREFILL_CALLS[name](layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 5, 16, 64, 128])
def test_heads(layout: str, heads: int) -> None:
    check(prefill_call(layout, heads=heads, sink=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("s_q", [1, 8, 9, 33])
@pytest.mark.parametrize("topk", [1, 65, 400])
def test_queries_and_topk(layout: str, s_q: int, topk: int) -> None:
    check(prefill_call(layout, heads=2, s_q=s_q, topk=topk, lengths=True))


def rows_call(width: int, s_kv: int = 200) -> tuple[Call, torch.Tensor]:
    """A call over a bf16 tensor [s_kv, width], and the tensor."""
    kv = torch.randn(s_kv, width, generator=generator(1)).to(torch.bfloat16)
    call = prefill_call({576: "bf16", 512: "bf16_nope"}[width], heads=3, pages=1, page_size=s_kv)
    kv[~torch.isin(torch.arange(s_kv), call.used)] = float("nan")
    return Call(call.q, rows_as_cache(kv), call.indices, call.options), kv


@pytest.mark.parametrize("width", [576, 512])
def test_a_tensor_of_rows(width: int) -> None:
    call, kv = rows_call(width)
    check(call, kv)
    check(call, kv[:, None])
    call.indices = call.indices[:, None]
    check(call, kv)


@pytest.mark.parametrize("width", [576, 512])
def test_a_strided_tensor_of_rows(width: int) -> None:
    call, kv = rows_call(width)
    pool = torch.full((200, 3, width + 7), float("nan"), dtype=torch.bfloat16)
    pool[:, 1, 3 : 3 + width] = kv
    check(call, pool[:, 1, 3 : 3 + width])
    check(call, pool[:, 1:2, 3 : 3 + width])


@pytest.mark.parametrize("s_kv", [0, 1, 2])
def test_few_rows(s_kv: int) -> None:
    kv = torch.randn(s_kv, 576, generator=generator(1)).to(torch.bfloat16)
    call = prefill_call(heads=3, pages=1, page_size=2)
    check(Call(call.q, rows_as_cache(kv), call.indices), kv)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_do(layout: str) -> None:
    call = prefill_call(layout, s_q=0)
    out, max_logits, lse = prefill(call.q, call.cache, call.indices)
    assert out.shape == (0, 16, 512)
    assert max_logits.shape == lse.shape == (0, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_is_decode_of_single_tokens(layout: str) -> None:
    """The same lists and lengths, one sequence per token: the answers agree bit for bit."""
    from sparse_mla import decode

    call = prefill_call(layout, s_q=11, heads=4, lengths=True, sink=True)
    out, _, lse = prefill(call.q, call.cache, call.indices, **call.options)
    other, other_lse = decode(call.q[:, None], call.cache, call.indices[:, None], **call.options)
    assert torch.equal(out, other[:, 0]) and torch.equal(lse, other_lse[:, 0])
