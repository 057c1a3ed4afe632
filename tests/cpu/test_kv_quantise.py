"""Number formats and the writers' rounding: every code, ties, hostile magnitudes, NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from drawn import generator, scale_of
from sparse_mla.kv_layout import LAYOUTS, KVLayout
from sparse_mla.kv_quantise import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_TINY,
    decode_e2m1,
    decode_ue8m0,
    encode_e2m1,
    encode_ue8m0,
    outer_scales,
    quantise_e2m1,
    quantise_e4m3,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
QUANTISED = [name for name, layout in LAYOUTS.items() if layout.quantised]
FP4 = [name for name, layout in LAYOUTS.items() if layout.latent.dtype == "e2m1"]
UE8M0 = [n for n, la in LAYOUTS.items() if la.scales is not None and la.scales.dtype == "ue8m0"]


def there_and_back(layout: KVLayout, latent: torch.Tensor) -> torch.Tensor:
    rope = torch.zeros(latent.shape[0], 64) if layout.rope else None
    scale = scale_of(layout)
    packed = layout.pack(latent, rope, tensor_scale=scale)
    return layout.unpack(*packed, tensor_scale=scale)[:, : layout.latent.count]


def test_every_e2m1_code_and_the_order_of_nibbles() -> None:
    values = [*E2M1, *(-v for v in E2M1)]
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    want = torch.tensor([[values[b & 15], values[b >> 4]] for b in range(256)])
    got = decode_e2m1(packed)
    assert torch.equal(got, want) and torch.equal(torch.signbit(got), torch.signbit(want))
    assert torch.equal(encode_e2m1(want), packed)


def test_e2m1_rounds_to_nearest_and_ties_to_even_codes() -> None:
    for (i, low), high in zip(enumerate(E2M1), E2M1[1:], strict=False):
        middle = (low + high) / 2
        even = low if i % 2 == 0 else high
        for x, want in (
            (middle, even),
            (math.nextafter(middle, 0.0), low),
            (math.nextafter(middle, 9.0), high),
        ):
            pair = torch.tensor([[x, -x]], dtype=torch.float64)
            assert decode_e2m1(encode_e2m1(pair)).tolist() == [[want, -want]], x
    far = torch.tensor([[7.0, -1e30, math.inf, -math.inf, math.nan, 0.0]])
    assert decode_e2m1(encode_e2m1(far)).tolist() == [[6.0, -6.0, 6.0, -6.0, 0.0, 0.0]]


def test_every_ue8m0_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = decode_ue8m0(codes)
    want = torch.tensor([2.0 ** (b - 127) for b in range(255)], dtype=torch.float64)
    assert torch.equal(got[:255].double(), want) and got[255].isnan()
    assert torch.equal(encode_ue8m0(got), codes)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 300.0, 1e6, 1e30])
@pytest.mark.parametrize("layout", UE8M0)
def test_ue8m0_scales_are_rounded_up(layout: str, magnitude: float) -> None:
    kind = LAYOUTS[layout]
    x = magnitude * torch.randn(40, kind.latent.count, generator=generator(1))
    x[0, 0], x[0, 1 : kind.tile] = 448 * 4.0, 0.0  # already a power of two: stays
    rope = torch.zeros(40, 64) if kind.rope else None
    rows, footers = kind.pack(x, rope)
    scales = kind.scales.read(footers if kind.planar else rows).double()
    exact = x.view(40, -1, kind.tile).abs().amax(-1).double() / E4M3_MAX
    assert (torch.frexp(scales)[0] == 0.5).all() and scales[0, 0] == 4.0
    assert (scales >= exact * (1 - 2.0**-23)).all() and (scales < 2 * exact).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 300.0, 1e6, 1e30])
def test_two_level_scales(magnitude: float) -> None:
    """Outer scale amax/2688 of the token; tile scales the nearest e4m3 to amax/6 over that."""
    x = magnitude * torch.randn(40, 512, generator=generator(2))
    x *= torch.exp(torch.randn(40, 32, generator=generator(3))).repeat_interleave(16, 1)
    outer = outer_scales(x)
    assert torch.allclose(outer[:, 0], x.abs().amax(1) / 2688, rtol=1e-6)
    _, scales = quantise_e2m1(x, 16, outer)
    want = x.view(40, 32, 16).abs().amax(-1).double() / 6 / outer.double()
    step = torch.exp2(want.clamp_min(2.0**-6).log2().floor()) / 8
    assert ((scales - want).abs() <= step / 2 * (1 + 1e-6)).all()
    assert (scales.amax(1) == E4M3_MAX).all(), "the largest tile is at the top of the range"


@pytest.mark.parametrize("outer", [None, 1.0, 0.01, 37.0])
def test_e2m1_values_are_the_nearest(outer: float | None) -> None:
    x = torch.randn(64, 512, generator=generator(4))
    factor = None if outer is None else torch.tensor([outer])
    values, scales = quantise_e2m1(x, 16, factor)
    unit = (scales * (1.0 if outer is None else outer)).double().repeat_interleave(16, 1)
    got = decode_e2m1(encode_e2m1(values)).double() * unit
    grid = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    best = (x.double()[..., None] - grid * unit[..., None]).abs().amin(-1)
    assert ((got - x.double()).abs() <= best + 1e-6 * unit).all()


def test_e4m3_scales_saturate_and_never_vanish() -> None:
    """Without an outer scale the range of e4m3 is all there is."""
    x = torch.ones(3, 32)
    x[0] *= 1e-12
    x[1] *= 1e6
    x[2, :16] = 0.0
    values, scales = quantise_e2m1(x, 16)
    assert scales.tolist() == [[E4M3_TINY] * 2, [E4M3_MAX] * 2, [1.0, scales[2, 1].item()]]
    back = decode_e2m1(encode_e2m1(values)) * scales.repeat_interleave(16, 1)
    assert back.isfinite().all() and (back[0] == 0).all() and (back[1] == 6 * 448).all()


@pytest.mark.parametrize("layout", QUANTISED)
def test_all_zero_tiles(layout: str) -> None:
    kind = LAYOUTS[layout]
    x = torch.zeros(3, kind.latent.count)
    x[1, kind.tile : 2 * kind.tile] = 7.0 if kind.tile < kind.latent.count else 0.0
    back = there_and_back(kind, x)
    assert back.isfinite().all() and (back[x == 0] == 0).all()
    assert (back[x != 0] - 7).abs().max() < 0.5 if (x != 0).any() else True


@pytest.mark.parametrize("layout", [n for n in QUANTISED if not LAYOUTS[n].tensor_scale])
@pytest.mark.parametrize("magnitude", [3e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite(layout: str, magnitude: float) -> None:
    kind = LAYOUTS[layout]
    x = magnitude * torch.linspace(-1, 1, kind.latent.count)[None]
    back = there_and_back(kind, x)
    assert back.isfinite().all()
    assert back.abs().max() <= max(1.15 * magnitude, 2.0**-126)
    if kind.name not in ("v41_fp4_planar", "v41_fp4_inline") and 1e-30 <= magnitude <= 1e30:
        assert (back - x.double()).abs().max() < 0.2 * magnitude


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", QUANTISED)
def test_what_is_not_finite_stays_visible(layout: str, bad: float) -> None:
    """In e4m3 as a NaN of its own; e2m1 has none, there the tile's scale is NaN."""
    kind = LAYOUTS[layout]
    x = torch.randn(2, kind.latent.count, generator=generator(6))
    x[0, 200] = 0.0
    clean = there_and_back(kind, x)
    x[0, 200] = bad
    got = there_and_back(kind, x)
    lost = torch.zeros_like(got, dtype=torch.bool)
    lost[0, 192:208] = layout in FP4
    lost[0, 200] = True
    assert torch.equal(got.isnan(), lost)
    assert torch.equal(got[~lost], clean[~lost])


