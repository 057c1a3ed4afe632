"""The cache writer's Triton kernel, interpreted: the very bytes that torch packs."""

from __future__ import annotations

import pytest
import torch

import tokens
from sparse_mla import LAYOUTS
from sparse_mla.ops.kv_write.triton import LAUNCH, LAUNCH_FEW, Launch, run
from sparse_mla.ops.kv_write.triton_kernel import to_e4m3
from sparse_mla.ops.sparse_decode.triton_kernel import INTERPRET

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N = 45


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes(layout: str, dtype: torch.dtype) -> None:
    """Every layout and dtype, pages of 64 and 3 tokens, int32 and int64 slots, one skipped."""
    assert INTERPRET.value is True
    latent, rope = tokens.draw(LAYOUTS[layout], N, dtype)
    for page_size, slot_dtype, rounding, gap in (
        (64, torch.int64, "amax", 0),
        (3, torch.int32, "pow2", 144),
    ):
        want = tokens.make_cache(LAYOUTS[layout], 64, page_size, gap)
        got = tokens.make_cache(LAYOUTS[layout], 64, page_size, gap)
        slots = torch.randperm(want.num_slots)[:N].to(slot_dtype)
        slots[-2] = -1
        want.append(latent, rope, slots, scale_rounding=rounding, backend="cpu")
        got.append(latent, rope, slots, scale_rounding=rounding, backend="triton")
        assert torch.equal(got.pages, want.pages)
        assert not torch.equal(got.pages, torch.full_like(got.pages, tokens.POISON))


@pytest.mark.parametrize("launch", [LAUNCH, LAUNCH_FEW, Launch(16, 8)])
def test_launches(launch: Launch) -> None:
    layout = LAYOUTS["v4_fp8"]
    latent, rope = tokens.draw(layout, N, torch.bfloat16)
    want, got = tokens.make_cache(layout, 50), tokens.make_cache(layout, 50)
    slots = torch.arange(N)
    want.append(latent, rope, slots, backend="cpu")
    run(got, latent, rope, slots, "amax", launch)
    assert torch.equal(got.pages, want.pages)


def test_strides_and_odd_dtypes() -> None:
    """Parts of one wider tensor, every other column, float64."""
    layout = LAYOUTS["v32_fp8"]
    wide = torch.randn(5, 1300)
    parts = (
        (wide[:, :512], wide[:, 512:576]),
        (wide[:, : 2 * 512 : 2], wide[:, 1024:1152:2]),
        (wide[:, :512].double(), wide[:, 512:576].double()),
        (wide[:1, :512].expand(5, -1), wide[:1, :64].expand(5, -1)),
    )
    for latent, rope in parts:
        want, got = tokens.make_cache(layout, 64), tokens.make_cache(layout, 64)
        slots = torch.tensor([9, 3, 1, 63, 0], dtype=torch.int32)
        want.append(latent, rope, slots, backend="cpu")
        got.append(latent, rope, slots, backend="triton")
        assert torch.equal(got.pages, want.pages)


def test_slots_outside_the_cache_are_skipped() -> None:
    layout = LAYOUTS["v41_fp8_planar"]
    slots = torch.tensor([-1, -2, 64, 2**31 - 1, -(2**31), 7, 2**40, 2**32 + 7])
    latent = torch.randn(8, 512)
    want, got = tokens.make_cache(layout, 64), tokens.make_cache(layout, 64)
    want.append(latent[5:6], None, slots[5:6], backend="cpu")
    got.append(latent, None, slots, check_slots=False, backend="triton")
    assert torch.equal(got.pages, want.pages)
    with pytest.raises(ValueError, match=r"slots holds -2, allowed: -1 \(skip\) or 0\.\.63"):
        got.append(latent, None, slots, check_slots=True, backend="triton")


def test_no_tokens() -> None:
    cache = tokens.make_cache(LAYOUTS["bf16_nope"], 4, 4)
    cache.append(torch.empty(0, 512), None, torch.empty(0, dtype=torch.int32), backend="triton")
    assert bool((cache.pages == tokens.POISON).all())


def test_e4m3_rounding_is_torchs() -> None:
    """The portable conversion on every e4m3 number, what lies between two, and next to that."""
    import triton
    import triton.language as tl

    @triton.jit
    def convert(source, target, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(target + at, to_e4m3(tl.load(source + at)))

    finite = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (finite[1:] + finite[:-1]) / 2
    near = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, 1e9)]
    positive = torch.cat([finite, middle, *near, torch.tensor([464.0, 1e-42, 3e38])])
    positive = positive.clamp_max(448)
    x = torch.zeros(2048)
    x[: 2 * len(positive)] = torch.cat([positive, -positive])
    got = torch.empty(2048, dtype=torch.uint8)
    convert[(1,)](x, got, 2048)
    assert torch.equal(got, x.to(torch.float8_e4m3fn).view(torch.uint8))
