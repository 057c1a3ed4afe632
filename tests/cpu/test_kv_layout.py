"""Packing to bytes and back: every e4m3 value, the error bound, hostile magnitudes, planar."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch

from drawn import generator
from sparse_mla.kv_layout import LAYOUTS, Field, KVLayout, get_layout
from sparse_mla.kv_quantise import E4M3_MAX, quantise_e4m3

V32 = LAYOUTS["v32_fp8"]


def e4m3_value(byte: int) -> float:
    """The number an e4m3 byte stands for, from the definition: sign, 4 bits (bias 7), 3 bits."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def v32_rows(latent: torch.Tensor, scales: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """v32_fp8 rows put together by hand: 512 e4m3 bytes, 4 float32, 64 bf16."""
    n = latent.shape[0]
    parts = (latent, scales.view(torch.uint8).view(n, 16), rope.view(torch.uint8).view(n, 128))
    return torch.cat(parts, dim=1)


def test_v32_fields_lie_where_the_format_says() -> None:
    made = generator(0)
    latent = torch.randint(0, 256, (9, 512), generator=made).to(torch.uint8)
    latent[(latent & 0x7F) == 0x7F] = 0
    scales = torch.rand(9, 4, generator=made)
    rope = torch.randn(9, 64, generator=made).to(torch.bfloat16)
    got = V32.unpack(v32_rows(latent, scales, rope), torch.empty(9, 0, dtype=torch.uint8))
    values = torch.tensor([e4m3_value(b) for b in range(256)], dtype=torch.float64)
    want = values[latent.int()].view(9, 4, 128) * scales.double()[..., None]
    assert torch.equal(got[:, :512], want.view(9, 512))
    assert torch.equal(got[:, 512:], rope.double())


def test_every_e4m3_value_survives_a_round_trip() -> None:
    codes = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    values = torch.tensor([e4m3_value(int(b)) for b in codes])
    # 254 codes and two extra 448 fill two tiles, each with amax 448: the scale is exactly 1.
    tile = torch.cat([values[:127], values[127:], torch.tensor([448.0, 448.0])])
    x = torch.cat([tile, tile])[None]
    packed, scales = quantise_e4m3(x, 128)
    assert torch.equal(scales, torch.ones(1, 4))
    assert torch.equal(packed.view(torch.uint8)[0, :254], codes)
    rows, footers = V32.pack(x, torch.zeros(1, 64))
    assert torch.equal(V32.unpack(rows, footers)[0, :512], x[0].double())


@pytest.mark.parametrize("rounding", ["amax", "pow2"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 300.0, 1e6, 1e30])
def test_error_is_at_most_half_an_ulp(rounding: str, magnitude: float) -> None:
    """Half an ulp of a normal e4m3 is 2^-4 of its power of two, of a subnormal 2^-10."""
    x = magnitude * torch.randn(64, 512, generator=generator(1))
    rows, footers = V32.pack(x, torch.zeros(64, 64), rounding)
    back = V32.unpack(rows, footers)[:, :512]
    scale = V32.scales.read(rows).double().repeat_interleave(128, 1)
    unscaled = x.double() / scale
    power = torch.exp2(unscaled.abs().clamp_min(2.0**-6).log2().floor())
    # The division by the scale is rounded to float32: 2^-24 more.
    bound = (power * 2.0**-4 + unscaled.abs() * 2.0**-23) * scale
    assert ((back - x.double()).abs() <= bound).all()


def test_amax_scale_is_amax_over_448() -> None:
    x = torch.randn(32, 512, generator=generator(2)) * 3
    _, scales = quantise_e4m3(x, 128, "amax")
    assert torch.equal(scales, x.view(32, 4, 128).abs().amax(-1) / E4M3_MAX)
    mantissa, _ = torch.frexp(scales)
    assert (mantissa != 0.5).all(), "the default must not round scales to powers of two"


def test_pow2_scale_is_the_next_power_of_two() -> None:
    x = torch.randn(32, 512, generator=generator(3)) * torch.exp(
        8 * torch.randn(32, 1, generator=generator(4))
    )
    x[0, 0], x[0, 1:128] = 448 * 4.0, 0.0  # already a power of two: stays
    exact = (x.view(32, 4, 128).abs().amax(-1) / E4M3_MAX).double()
    _, scales = quantise_e4m3(x, 128, "pow2")
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all()
    assert (scales.double() >= exact).all() and (scales.double() < 2 * exact).all()
    assert scales[0, 0] == 4.0


@pytest.mark.parametrize("rounding", ["amax", "pow2"])
def test_all_zero_tiles(rounding: str) -> None:
    x = torch.zeros(3, 512)
    x[1, 128:256] = 7.0  # 448 / 64: exact in every rounding
    rows, footers = V32.pack(x, torch.zeros(3, 64), rounding)
    assert torch.equal(V32.unpack(rows, footers)[:, :512], x.double())
    scales = V32.scales.read(rows)
    assert scales.isfinite().all() and (scales > 0).all()


@pytest.mark.parametrize("rounding", ["amax", "pow2"])
@pytest.mark.parametrize("magnitude", [3e-45, 1e-40, 1e-38, 3e38])
def test_extreme_magnitudes_stay_finite(rounding: str, magnitude: float) -> None:
    x = magnitude * torch.linspace(-1, 1, 512)[None]
    rows, footers = V32.pack(x, torch.zeros(1, 64), rounding)
    back = V32.unpack(rows, footers)[:, :512]
    assert back.isfinite().all()
    assert back.abs().max() <= 1.07 * magnitude  # never more than the next e4m3 above


def test_values_saturate_and_do_not_wrap() -> None:
    """amax/448 rounded down leaves quotients just above 448: the largest code, not NaN."""
    x = torch.exp(torch.randn(4096, 512, generator=generator(5)))
    values, _ = quantise_e4m3(x, 128)
    assert values.float().isfinite().all()
    assert values.float().amax() == E4M3_MAX
    negative, _ = quantise_e4m3(-x, 128)
    assert torch.equal(negative.float(), -values.float())


@pytest.mark.parametrize("rounding", ["amax", "pow2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_spoils_itself_only(rounding: str, bad: float) -> None:
    x = torch.randn(2, 512, generator=generator(6))
    x[0, 200] = 0.0
    clean = V32.unpack(*V32.pack(x, torch.zeros(2, 64), rounding))
    x[0, 200] = bad
    got = V32.unpack(*V32.pack(x, torch.zeros(2, 64), rounding))
    assert got[0, 200].isnan()
    got[0, 200] = 0.0
    assert torch.equal(got, clean)


@pytest.mark.parametrize("name", ["bf16", "bf16_nope"])
def test_bf16_layouts_keep_bf16_exactly(name: str) -> None:
    layout = LAYOUTS[name]
    latent = torch.randn(5, 512, generator=generator(7)).to(torch.bfloat16)
    rope = torch.randn(5, 64).to(torch.bfloat16) if layout.rope else None
    rows, footers = layout.pack(latent, rope)
    assert rows.shape == (5, layout.row_bytes) and footers.shape == (5, 0)
    parts = [latent] if rope is None else [latent, rope]
    assert torch.equal(layout.unpack(rows, footers), torch.cat(parts, 1).double())
    assert torch.equal(rows, torch.cat(parts, 1).view(torch.uint8))


def test_sizes_are_those_of_the_format_table() -> None:
    sizes = {n: (la.bytes_per_token, la.d_qk, la.d_v) for n, la in LAYOUTS.items()}
    assert sizes == {
        "v32_fp8": (656, 576, 512),
        "bf16": (1152, 576, 512),
        "bf16_nope": (1024, 512, 512),
        "v4_fp8": (584, 512, 512),
        "v41_fp8_planar": (528, 512, 512),
        "v41_fp8_inline": (528, 512, 512),
        "v41_fp4_planar": (288, 512, 512),
        "v41_fp4_inline": (288, 512, 512),
        "glm53_nope_fp8": (528, 512, 512),
        "glm53_nope_nvfp4": (304, 512, 512),
        "nvfp4_bf16_rope": (416, 576, 512),
        "fp8_tensor": (576, 576, 512),
    }
    planar = {"v4_fp8": 576, "v41_fp8_planar": 512, "v41_fp4_planar": 512}
    assert {n: la.page_multiple for n, la in LAYOUTS.items() if la.planar} == planar
    assert {n for n, la in LAYOUTS.items() if la.extra_only} == {"v41_fp4_planar", "v41_fp4_inline"}
    assert {n for n, la in LAYOUTS.items() if la.tensor_scale} == {"nvfp4_bf16_rope", "fp8_tensor"}


def planar_layout(page_multiple: int = 640) -> KVLayout:
    """A made-up layout whose scales lie in a footer after all rows of the page."""
    return KVLayout(
        name="planar_for_test",
        latent=Field(0, 512, "e4m3"),
        scales=Field(8, 4, "fp32"),
        tile=128,
        rope=Field(512, 64, "bf16"),
        row_bytes=640,
        footer_bytes=24,
        page_multiple=page_multiple,
    )


def test_a_planar_layout_is_data() -> None:
    layout = planar_layout()
    assert layout.planar and layout.bytes_per_token == 664
    assert layout.page_bytes(3) == 4 * 640  # 3 * 664 = 1992, padded to the next 640
    x = torch.randn(6, 512, generator=generator(8))
    rope = torch.randn(6, 64, generator=generator(9))
    rows, footers = layout.pack(x, rope)
    v32 = V32.pack(x, rope)[0]
    assert torch.equal(rows, torch.cat([v32[:, :512], v32[:, 528:]], 1))
    assert torch.equal(footers[:, 8:], v32[:, 512:528]) and (footers[:, :8] == 0).all()
    assert torch.equal(layout.unpack(rows, footers), V32.unpack(v32, footers[:, :0]))


def test_names() -> None:
    assert get_layout("bf16") is LAYOUTS["bf16"]
    assert get_layout(V32) is V32
    for wrong in ("v32", "", "BF16", 528, None, ["bf16"]):
        with pytest.raises(ValueError, match=r"layout is .*allowed: v32_fp8, bf16, bf16_nope"):
            get_layout(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale_rounding is 'down', allowed: amax, pow2"):
        quantise_e4m3(torch.zeros(1, 128), 128, "down")
    with pytest.raises(ValueError, match="rope is None, layout v32_fp8 stores 64"):
        V32.pack(torch.zeros(1, 512), None)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

# The format's numbers once more, by hand: bytes of row and footer; then for values, scales, RoPE
# and outer scale (offset, count, kind), scales counting from the footer where there is one.
BY_HAND: dict[str, dict[str, Any]] = {
    "v32_fp8": {
        "size": (656, 0), "values": (0, 512, "e4m3"), "scales": (512, 4, "fp32"), "rope": 528,
    },
    "v4_fp8": {
        "size": (576, 8), "values": (0, 448, "e4m3"), "scales": (0, 7, "ue8m0"), "rope": 448,
    },
    "v41_fp8_planar": {"size": (512, 16), "values": (0, 512, "e4m3"), "scales": (0, 16, "ue8m0")},
    "v41_fp8_inline": {"size": (528, 0), "values": (0, 512, "e4m3"), "scales": (512, 16, "ue8m0")},
    "v41_fp4_planar": {"size": (256, 32), "values": (0, 512, "e2m1"), "scales": (0, 32, "e4m3")},
    "v41_fp4_inline": {"size": (288, 0), "values": (0, 512, "e2m1"), "scales": (256, 32, "e4m3")},
    "glm53_nope_fp8": {"size": (528, 0), "values": (0, 512, "e4m3"), "scales": (512, 4, "fp32")},
    "glm53_nope_nvfp4": {
        "size": (304, 0), "values": (0, 512, "e2m1"), "scales": (256, 32, "e4m3"), "outer": 292,
    },
    "nvfp4_bf16_rope": {
        "size": (416, 0), "values": (0, 512, "e2m1"), "scales": (256, 32, "e4m3"), "rope": 288,
    },
    "fp8_tensor": {"size": (576, 0), "values": (0, 576, "e4m3")},
}  # fmt: skip


def number(raw: bytes, at: int, index: int, kind: str) -> float:
    if kind == "e2m1":
        byte = raw[at + index // 2]
        return E2M1[byte >> 4 if index % 2 else byte & 15]
    if kind == "e4m3":
        return e4m3_value(raw[at + index])
    if kind == "ue8m0":
        byte = raw[at + index]
        return math.nan if byte == 255 else 2.0 ** (byte - 127)
    if kind == "bf16":
        low, high = raw[at + 2 * index : at + 2 * index + 2]
        return float(struct.unpack("<f", bytes([0, 0, low, high]))[0])
    return float(struct.unpack_from("<f", raw, at + 4 * index)[0])


def by_hand(name: str, row: bytes, footer: bytes, tensor_scale: float) -> list[float]:
    """A token's numbers, byte by byte in Python's floats; their products are exact."""
    what = BY_HAND[name]
    at, count, kind = what["values"]
    factor = tensor_scale * (number(row, what["outer"], 0, "fp32") if "outer" in what else 1.0)
    values = []
    for i in range(count):
        scale = 1.0
        if "scales" in what:
            scales_at, scales, scale_kind = what["scales"]
            table = footer if footer else row
            scale = number(table, scales_at, i // (count // scales), scale_kind)
        values.append(number(row, at, i, kind) * scale * factor)
    if "rope" in what:
        values += [number(row, what["rope"], i, "bf16") for i in range(64)]
    return values


@pytest.mark.parametrize("name", BY_HAND)
def test_random_bytes_mean_what_the_format_says(name: str) -> None:
    """All bytes random: every code, NaN and Inf among them, pad bytes too."""
    layout = LAYOUTS[name]
    n, (size, extra) = 6, BY_HAND[name]["size"]
    assert (layout.row_bytes, layout.footer_bytes) == (size, extra)
    made = generator(21)
    rows = torch.randint(0, 256, (n, size), generator=made).to(torch.uint8)
    footers = torch.randint(0, 256, (n, extra), generator=made).to(torch.uint8)
    scale = torch.tensor([0.7]) if layout.tensor_scale else None
    got = layout.unpack(rows, footers, tensor_scale=scale)
    factor = 1.0 if scale is None else scale.item()
    want = [
        by_hand(name, bytes(row.tolist()), bytes(footer.tolist()), factor)
        for row, footer in zip(rows, footers, strict=True)
    ]
    same = torch.tensor(want, dtype=torch.float64)
    assert got.dtype == torch.float64 and got.shape == (n, layout.d_qk)
    assert torch.equal(got.isnan(), same.isnan())
    assert torch.equal(got.nan_to_num(0.0), same.nan_to_num(0.0))


@pytest.mark.parametrize("name", BY_HAND)
def test_a_round_trip_of_what_unpacks_exactly(name: str) -> None:
    """What was unpacked once is packed and unpacked to the same numbers again, nearly always.

    Its tiles' largest values need not be the format's largest, so scales may change: the numbers
    then are rounded once more, by the format's own half step at most.
    """
    layout = LAYOUTS[name]
    made = generator(22)
    latent = torch.randn(50, layout.latent.count, generator=made)
    rope = torch.randn(50, 64, generator=made).to(torch.bfloat16) if layout.rope else None
    scale = torch.tensor([0.02]) if layout.tensor_scale else None
    once = layout.unpack(*layout.pack(latent, rope, tensor_scale=scale), tensor_scale=scale)
    width = layout.latent.count
    again = layout.unpack(
        *layout.pack(once[:, :width], rope, tensor_scale=scale), tensor_scale=scale
    )
    if layout.latent.dtype == "e4m3":
        assert torch.allclose(again, once, rtol=1e-6)
    moved = (again - once).norm() / once.norm()
    quantised = (once[:, :width] - latent).norm() / latent.norm()
    assert moved <= quantised
    if rope is not None:
        assert torch.equal(once[:, width:], rope.double())


def test_pad_bytes_are_zero_and_never_read() -> None:
    v4, nvfp4 = LAYOUTS["v4_fp8"], LAYOUTS["glm53_nope_nvfp4"]
    made = generator(23)
    rows, footers = v4.pack(torch.randn(5, 448, generator=made), torch.zeros(5, 64))
    assert (footers[:, 7] == 0).all()
    before = v4.unpack(rows, footers)
    footers[:, 7] = 0xFF
    assert torch.equal(v4.unpack(rows, footers), before)
    rows, none = nvfp4.pack(torch.randn(5, 512, generator=made), None)
    assert (rows[:, 288:292] == 0).all() and (rows[:, 296:] == 0).all()
    before = nvfp4.unpack(rows, none)
    rows[:, 288:292] = rows[:, 296:] = 0xFF
    assert torch.equal(nvfp4.unpack(rows, none), before)


@pytest.mark.parametrize(
    ("layout", "scale", "message"),
    [
        ("v32_fp8", torch.ones(1), "tensor_scale is given, layout v32_fp8 has none"),
        ("fp8_tensor", None, r"tensor_scale is NoneType, layout fp8_tensor needs a tensor \[1\]"),
        ("fp8_tensor", 0.5, "tensor_scale is float"),
        ("fp8_tensor", torch.tensor(0.5), r"tensor_scale is \(\) of torch.float32"),
        ("nvfp4_bf16_rope", torch.ones(2), r"tensor_scale is \(2,\)"),
        ("nvfp4_bf16_rope", torch.ones(1).double(), "of torch.float64 on cpu"),
        ("nvfp4_bf16_rope", torch.ones(1, device="meta"), "on meta"),
    ],
)
def test_tensor_scales(layout: str, scale: Any, message: str) -> None:
    kind = LAYOUTS[layout]
    latent = torch.zeros(1, kind.latent.count)
    rope = torch.zeros(1, 64) if kind.rope else None
    with pytest.raises(ValueError, match=message):
        kind.pack(latent, rope, tensor_scale=scale)
    rows = torch.zeros(1, kind.row_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        kind.unpack(rows, rows[:, :0], tensor_scale=scale)
