"""Decode over two caches on CPU: pairs of layouts, lengths in both, empty lists, graphs."""

from __future__ import annotations

import pytest
import torch

from drawn import (
    Call,
    assert_exact_but_for_rounding,
    decode_call,
    draw_lengths,
    generator,
    poison_unselected,
)
from sparse_mla import LAYOUTS, KVCache, decode

PAIRS = [
    (a.name, b.name)
    for a in LAYOUTS.values()
    for b in LAYOUTS.values()
    if not a.extra_only and a.d_qk == b.d_qk
]
MODELS = [
    ("v4_fp8", "v4_fp8"),
    ("v41_fp8_planar", "v41_fp4_planar"),
    ("v41_fp8_inline", "v41_fp4_inline"),
    ("v32_fp8", "bf16"),
    ("nvfp4_bf16_rope", "fp8_tensor"),
]


def run(call: Call, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    return decode(call.q, call.cache, call.indices, backend="cpu", **call.options, **more)


def check(call: Call) -> None:
    assert_exact_but_for_rounding(*run(call), call.oracle())


@pytest.mark.parametrize(("main", "extra"), PAIRS)
def test_every_pair_of_layouts(main: str, extra: str) -> None:
    check(
        decode_call(main, b=3, s_q=2, heads=3, topk=40, lengths=True, sink=True, extra_layout=extra)
    )


@pytest.mark.parametrize(("main", "extra"), MODELS)
@pytest.mark.parametrize(
    ("page_size", "extra_page_size"), [(1, 64), (2, 1), (53, 61), (61, 2), (64, 64), (256, 53)]
)
def test_page_sizes(main: str, extra: str, page_size: int, extra_page_size: int) -> None:
    call = decode_call(
        main, heads=3, pages=4, page_size=page_size, extra_layout=extra,
        extra_page_size=extra_page_size,
    )  # fmt: skip
    check(call)


@pytest.mark.parametrize(("main", "extra"), MODELS)
@pytest.mark.parametrize(("topk", "extra_topk"), [(0, 90), (90, 0), (0, 0), (1, 600), (600, 1)])
def test_an_empty_list_beside_a_full_one(main: str, extra: str, topk: int, extra_topk: int) -> None:
    check(
        decode_call(
            main, s_q=2, heads=3, topk=topk, extra_layout=extra, extra_topk=extra_topk, sink=True
        )
    )


@pytest.mark.parametrize(("main", "extra"), MODELS)
def test_lengths_of_one_list_leave_the_other_alone(main: str, extra: str) -> None:
    lengths = torch.tensor([0, 50, 0, 7, -1, 1], dtype=torch.int32)
    extra_lengths = torch.tensor([80, 0, 0, 55, 80, 10_000], dtype=torch.int32)
    both = {"topk_length": lengths, "extra_topk_length": extra_lengths}
    for chosen in ({"topk_length": lengths}, {"extra_topk_length": extra_lengths}, both):
        call = decode_call(main, b=6, s_q=2, heads=3, topk=50, extra_layout=extra, extra_topk=80)
        call.options.update(chosen)
        poison_unselected(call)
        check(call)


@pytest.mark.parametrize(("main", "extra"), MODELS)
def test_nothing_valid_in_either(main: str, extra: str) -> None:
    call = decode_call(main, b=4, heads=3, invalid=1.1, sink=True, extra_layout=extra)
    out, lse = run(call)
    assert (out == 0).all() and (lse == float("-inf")).all()
    check(call)


@pytest.mark.parametrize(("main", "extra"), MODELS)
def test_sinks_and_rows_empty_in_one_cache(main: str, extra: str) -> None:
    call = decode_call(main, b=4, s_q=2, heads=8, sink=True, extra_layout=extra)
    call.indices[0] = -1
    call.options["extra_indices"][1] = -1
    call.indices[2, 0] = call.options["extra_indices"][2, 0] = -1
    check(call)


@pytest.mark.parametrize("heads", [1, 2, 33, 128])
def test_heads(heads: int) -> None:
    check(decode_call("v41_fp8_planar", heads=heads, extra_layout="v41_fp4_planar"))


@pytest.mark.parametrize("layout", ["v32_fp8", "v4_fp8"])
def test_thousands_of_query_tokens(layout: str) -> None:
    """vLLM's mixed batches: one sequence of (1, T, H, D)."""
    call = decode_call(layout, b=1, s_q=2500, heads=2, topk=8, extra_layout=layout, extra_topk=4)
    call.options["topk_length"] = torch.tensor([6], dtype=torch.int32)
    check(call)


def test_strided_indices_and_shared_pools() -> None:
    call = decode_call("v4_fp8", b=3, s_q=2, heads=5, topk=60, extra_layout="v4_fp8")
    lists = torch.zeros(2, 3, 100, dtype=torch.int32).transpose(0, 1)
    extra = lists[..., 20:90]
    extra.copy_(call.options["extra_indices"])
    assert not extra.is_contiguous()
    cache = call.options["extra_cache"]
    pool = torch.full((cache.num_pages, 3, cache.pages.shape[1] + 48), 0xFF, dtype=torch.uint8)
    view = pool[:, 1, : cache.pages.shape[1]]
    view.copy_(cache.pages)
    moved = KVCache.from_tensor(view, "v4_fp8", cache.page_size)
    options = {**call.options, "extra_indices": extra, "extra_cache": moved}
    check(Call(call.q, call.cache, call.indices, options))


def test_the_same_cache_twice_is_the_longer_list() -> None:
    call = decode_call("v32_fp8", heads=4, topk=80)
    whole = run(call)
    first, second = call.indices[..., :30].contiguous(), call.indices[..., 30:].contiguous()
    options = {"extra_cache": call.cache, "extra_indices": second}
    out, lse = run(Call(call.q, call.cache, first, options))
    assert torch.allclose(lse, whole[1], rtol=1e-6)
    assert (out.float() - whole[0].float()).abs().max() <= whole[0].float().abs().max() / 128


@pytest.mark.parametrize(("main", "extra"), MODELS)
def test_batch_invariant_and_same_bits(main: str, extra: str) -> None:
    call = decode_call(main, b=19, heads=5, topk=600, extra_layout=extra, extra_topk=530)
    call.options["extra_topk_length"] = draw_lengths(19, 530, seed=9)
    out, lse = run(call, batch_invariant=True)
    again = run(call, batch_invariant=True)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    for part in (slice(0, 1), slice(5, 18)):
        options = dict(call.options)
        for name in ("extra_indices", "extra_topk_length"):
            options[name] = options[name][part]
        out1, lse1 = run(
            Call(call.q[part], call.cache, call.indices[part], options), batch_invariant=True
        )
        assert torch.equal(out[part], out1) and torch.equal(lse[part], lse1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("main", "extra"), MODELS)
def test_one_graph(main: str, extra: str, backend: str) -> None:
    torch._dynamo.reset()
    call = decode_call(main, heads=4, topk=40, lengths=True, sink=True, extra_layout=extra)

    def step(
        q: torch.Tensor, indices: torch.Tensor, extra_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = {**call.options, "extra_indices": extra_indices}
        out, lse = decode(q * 2, call.cache, indices, scale=0.05, **options)
        return out.float() + 1, lse

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    arguments = (call.q, call.indices, call.options["extra_indices"])
    for a, b in zip(compiled(*arguments), step(*arguments), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_scale_of_the_whole_tensor_too_large_for_the_planes() -> None:
    """Scales near fp32's largest: the values are small codes, and the zeros stay zeros."""
    cache = KVCache.empty(1, 8, "glm53_nope_fp8")
    latent = torch.randn(8, 512, generator=generator(3))
    latent[:, ::3] = 0.0
    cache.append(latent * 1e36, None, torch.arange(8))
    q = torch.full((1, 1, 2, 512), 1e-38).to(torch.bfloat16)
    check(Call(q, cache, torch.arange(8, dtype=torch.int32).view(1, 1, 8)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("main", "extra"), MODELS)
def test_caches_wrapped_inside_the_graph(main: str, extra: str, backend: str) -> None:
    """As an engine does: its own tensors go in, planar ones and scales of whole tensors too."""
    torch._dynamo.reset()
    call = decode_call(main, heads=4, topk=40, extra_layout=extra)
    beside, lists = call.options["extra_cache"], call.options["extra_indices"]

    def step(
        q: torch.Tensor, pages: torch.Tensor, extra_pages: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return decode(
            q,
            KVCache.from_tensor(pages, main, tensor_scale=call.cache.tensor_scale),
            indices,
            extra_cache=KVCache.from_tensor(extra_pages, extra, tensor_scale=beside.tensor_scale),
            extra_indices=lists,
        )

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    arguments = (call.q, call.cache.tensor(), beside.tensor(), call.indices)
    for a, b in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_flash_mla_names_in_one_graph(backend: str) -> None:
    from sparse_mla.compat import flash_mla

    torch._dynamo.reset()
    call = decode_call("v4_fp8", heads=4, topk=40, lengths=True, extra_layout="v4_fp8")
    pages, extra_pages = call.cache.tensor(), call.options["extra_cache"].tensor()

    def step(q: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        metadata, _ = flash_mla.get_mla_metadata()
        return flash_mla.flash_mla_with_kvcache(
            q, pages, None, None, 512, metadata, is_fp8_kvcache=True, indices=indices,
            extra_k_cache=extra_pages, extra_indices_in_kvcache=call.options["extra_indices"],
            topk_length=call.options["topk_length"],
            extra_topk_length=call.options["extra_topk_length"],
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for a, b in zip(compiled(call.q, call.indices), step(call.q, call.indices), strict=True):
        assert torch.equal(a, b)
