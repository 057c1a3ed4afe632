"""The portable kernel of dense decode, run by Triton's interpreter, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dense import DenseCall, dense_call
from drawn import assert_weights_rounded_to_bf16
from sparse_mla import dense_decode
from sparse_mla.ops.dense_decode.triton import launch_attend
from sparse_mla.ops.sparse_decode import config
from sparse_mla.ops.sparse_decode.config import Launch

LAUNCHES = {
    name: value
    for name, value in sorted(vars(config).items())
    if isinstance(value, Launch) and not value.tokens_first
}


def check(call: DenseCall, **more: Any) -> None:
    out, lse = dense_decode(*call.arguments, **call.options, backend="triton", **more)
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("layout", ["bf16", "bf16_nope", "fp8_tensor"])
def test_launches(layout: str, launch: str, splits: int) -> None:
    """Every launch, rows that do not fill its blocks, with and without splits."""
    chosen = LAUNCHES[launch]
    call = dense_call(layout, lengths=(150,), heads=(chosen.block_h + 3) // 2 + 1, s_q=2)
    out, lse = launch_attend(
        *call.arguments, call.q.shape[-1] ** -0.5, True, splits, chosen.block_t, chosen
    )
    call.options["causal"] = True
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


@pytest.mark.parametrize("heads", [1, 5, 16, 33, 64, 128])
def test_heads(heads: int) -> None:
    check(dense_call(lengths=(70,), heads=heads))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("splits", [None, 1, 2, 7])
def test_lengths_and_splits(splits: int | None, causal: bool) -> None:
    lengths = (0, 1, 63, 64, 65, 400)
    call = dense_call(lengths=lengths, s_q=3, heads=5, causal=causal)
    check(call, num_splits=splits)


def test_more_splits_than_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many are made as a sequence can have."""
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def seen(*size: Any, **more: Any) -> torch.Tensor:
        made.append(size)
        return empty(*size, **more)

    monkeypatch.setattr(torch, "empty", seen)
    call = dense_call(lengths=(0, 65, 100), heads=2)
    check(call, num_splits=64)
    (part,) = [size for size in made if len(size) == 3 and size[-1] == 512]
    assert part[0] * config.HEADS_16.block_t == call.block_table.shape[1] * 64


@pytest.mark.parametrize("page_size", [1, 2, 53, 64, 256])
@pytest.mark.parametrize("padding", [0, 176])
def test_page_sizes(page_size: int, padding: int) -> None:
    lengths = (page_size - 1, page_size, page_size + 1, 150)
    check(dense_call(lengths=lengths, heads=2, page_size=page_size, padding=padding))


@pytest.mark.parametrize("splits", [None, 4])
def test_pages_that_the_cache_does_not_have(splits: int | None) -> None:
    shape: dict[str, Any] = {"lengths": (64, 300, 40), "heads": 3, "page_size": 16}
    check(dense_call(**shape, missing=0.4, s_q=2, causal=True), num_splits=splits)
    call = dense_call(**shape, missing=1.1)
    out, lse = dense_decode(*call.arguments, num_splits=splits, backend="triton")
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_bits_do_not_depend_on_the_batch() -> None:
    call = dense_call(lengths=(1200, 90, 600), heads=2)
    out, lse = dense_decode(*call.arguments, batch_invariant=True, backend="triton")
    # Alone, and with a narrower table.
    alone = dense_decode(
        call.q[2:], call.cache, call.block_table[2:, :10], call.cache_seqlens[2:],
        batch_invariant=True, backend="triton",
    )  # fmt: skip
    assert torch.equal(out[2:], alone[0]) and torch.equal(lse[2:], alone[1])


def test_strided_query_and_table() -> None:
    call = dense_call(lengths=(100, 7, 130), s_q=2, heads=5)
    wide = torch.full((2, 3, 7, 584), float("nan"), dtype=torch.bfloat16).transpose(0, 1)
    q = wide[:, :, 1:6, :576]
    q.copy_(call.q)
    table = torch.zeros(3, 50, dtype=torch.int32)[:, 9 : 9 + call.block_table.shape[1]]
    table.copy_(call.block_table)
    check(DenseCall(q, call.cache, table, call.cache_seqlens))


def test_nothing_to_do() -> None:
    call = dense_call(lengths=(0, 0), heads=2, spare=0)
    check(call)
    empty = call.q[:, :0]
    assert dense_decode(empty, *call.arguments[1:], backend="triton")[0].shape == (2, 0, 2, 512)
