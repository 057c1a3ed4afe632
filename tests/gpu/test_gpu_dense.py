"""Dense decode on every GPU backend of this machine, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dense import DenseCall, dense_call
from drawn import assert_weights_rounded_to_bf16
from sparse_mla import arch, dense_decode, dispatch

pytestmark = pytest.mark.gpu

LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 300, 700)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_splits": 1},
    {"num_splits": 5},
    {"batch_invariant": True},
)


@pytest.fixture(params=("sm90", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """A backend's name; skipped where it does not run, with its own reason."""
    machine = arch.of("cuda")
    for answer in dispatch.explain(dispatch.Request("dense_decode", "bf16", 64), machine):
        if answer.backend == request.param and not answer.ok:
            pytest.skip(f"{answer.backend}: {answer.reason}")
    return str(request.param)


def test_fp8_rows_with_one_scale() -> None:
    """Layouts that the Hopper kernel does not read go to the portable one."""
    for heads in (5, 64):
        call = dense_call("fp8_tensor", lengths=LENGTHS, heads=heads, s_q=2, device="cuda")
        out, lse = dense_decode(*call.arguments)
        assert_weights_rounded_to_bf16(out, lse, call.oracle())


def check(backend: str, call: DenseCall) -> None:
    """Right with every way of splitting, and the same bits twice."""
    want = call.oracle()
    for more in OPTIONS:
        out, lse = dense_decode(*call.arguments, **call.options, backend=backend, **more)
        assert_weights_rounded_to_bf16(out, lse, want)
        again = dense_decode(*call.arguments, **call.options, backend=backend, **more)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), more


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 5, 16, 33, 64, 96, 128])
def test_heads_and_lengths(backend: str, heads: int, s_q: int, causal: bool) -> None:
    check(backend, dense_call(lengths=LENGTHS, heads=heads, s_q=s_q, causal=causal, device="cuda"))


@pytest.mark.parametrize("layout", ["bf16", "bf16_nope"])
@pytest.mark.parametrize("padding", [0, 16, 1152 * 3])
@pytest.mark.parametrize("page_size", [1, 2, 53, 61, 64, 128, 192, 256])
def test_page_sizes(backend: str, page_size: int, padding: int, layout: str) -> None:
    lengths = (page_size - 1, page_size, page_size + 1, 1000, 0)
    shape: dict[str, Any] = {"page_size": page_size, "padding": padding, "device": "cuda"}
    check(backend, dense_call(layout, lengths=lengths, heads=64, **shape))


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_pages_that_the_cache_does_not_have(backend: str, page_size: int) -> None:
    shape: dict[str, Any] = {"lengths": (64, 2000, 40, 700), "heads": 40, "device": "cuda"}
    check(backend, dense_call(**shape, page_size=page_size, missing=0.3, s_q=2, causal=True))
    check(backend, dense_call(**shape, page_size=page_size, missing=1.1))


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_uneven_batches(backend: str, heads: int) -> None:
    """More sequences than the plan looks at together, long ones among short ones."""
    lengths = [(i * 37) % 200 for i in range(300)]
    lengths[7], lengths[255], lengths[299] = 9000, 3000, 5000
    check(backend, dense_call(lengths=lengths, heads=heads, device="cuda"))


def test_bits_do_not_depend_on_the_batch(backend: str) -> None:
    call = dense_call(lengths=(5000, 90, 2600), heads=64, device="cuda")
    out, lse = dense_decode(*call.arguments, batch_invariant=True, backend=backend)
    alone = dense_decode(
        call.q[2:], call.cache, call.block_table[2:, :50], call.cache_seqlens[2:],
        batch_invariant=True, backend=backend,
    )  # fmt: skip
    assert torch.equal(out[2:], alone[0]) and torch.equal(lse[2:], alone[1])


@pytest.mark.parametrize("heads", [16, 128])
def test_a_graph_replays_with_other_lengths(backend: str, heads: int) -> None:
    call = dense_call(lengths=(700, 2000, 300), heads=heads, s_q=2, causal=True, device="cuda")
    lengths = call.cache_seqlens.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        dense_decode(*call.arguments, causal=True, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = dense_decode(*call.arguments, causal=True, backend=backend)
    for change in (0, -1, -299, -700, 0):
        call.cache_seqlens.copy_(lengths + change)
        graph.replay()
        assert_weights_rounded_to_bf16(out, lse, call.oracle())


def test_nothing_to_do(backend: str) -> None:
    call = dense_call(lengths=(0, 0), heads=2, spare=0, device="cuda")
    check(backend, call)
    empty = call.q[:, :0]
    assert dense_decode(empty, *call.arguments[1:], backend=backend)[0].shape == (2, 0, 2, 512)