def test_a_tensor_scale_is_taken_as_given_and_values_saturate() -> None:
    kind = LAYOUTS["fp8_tensor"]
    x = torch.full((1, 576), 3.0)
    x[0, 0], x[0, 1] = 1e6, -1e6
    rows, footers = kind.pack(x, None, tensor_scale=torch.tensor([0.5]))
    back = kind.unpack(rows, footers, tensor_scale=torch.tensor([0.5]))
    assert back[0, :3].tolist() == [224.0, -224.0, 3.0]
    assert torch.equal(kind.unpack(rows, footers, tensor_scale=torch.tensor([1.0])), 2 * back)


def test_scale_rounding_is_for_fp32_scales_alone() -> None:
    x = torch.randn(4, 512, generator=generator(7))
    for name, kind in LAYOUTS.items():
        if kind.scales is None or kind.scales.dtype == "fp32":
            continue
        part = x[:, : kind.latent.count]
        rope = torch.zeros(4, 64) if kind.rope else None
        packed = [kind.pack(part, rope, rounding, scale_of(kind)) for rounding in ("amax", "pow2")]
        assert all(torch.equal(a, b) for a, b in zip(*packed, strict=True)), name


def test_quantisers_take_any_float_and_any_count() -> None:
    x = torch.randn(5, 64, generator=generator(8)).to(torch.bfloat16)
    for rows, dtype in itertools.product((0, 1, 5), (torch.float32, torch.float64, torch.float16)):
        part = x[:rows].to(dtype)
        values, scales = quantise_e4m3(part, 32)
        assert values.shape == (rows, 64) and scales.shape == (rows, 2)
        values, scales = quantise_e2m1(part, 16, outer_scales(part))
        assert values.shape == (rows, 64) and scales.shape == (rows, 4)
        assert values.abs().amax() <= E2M1_MAX * 1.1 if rows else True
