"""The ops under torch.compile: one graph, other batch sizes, torch's own checks of custom ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparse_mla
from drawn import Call, decode_call, prefill_call
from sparse_mla import KVCache, decode, prefill

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def equal(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["v32_fp8", "bf16"])
def test_decode_in_one_graph(backend: str, layout: str) -> None:
    call = decode_call(layout, heads=4, topk=40, lengths=True, sink=True)

    def step(q: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = decode(q * 2, call.cache, indices, scale=0.05, **call.options)
        return out.float() + 1, lse

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    equal(compiled(call.q, call.indices), step(call.q, call.indices))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_wrapped_inside_the_graph(backend: str) -> None:
    """As an engine does: its own tensor goes in, from_tensor runs while tracing."""
    call = decode_call(heads=4, topk=40)
    pages = call.cache.rows_view()

    def step(
        q: torch.Tensor, pages: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(q, KVCache.from_tensor(pages, "v32_fp8"), indices)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    equal(compiled(call.q, pages, call.indices), step(call.q, pages, call.indices))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_in_one_graph(backend: str) -> None:
    call = prefill_call(heads=4, topk=40, page_size=1, pages=100)
    kv = call.cache.rows_view().view(torch.bfloat16)

    def step(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> Any:
        return prefill(q, kv, indices)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    equal(compiled(call.q, kv, call.indices), step(call.q, kv, call.indices))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_batch_sizes_do_not_compile_again(backend: str) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    call = decode_call(b=9, heads=4, topk=40)

    def step(q: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(q, call.cache, indices)

    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    for b in (2, 3, 5, 9):
        q, indices = call.q[:b].clone(), call.indices[:b].clone()
        equal(compiled(q, indices), step(q, indices))
    assert graphs.frame_count == 1


def test_flash_mla_names_in_one_graph() -> None:
    from sparse_mla.compat import flash_mla

    call = decode_call(heads=4, topk=40)
    pages = call.cache.rows_view()[:, :, None]

    def step(q: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        metadata, _ = flash_mla.get_mla_metadata()
        return flash_mla.flash_mla_with_kvcache(
            q, pages, None, None, 512, metadata, is_fp8_kvcache=True, indices=indices
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    equal(compiled(call.q, call.indices), step(call.q, call.indices))


def shared_arguments(call: Call) -> tuple[Any, ...]:
    options = call.options
    return (
        call.q, *parts(call.cache), call.indices,
        options.get("topk_length"), options.get("attn_sink"), 0.05,
    )  # fmt: skip


def parts(cache: KVCache | None) -> tuple[Any, ...]:
    if cache is None:
        return None, "", 0, 0, None
    layout, scale = cache.layout.name, cache.tensor_scale
    return cache.pages, layout, cache.page_size, cache.token_stride, scale


def decode_arguments(call: Call) -> tuple[Any, ...]:
    options = call.options
    extra = options.get("extra_indices"), options.get("extra_topk_length")
    return (
        *shared_arguments(call), 0, False, "", *parts(options.get("extra_cache")), *extra
    )  # fmt: skip


def prefill_arguments(call: Call) -> tuple[Any, ...]:
    return (*shared_arguments(call), "")


@pytest.mark.parametrize("options", [False, True])
def test_opcheck_decode(options: bool) -> None:
    call = decode_call(heads=4, topk=40, s_q=2, lengths=options, sink=options)
    torch.library.opcheck(torch.ops.sparse_mla.sparse_decode.default, decode_arguments(call))


@pytest.mark.parametrize(("main", "extra"), [("v4_fp8", "v4_fp8"), ("fp8_tensor", "bf16")])
def test_opcheck_decode_over_two_caches(main: str, extra: str) -> None:
    call = decode_call(main, heads=4, topk=40, lengths=True, sink=True, extra_layout=extra)
    torch.library.opcheck(torch.ops.sparse_mla.sparse_decode.default, decode_arguments(call))


@pytest.mark.parametrize("options", [False, True])
def test_opcheck_prefill(options: bool) -> None:
    call = prefill_call(heads=4, topk=40, lengths=options, sink=options)
    torch.library.opcheck(torch.ops.sparse_mla.sparse_prefill.default, prefill_arguments(call))


@pytest.mark.parametrize("strided", [False, True])
def test_fakes_promise_what_the_ops_do(strided: bool) -> None:
    """Shapes, dtypes and strides, for contiguous and strided q."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = decode_call(b=3, heads=4, topk=40, s_q=2)
    two = decode_call("v4_fp8", b=3, heads=4, topk=40, s_q=2, extra_layout="v4_fp8")
    if strided:
        call.q = call.q.transpose(0, 1).contiguous().transpose(0, 1)
    flat = prefill_call(heads=4, topk=40)
    for op, arguments in (
        (torch.ops.sparse_mla.sparse_decode, decode_arguments(call)),
        (torch.ops.sparse_mla.sparse_decode, decode_arguments(two)),
        (torch.ops.sparse_mla.sparse_prefill, prefill_arguments(flat)),
    ):
        real = op(*arguments)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = op(*faked)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_errors_are_the_same_inside_a_graph() -> None:
    call = decode_call(heads=4, topk=40)
    compiled = torch.compile(
        lambda q: sparse_mla.decode(q, call.cache, call.indices), backend="eager"
    )
    with pytest.raises(ValueError, match=r"q has dtype torch\.float32"):
        compiled(call.q.float())
