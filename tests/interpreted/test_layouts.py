"""The Triton kernels over every cache layout and over two caches, by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from drawn import (
    Call,
    assert_weights_rounded_to_bf16,
    decode_call,
    filled_cache,
    generator,
    poison_unselected,
)
from hostile import ALL_LAYOUTS, DECODE_CALLS
from sparse_mla import KVCache, decode, kv_quantise
from sparse_mla.kv_layout import get_layout
from sparse_mla.ops.sparse_decode.config import HEADS_32, HEADS_64, WGMMA_16
from sparse_mla.ops.sparse_decode.source import Source
from sparse_mla.ops.sparse_decode.triton import launch_attend
from sparse_mla.ops.sparse_decode.triton_rows_kernel import decode_e2m1, decode_ue8m0, times

PAIRS = [
    ("v4_fp8", "v4_fp8"),
    ("v41_fp8_planar", "v41_fp4_planar"),
    ("v41_fp8_inline", "v41_fp4_inline"),
    ("bf16_nope", "v4_fp8"),
    ("v4_fp8", "glm53_nope_fp8"),
    ("glm53_nope_fp8", "glm53_nope_nvfp4"),
    ("bf16", "v32_fp8"),
    ("v32_fp8", "nvfp4_bf16_rope"),
    ("fp8_tensor", "nvfp4_bf16_rope"),
]
NEW = [name for name in ALL_LAYOUTS if name not in ("v32_fp8", "bf16", "bf16_nope")]


def check(call: Call, **more: Any) -> None:
    out, lse = decode(call.q, call.cache, call.indices, backend="triton", **call.options, **more)
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


@pytest.mark.parametrize("layout", NEW)
def test_alone(layout: str) -> None:
    call = decode_call(layout, b=3, s_q=2, heads=3, topk=90, lengths=True, sink=True)
    check(call)
    check(call, num_splits=2)


@pytest.mark.parametrize("layout", ["v4_fp8", "nvfp4_bf16_rope"])
def test_more_heads(layout: str) -> None:
    check(decode_call(layout, b=1, heads=35, topk=90, sink=True))


@pytest.mark.parametrize("layout", [name for name in NEW if name != "v4_fp8"])
def test_two_programs_share_the_output(layout: str) -> None:
    call = decode_call(layout, b=1, heads=64, topk=70, sink=True)
    source = Source(call.cache, call.indices, None)
    scale = call.q.shape[-1] ** -0.5
    sink = call.options["attn_sink"]
    out, lse, _ = launch_attend(call.q, [source], sink, scale, 1, HEADS_64, False)
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


def test_tokens_as_rows_without_rope() -> None:
    call = decode_call("glm53_nope_fp8", b=2, heads=5, topk=100)
    source = Source(call.cache, call.indices, None)
    out, lse, _ = launch_attend(call.q, [source], None, 512**-0.5, 2, WGMMA_16, False)
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


@pytest.mark.parametrize("name", DECODE_CALLS)
def test_hostile(name: str) -> None:
    check(DECODE_CALLS[name]("v4_fp8"))


@pytest.mark.parametrize("page_size", [1, 2, 53, 256])
@pytest.mark.parametrize("layout", ["v4_fp8", "v41_fp8_planar", "glm53_nope_nvfp4"])
def test_page_sizes(layout: str, page_size: int) -> None:
    stride = -(-get_layout(layout).page_bytes(page_size) // 16) * 16 + 1328
    shape = {"page_size": page_size, "page_stride": stride, "pages": 2 + 300 // page_size}
    check(decode_call(layout, b=1, heads=2, topk=70, **shape))


def test_rows_wider_than_the_layout() -> None:
    call = decode_call("glm53_nope_fp8", heads=2)
    pool = torch.full((call.cache.num_pages, 64, 656), 0xFF, dtype=torch.uint8)
    pool[:, :, :528] = call.cache.rows_view()
    check(Call(call.q, KVCache.from_tensor(pool, "glm53_nope_fp8"), call.indices))


@pytest.mark.parametrize(("main", "extra"), PAIRS)
def test_beside_an_extra_cache(main: str, extra: str) -> None:
    call = decode_call(
        main, b=4, s_q=2, heads=3, topk=100, lengths=True, sink=True, extra_layout=extra
    )
    for splits in (1, 3):
        check(call, num_splits=splits)


@pytest.mark.parametrize("heads", [20, 64])
def test_heads_beside_an_extra_cache(heads: int) -> None:
    call = decode_call("v41_fp8_planar", b=1, heads=heads, extra_layout="v41_fp4_planar")
    check(call)
    sources = [
        Source(call.cache, call.indices, None),
        Source(call.options["extra_cache"], call.options["extra_indices"], None),
    ]
    for launch in (HEADS_32, HEADS_64):
        out, lse, _ = launch_attend(call.q, sources, None, 512**-0.5, 2, launch, False)
        assert_weights_rounded_to_bf16(out, lse, call.oracle())


@pytest.mark.parametrize(
    ("topk", "extra_topk"), [(0, 0), (0, 90), (90, 0), (1, 1), (64, 128), (65, 63), (1, 200)]
)
def test_lists_of_two_lengths(topk: int, extra_topk: int) -> None:
    shape = {"s_q": 2, "heads": 3, "topk": topk, "extra_topk": extra_topk, "sink": True}
    call = decode_call("v4_fp8", extra_layout="v4_fp8", extra_page_size=2, **shape)
    for splits in (1, 2):
        check(call, num_splits=splits)


def test_lengths_of_one_list_leave_the_other_alone() -> None:
    lengths = torch.tensor([0, 50, 0, 7, -1, 1], dtype=torch.int32)
    extra_lengths = torch.tensor([80, 0, 0, 55, 80, 10_000], dtype=torch.int32)
    both = {"topk_length": lengths, "extra_topk_length": extra_lengths}
    for chosen in ({"topk_length": lengths}, {"extra_topk_length": extra_lengths}, both):
        call = decode_call("v4_fp8", b=6, heads=3, topk=50, extra_layout="v4_fp8", extra_topk=80)
        call.options.update(chosen)
        poison_unselected(call)
        check(call, num_splits=2)


def test_sinks_and_rows_empty_in_one_cache() -> None:
    call = decode_call("v4_fp8", b=4, s_q=2, heads=8, sink=True, extra_layout="v41_fp4_inline")
    call.indices[0] = -1
    call.options["extra_indices"][1] = -1
    call.indices[2, 0] = call.options["extra_indices"][2, 0] = -1
    check(call)


def test_a_row_alone() -> None:
    call = decode_call("v4_fp8", b=3, heads=2, topk=128, extra_layout="v4_fp8", extra_topk=600)
    out, lse = decode(
        call.q, call.cache, call.indices, backend="triton", batch_invariant=True, **call.options
    )
    options = {**call.options, "extra_indices": call.options["extra_indices"][1:2]}
    alone = decode(
        call.q[1:2],
        call.cache,
        call.indices[1:2],
        backend="triton",
        batch_invariant=True,
        **options,
    )
    assert torch.equal(out[1:2], alone[0]) and torch.equal(lse[1:2], alone[1])


@pytest.mark.parametrize("extreme", [0.0, 1e-38, 1e-30, 1e30])
def test_scales_of_the_token_and_of_the_tensor(extreme: float) -> None:
    """A factor of 0, or one whose reciprocal is no normal number, still has its weight."""
    made = generator(5)
    cache = filled_cache("glm53_nope_nvfp4", 3, 64)
    outer = cache.layout.outer
    assert outer is not None
    rows = cache.rows_view().reshape(-1, 304)
    values = outer.read(rows).clone()
    values[::3] = extreme
    outer.write(rows, values)
    cache.rows_view()[:] = rows.view(3, 64, 304)
    q = torch.randn(2, 1, 5, 512, generator=made).to(torch.bfloat16)
    if extreme > 1:
        q *= 1e-32
    indices = torch.arange(180, dtype=torch.int32).expand(2, 1, -1)
    check(Call(q, cache, indices))
    scaled = filled_cache("fp8_tensor", 3, 64)
    scale = torch.tensor([extreme])
    tiny = KVCache(scaled.pages, 64, scaled.layout, 576, scale)
    q = torch.randn(2, 1, 5, 576, generator=made).to(torch.bfloat16)
    if extreme > 1:
        q *= 1e-32
    if extreme != 1e-38:  # outputs that are subnormal
        check(Call(q, tiny, indices))


def test_a_nan_scale_stays_with_those_who_select_it() -> None:
    for layout, at in (("v4_fp8", 3), ("v41_fp8_planar", 7), ("v41_fp4_planar", 30)):
        call = decode_call(
            "v4_fp8", b=2, heads=2, topk=20, extra_layout=layout, extra_topk=20, invalid=0.0
        )
        cache, indices = call.options["extra_cache"], call.options["extra_indices"]
        slot = int(indices[1, 0, 3])
        indices[0][indices[0] == slot] = -1
        before = decode(call.q, call.cache, call.indices, backend="triton", **call.options)
        cache.footers_view()[slot // 17, slot % 17, at] = 0xFF
        after = decode(call.q, call.cache, call.indices, backend="triton", **call.options)
        assert torch.equal(before[0][0], after[0][0]) and torch.equal(before[1][0], after[1][0])
        assert after[0][1].isnan().any()


@triton.jit
def _decode_e2m1(byte_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    out = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + out, decode_e2m1(tl.load(byte_ptr + at)))


@triton.jit
def _decode_ue8m0(byte_ptr, out_ptr, product_ptr):
    at = tl.arange(0, 256)
    scale = decode_ue8m0(tl.load(byte_ptr + at))
    tl.store(out_ptr + at, scale)
    tl.store(product_ptr + at, times(tl.full([256], -1.125, tl.bfloat16), scale))


def test_every_code_of_the_formats() -> None:
    codes = torch.arange(256).to(torch.uint8)
    out = torch.empty(16, 32, dtype=torch.bfloat16)
    _decode_e2m1[(1,)](codes, out)
    assert torch.equal(out.float(), kv_quantise.decode_e2m1(codes.view(16, 16)))
    scale, product = torch.empty(2, 256, dtype=torch.bfloat16)
    _decode_ue8m0[(1,)](codes, scale, product)
    want = kv_quantise.decode_ue8m0(codes).double()
    torch.testing.assert_close(scale.double(), want, rtol=0, atol=0, equal_nan=True)
    # The interpreter takes subnormal bf16 numbers for 0.
    close = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(product.double()[1:], -1.125 * want[1:], **close)
