"""The Triton kernels' source, run by Triton's interpreter on CPU tensors, against the oracle.

Needs TRITON_INTERPRET=1 in the environment before triton is imported; the file
cpu/test_triton_interpreted.py runs this folder so.
"""

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
    prefill_call,
)
from hostile import DECODE_CALLS, LAYOUTS, PREFILL_CALLS
from sparse_mla import KVCache, decode, prefill
from sparse_mla.ops.sparse_decode import config
from sparse_mla.ops.sparse_decode.config import Launch
from sparse_mla.ops.sparse_decode.source import Source
from sparse_mla.ops.sparse_decode.triton import launch_attend
from sparse_mla.ops.sparse_decode.triton_rows_kernel import INTERPRET, decode_e4m3, to_bf16

LAUNCHES = {
    name: value for name, value in sorted(vars(config).items()) if isinstance(value, Launch)
}


def check(call: Call, **more: Any) -> None:
    out, lse = decode(call.q, call.cache, call.indices, backend="triton", **call.options, **more)
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


def test_the_source_is_interpreted() -> None:
    assert INTERPRET.value is True
    assert {"HEADS_16", "HEADS_16_WIDE", "HEADS_32", "HEADS_64"} <= set(LAUNCHES)
    assert any(launch.value_blocks == 2 for launch in LAUNCHES.values())


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(layout: str, launch: str, splits: int) -> None:
    """Every launch, heads that do not fill its blocks, with and without splits."""
    call = decode_call(layout, b=1, heads=LAUNCHES[launch].block_h + 3, topk=150, sink=True)
    scale = call.q.shape[-1] ** -0.5
    sink = call.options["attn_sink"]
    out, lse, max_logits = launch_attend(
        call.q,
        [Source(call.cache, call.indices, None)],
        sink,
        scale,
        splits,
        LAUNCHES[launch],
        splits == 1,
    )
    want = call.oracle()
    assert_weights_rounded_to_bf16(out, lse, want)
    if max_logits is not None:
        assert torch.allclose(max_logits.double(), want.max_logits, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("heads", [1, 5, 8, 16, 20, 33, 64, 128])
def test_heads(heads: int) -> None:
    check(decode_call(b=1, heads=heads, topk=70))


@pytest.mark.parametrize("splits", [1, 2, 7, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits(layout: str, splits: int) -> None:
    """600 entries, with a sink and lengths so short that some splits get nothing."""
    call = decode_call(layout, b=3, heads=3, topk=600, lengths=True, sink=True)
    check(call, num_splits=splits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_queries_per_sequence(layout: str) -> None:
    """A list per query, a length per sequence."""
    call = decode_call(layout, b=3, s_q=2, heads=3, topk=70, lengths=True, sink=True)
    check(call)


@pytest.mark.parametrize("scale", [-0.06, 0.0])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_scales_of_the_other_sign(launch: str, scale: float) -> None:
    """The largest logit is then that of the smallest product."""
    call = decode_call("v32_fp8", b=1, heads=3, topk=150, lengths=True, sink=True, scale=scale)
    source = Source(call.cache, call.indices, call.options["topk_length"])
    out, lse, _ = launch_attend(
        call.q, [source], call.options["attn_sink"], scale, 2, LAUNCHES[launch], False
    )
    assert_weights_rounded_to_bf16(out, lse, call.oracle())


def test_batch_invariant() -> None:
    call = decode_call(b=3, heads=2, topk=600)
    out, lse = decode(call.q, call.cache, call.indices, batch_invariant=True)
    out1, lse1 = decode(call.q[1:2], call.cache, call.indices[1:2], batch_invariant=True)
    assert torch.equal(out[1:2], out1) and torch.equal(lse[1:2], lse1)


@pytest.mark.parametrize("topk", [0, 1, 63, 64, 65, 100])
def test_topk(topk: int) -> None:
    check(decode_call(b=1, heads=2, topk=topk), num_splits=2)


@pytest.mark.parametrize("page_size", [1, 2, 53, 61, 64, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_page_size(page_size: int, padded: bool) -> None:
    stride = 656 * page_size + 1328 if padded else None
    shape = {"page_size": page_size, "page_stride": stride, "pages": 2 + 300 // page_size}
    check(decode_call(b=1, heads=2, topk=70, **shape))


@pytest.mark.parametrize("layout", ["v32_fp8", "bf16"])
@pytest.mark.parametrize("name", DECODE_CALLS)
def test_hostile(layout: str, name: str) -> None:
    check(DECODE_CALLS[name](layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PREFILL_CALLS)
def test_prefill(layout: str, name: str) -> None:
    call = PREFILL_CALLS[name](layout)
    out, max_logits, lse = prefill(
        call.q, call.cache, call.indices, backend="triton", **call.options
    )
    want = call.oracle()
    assert_weights_rounded_to_bf16(out, lse, want)
    assert torch.allclose(max_logits.double(), want.max_logits, rtol=2e-6, atol=2e-5)


def test_nothing_to_do() -> None:
    for b, s_q in ((0, 1), (2, 0)):
        call = decode_call(b=b, s_q=s_q)
        out, lse = decode(call.q, call.cache, call.indices, backend="triton")
        assert out.shape == (b, s_q, 16, 512) and lse.shape == (b, s_q, 16)
    check(decode_call(b=1, pages=0, topk=10))
    call = prefill_call(s_q=0)
    assert prefill(call.q, call.cache, call.indices, backend="triton")[0].shape == (0, 16, 512)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_an_e4m3_nan_stays_with_those_who_select_it(byte: int) -> None:
    call = decode_call(b=2, heads=2, topk=70, invalid=0.0)
    slot = int(call.indices[1, 0, 3])
    call.indices[0][call.indices[0] == slot] = -1
    before = decode(call.q, call.cache, call.indices, backend="triton")
    call.cache.rows_view()[slot // 64, slot % 64, 200] = byte
    after = decode(call.q, call.cache, call.indices, backend="triton")
    assert torch.equal(before[0][0], after[0][0]) and torch.equal(before[1][0], after[1][0])
    assert after[0][1].isnan().any()


def test_a_misaligned_cache_is_refused() -> None:
    call = decode_call(heads=2)
    pages, size = call.cache.pages.shape
    pool = torch.zeros(1 + pages * (size + 4), dtype=torch.uint8)
    view = pool.as_strided((pages, size), (size + 4, 1), 1)
    cache = KVCache.from_tensor(view, "v32_fp8", page_size=64)
    with pytest.raises(ValueError, match="must be multiples of 4"):
        decode(call.q, cache, call.indices, backend="triton")


@triton.jit
def _dot_bf16(a_ptr, b_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_why_dot_upcasts() -> None:
    """tl.dot on bf16 operands takes their bits for integers here: off by orders of magnitude."""
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    out = torch.empty(16, 16)
    _dot_bf16[(1,)](a, b, out)
    want = a.float() @ b.float()
    assert (out - want).norm() > 1e3 * want.norm(), (
        f"triton {triton.__version__}'s interpreter computes tl.dot on bf16 right: the upcast in "
        "triton_kernel.dot can go once this is the oldest triton that is supported"
    )


@triton.jit
def _cast(x_ptr, plain_ptr, ours_ptr):
    at = tl.arange(0, 1024)
    x = tl.load(x_ptr + at)
    tl.store(plain_ptr + at, x.to(tl.bfloat16))
    tl.store(ours_ptr + at, to_bf16(x))


def test_why_to_bf16_rounds_by_hand() -> None:
    """The interpreter's own cast truncates; ours rounds to nearest even, infinities and NaN too."""
    x = torch.randn(1024)
    special = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3.4e38, 1 + 2.0**-8, 1e-37]
    x[: len(special)] = torch.tensor(special)
    x[8] = 1 + 2.0**-7 + 2.0**-8  # a tie, to even: up
    plain, ours = torch.empty(2, 1024, dtype=torch.bfloat16)
    _cast[(1,)](x, plain, ours)
    want = x.to(torch.bfloat16)
    some = ~want.isnan()
    assert torch.equal(ours[some].view(torch.int16), want[some].view(torch.int16))
    assert torch.equal(ours.isnan(), want.isnan())
    truncated = (x.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    assert torch.equal(plain[some], truncated[some]) and not torch.equal(plain[some], want[some]), (
        f"triton {triton.__version__}'s interpreter rounds casts to bf16: to_bf16's own rounding "
        "can go once this is the oldest triton that is supported"
    )


@triton.jit
def _decode_e4m3(byte_ptr, out_ptr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, decode_e4m3(tl.load(byte_ptr + at), False))


def test_every_e4m3_byte() -> None:
    codes = torch.arange(256).to(torch.uint8)
    out = torch.empty(256, dtype=torch.bfloat16)
    _decode_e4m3[(1,)](codes, out)
    want = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_one_scale_far_above_the_others(launch: str, splits: int) -> None:
    """Values of 2^40 in one group of one token take nothing from the other groups."""
    cache = KVCache.empty(4, 64, "v32_fp8")
    made = torch.Generator().manual_seed(0)
    cache.append(torch.randn(256, 512, generator=made), torch.randn(256, 64), torch.arange(256))
    rows = cache.rows_view()
    scales = rows[..., 512:528].contiguous().view(torch.float32)
    scales[2, 30, 3] *= 2.0**40
    rows[..., 512:528] = scales.view(torch.uint8)
    q = torch.randn(1, 1, 20, 576, generator=made).to(torch.bfloat16)
    q[..., :512] = 0
    call = Call(q, cache, torch.arange(256, dtype=torch.int32).view(1, 1, -1))
    out, lse, _ = launch_attend(
        q, [Source(cache, call.indices, None)], None, 576**-0.5, splits, LAUNCHES[launch], False
    )
    want = call.oracle()
    assert torch.allclose(lse.double(), want.lse, rtol=0, atol=1e-5)
    for group in range(4):
        part = slice(128 * group, 128 * group + 128)
        error = (out[..., part].double() - want.out[..., part]).norm()
        assert error <= 3e-3 * want.out[..., part].norm()


@pytest.mark.parametrize("launch", ["HEADS_16", "HEADS_64"])
@pytest.mark.parametrize("extreme", [0.0, 1e-38, 2e38])
def test_scales_that_have_no_reciprocal(extreme: float, launch: str) -> None:
    """A stored scale of 0, or one whose reciprocal is no normal number, still has its weight."""
    cache = KVCache.empty(4, 64, "v32_fp8")
    made = torch.Generator().manual_seed(0)
    cache.append(torch.randn(256, 512, generator=made), torch.randn(256, 64), torch.arange(256))
    rows = cache.rows_view().view(-1, 656).clone()
    scales = cache.layout.scales
    assert scales is not None
    values = scales.read(rows)
    values[::2, 1] = extreme
    values[1::3, 2] = extreme
    scales.write(rows, values)
    if extreme > 1:
        # The smallest e4m3 codes, so that values stay within bf16.
        rows[:, 128:384] = rows[:, 128:384] & 0x81
    cache.rows_view()[:] = rows.view(4, 64, 656)
    q = torch.randn(1, 1, 20, 576, generator=made).to(torch.bfloat16)
    q[..., 128:384] = 0
    call = Call(q, cache, torch.arange(256, dtype=torch.int32).view(1, 1, -1))
    out, lse, _ = launch_attend(
        q, [Source(cache, call.indices, None)], None, 576**-0.5, 1, LAUNCHES[launch], False
    )
    assert_weights_rounded_to_bf16(out, lse, call.oracle())
    # Tile by tile: one of huge values would hide what is wrong with the others.
    want = call.oracle().out.unflatten(-1, (4, 128))
    got = out.double().unflatten(-1, (4, 128))
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) < 0.02
