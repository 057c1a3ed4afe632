"""Dense decode on the CPU backend against the oracle, and what every backend is asked first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dense import DenseCall, dense_call
from drawn import INT_MAX, INT_MIN, assert_exact_but_for_rounding, filled_cache
from sparse_mla import KVCache, decode, dense_decode, reference

LAYOUTS = ["bf16", "bf16_nope", "fp8_tensor", "v32_fp8"]
HOSTILE_LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 300)


def run(call: DenseCall, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_decode(*call.arguments, **call.options, **more)


def check(call: DenseCall, **more: Any) -> None:
    assert_exact_but_for_rounding(*run(call, **more), call.oracle())


def test_the_oracle_is_softmax() -> None:
    """One sequence by hand: contiguous tokens, causal."""
    call = dense_call(lengths=(70,), s_q=3, heads=2, causal=True, scale=0.1)
    pages = call.block_table[0, :2].long()
    rows = call.cache.rows_view()[pages].reshape(128, -1)[:70].contiguous()
    keys = rows.view(torch.bfloat16).double()
    want = call.oracle()
    for i in range(3):
        seen = keys[: 70 - 3 + i + 1]
        logits = 0.1 * call.q[0, i].double() @ seen.T
        assert torch.allclose(want.lse[0, i], torch.logsumexp(logits, 1), rtol=1e-12)
        assert torch.allclose(want.out[0, i], torch.softmax(logits, 1) @ seen[:, :512], rtol=1e-9)


def test_the_oracle_is_sparse_decode_over_all_slots() -> None:
    call = dense_call(lengths=(90,), heads=3, page_size=16)
    token = torch.arange(90)
    slots = call.block_table[0, token // 16] * 16 + token % 16
    same = decode(call.q, call.cache, slots.to(torch.int32).view(1, 1, -1), backend="cpu")
    assert torch.equal(same[0], run(call)[0]) and torch.equal(same[1], run(call)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 5, 8, 16, 20, 33, 64, 96, 128])
def test_heads(layout: str, heads: int) -> None:
    check(dense_call(layout, heads=heads, s_q=2, causal=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4])
def test_lengths(s_q: int, causal: bool) -> None:
    """Shorter than the query too: its first tokens then see nothing."""
    call = dense_call(lengths=HOSTILE_LENGTHS, s_q=s_q, heads=3, causal=causal)
    check(call)
    empty = call.oracle().lse[:, :, 0] == float("-inf")
    for i, length in enumerate(HOSTILE_LENGTHS):
        blind = min(s_q, max(0, s_q - length)) if causal else s_q * (length == 0)
        assert int(empty[i].sum()) == blind
        assert bool(empty[i, :blind].all())


@pytest.mark.parametrize("page_size", [1, 2, 53, 61, 64, 256])
@pytest.mark.parametrize("padding", [0, 176])
def test_page_sizes(page_size: int, padding: int) -> None:
    lengths = (0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size, 150)
    check(dense_call(lengths=lengths, heads=2, page_size=page_size, padding=padding))


@pytest.mark.parametrize("causal", [False, True])
def test_pages_that_the_cache_does_not_have_are_absent(causal: bool) -> None:
    lengths = (64, 64, 300, 150, 40)
    call = dense_call(
        lengths=lengths, s_q=2, heads=3, page_size=16, missing=0.4, causal=causal, seed=3
    )
    check(call)
    call = dense_call(lengths=lengths, s_q=2, heads=3, page_size=16, missing=1.1, causal=causal)
    out, lse = run(call)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_lengths_beyond_the_table_and_below_zero() -> None:
    call = dense_call(lengths=(128, 64, 100), heads=2, spare=0)
    want = call.oracle()
    full = torch.tensor([INT_MAX, 64, 100], dtype=torch.int32)
    got = DenseCall(call.q, call.cache, call.block_table, full)
    assert_exact_but_for_rounding(*run(got), want)
    for length in (-1, INT_MIN):
        call.cache_seqlens[:] = length
        out, lse = run(call)
        assert (out == 0).all() and (lse == float("-inf")).all()


def test_a_table_without_pages() -> None:
    call = dense_call(lengths=(0, 0), heads=2, spare=0)
    assert call.block_table.shape == (2, 0) and call.cache.num_pages == 0
    check(call)
    call.cache_seqlens[:] = 5
    check(call)


def test_a_page_may_be_shared_and_repeated() -> None:
    call = dense_call(lengths=(64, 64, 192), heads=2, spare=0)
    call.block_table[:2, 0] = call.block_table[2, 0]
    call.block_table[2, :3] = call.block_table[2, 1].clone()
    check(call)


def test_strided_query_and_table() -> None:
    call = dense_call(lengths=(100, 7, 130), s_q=2, heads=5)
    wide = torch.full((2, 3, 7, 584), float("nan"), dtype=torch.bfloat16).transpose(0, 1)
    q = wide[:, :, 1:6, :576]
    q.copy_(call.q)
    table = torch.zeros(3, 50, dtype=torch.int32)[:, 9 : 9 + call.block_table.shape[1]]
    table.copy_(call.block_table)
    check(DenseCall(q, call.cache, table, call.cache_seqlens))


def test_nan_and_inf_stay_with_their_query_and_sequence() -> None:
    call = dense_call(lengths=(100, 100, 100), s_q=2, heads=3)
    before = run(call)
    call.q[1, 1, 2, 5] = float("nan")
    page = int(call.block_table[2, 0])
    call.cache.rows_view()[page, 3].view(torch.bfloat16)[7] = float("inf")
    after = run(call)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1, 0], new[1, 0])
    assert after[0][1, 1, 2].isnan().all()


def test_very_negative_logits() -> None:
    """Every logit is exactly -65536: below any mask sentinel, weights still equal."""
    call = dense_call(lengths=(70, 10), heads=2, scale=1.0)
    for i, length in enumerate((70, 10)):
        token = torch.arange(length)
        page = call.block_table[i, token // 64].long()
        rows = call.cache.rows_view()[page, token % 64].view(torch.bfloat16)
        rows[:, 0] = 256.0
        call.cache.rows_view()[page, token % 64] = rows.view(torch.uint8)
    call.q[:] = 0
    call.q[..., 0] = -256.0
    out, lse = run(call)
    assert torch.allclose(lse[0], torch.tensor(-65536.0 + math.log(70)))
    want = call.oracle()
    assert (out.double() - want.out).norm() <= 3e-3 * want.out.norm()


def test_bits_do_not_depend_on_the_batch() -> None:
    call = dense_call(lengths=(600, 90, 1000), s_q=2, heads=4, causal=True)
    out, lse = run(call, batch_invariant=True)
    for i in range(3):
        alone = dense_decode(
            call.q[i : i + 1],
            call.cache,
            call.block_table[i : i + 1],
            call.cache_seqlens[i : i + 1],
            causal=True,
            batch_invariant=True,
        )
        assert torch.equal(out[i], alone[0][0]) and torch.equal(lse[i], alone[1][0])


@pytest.mark.parametrize("shape", [(0, 1), (3, 0), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    b, s_q = shape
    cache = filled_cache("bf16", 2, 64)
    q = torch.zeros(b, s_q, 4, 576, dtype=torch.bfloat16)
    table = torch.zeros(b, 2, dtype=torch.int32)
    out, lse = dense_decode(q, cache, table, torch.full((b,), 100, dtype=torch.int32))
    assert out.shape == (b, s_q, 4, 512) and out.dtype == torch.bfloat16
    assert lse.shape == (b, s_q, 4) and lse.dtype == torch.float32


def test_offsets_past_2_31_and_2_32_bytes() -> None:
    try:
        cache = KVCache.empty(60_000, 64, "bf16")
    except RuntimeError as error:
        pytest.skip(f"4.4 GB of virtual memory cannot be had: {error}")
    small = dense_call(lengths=(150,), heads=2)
    chosen = torch.tensor([29_200, 59_999, 1])
    rows = small.cache.rows_view()
    cache.rows_view()[chosen] = rows[small.block_table[0, :3].long()]
    table = chosen.to(torch.int32)[None]
    got = dense_decode(small.q, cache, table, small.cache_seqlens)
    assert_exact_but_for_rounding(*got, small.oracle())


# ------------------------------------------------------------------ errors
def good() -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 1, 4, 576, dtype=torch.bfloat16),
        "cache": filled_cache("bf16", 3, 8),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.ones(2, dtype=torch.int32),
    }


WRONG: list[tuple[str, Any, str]] = [
    ("q", None, r"q is NoneType, must be a tensor \[b, s_q, h_q, d_qk\]"),
    ("q", torch.zeros(2, 4, 576, dtype=torch.bfloat16), r"q is \(2, 4, 576\)"),
    ("q", torch.zeros(2, 1, 4, 576), r"q has dtype torch\.float32"),
    ("q", torch.zeros(2, 1, 4, 512, dtype=torch.bfloat16), "layout bf16 has d_qk 576"),
    ("q", torch.zeros(2, 1, 129, 576, dtype=torch.bfloat16), r"129 heads, must be 1\.\.128"),
    ("cache", torch.zeros(3), "cache is Tensor, must be a sparse_mla.KVCache"),
    ("block_table", None, r"block_table is NoneType, must be a tensor \[b, max_pages\]"),
    ("block_table", torch.zeros(6, dtype=torch.int32), r"block_table is \(6,\)"),
    ("block_table", torch.zeros(3, 3, dtype=torch.int32), r"\(3, 3\), q has 2 sequences"),
    ("block_table", torch.zeros(2, 3), r"block_table has dtype torch\.float32"),
    ("block_table", torch.zeros(3, 2, dtype=torch.int32).T, r"strides \(1, 2\)"),
    ("block_table", torch.zeros(2, 3, dtype=torch.int32, device="meta"), "is on meta, q is on cpu"),
    ("cache_seqlens", None, "cache_seqlens is None"),
    ("cache_seqlens", torch.zeros(3, dtype=torch.int32), r"cache_seqlens is \(3,\)"),
    ("cache_seqlens", torch.zeros(2, dtype=torch.int64), r"dtype torch\.int64"),
    ("cache_seqlens", torch.zeros(4, dtype=torch.int32)[::2], "must be contiguous"),
    ("scale", float("nan"), "scale is nan, must be a finite number"),
    ("causal", 1, "causal is 1, must be True or False"),
    ("batch_invariant", None, "batch_invariant is None, must be True or False"),
    ("num_splits", 0, "num_splits is 0, must be an int from 1"),
    ("num_splits", True, "num_splits is True, must be an int from 1"),
    ("backend", "fast", "backend is 'fast', dense_decode has: cpu, sm90, triton"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_arguments(name: str, value: Any, message: str) -> None:
    call = good()
    dense_decode(**call)
    with pytest.raises(ValueError, match=message):
        dense_decode(**{**call, name: value})


def test_a_layout_that_may_not_stand_alone() -> None:
    call = good()
    call["cache"] = filled_cache("v41_fp4_inline", 3, 8)
    with pytest.raises(ValueError, match="cache has layout v41_fp4_inline"):
        dense_decode(**call)


# ------------------------------------------------------------------ as a custom op
def arguments(call: DenseCall, causal: bool) -> tuple[Any, ...]:
    cache = call.cache
    return (
        call.q, cache.pages, cache.layout.name, cache.page_size, cache.token_stride,
        cache.tensor_scale, call.block_table, call.cache_seqlens, 0.05, causal, 0, False, "",
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal: bool) -> None:
    call = dense_call(lengths=(100, 3), heads=4, s_q=2)
    op = torch.ops.sparse_mla.dense_decode.default
    torch.library.opcheck(op, arguments(call, causal))


def test_in_one_graph() -> None:
    call = dense_call(lengths=(100, 3), heads=4)

    def step(q: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = dense_decode(q * 2, call.cache, call.block_table, lengths)
        return out.float() + 1, lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in (call.cache_seqlens, call.cache_seqlens - 2):
        for a, b in zip(compiled(call.q, lengths), step(call.q, lengths), strict=True):
            assert torch.equal(a, b)


def test_the_oracle_answers_as_the_op_is_shaped() -> None:
    call = dense_call(lengths=(10, 20, 0), heads=4, s_q=2)
    want = reference.dense_decode(*call.arguments)
    assert want.out.shape == (3, 2, 4, 512) and want.lse.shape == (3, 2, 4)
