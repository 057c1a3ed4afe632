"""Cases of the cache writer (op "kv_write")."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kv_layout import get_layout
from ..kv_quantise import E4M3_MAX
from .case import Case, WriteInputs
from .case_inputs import VALUES, move, normal, poisoned_cache, rng, scale_for, uniform
from .case_special import large_cache

Fill = Callable[[torch.Generator, torch.Tensor], torch.Tensor]


def _zero_tiles(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """Tiles, and whole tokens, that are all zero."""
    x[0::4, 0:128] = 0
    x[1::4, 256:] = 0
    x[2::4] = 0
    return x


def _magnitudes(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """Tiles from 1e-30 to 1e30, one of each in a token, and fp32's own extremes."""
    tiles = -(-x.shape[1] // 128)
    powers = torch.tensor([-30.0, 30.0, -6.0, 0.0, 12.0, -20.0, 25.0])
    pick = powers[torch.randint(0, len(powers), (x.shape[0], tiles), generator=g)]
    x = x * (10.0**pick).repeat_interleave(128, 1)[:, : x.shape[1]]
    x[0, 0:128] = normal(g, 128) * 2.0**-126
    x[1, 0:128] = torch.sign(normal(g, 128)) * 3e38
    return x


def _saturating(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """Tiles whose largest value divided by the scale lands on 448 or a rounding above it."""
    peak = uniform(g, 0.1, 1000, x.shape[0], 1)
    x = x.clamp(-1, 1) * peak
    x[:, 0::128] = peak
    x[:, 1::128] = -peak
    x[:, 2::128] = torch.nextafter(peak, torch.zeros_like(peak))
    x[:, 3::128] = peak * (E4M3_MAX - 8) / E4M3_MAX
    return x


def _not_finite(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """NaN and Inf in some places; the rest of their tile stays as good as it was."""
    x[0, 5] = float("nan")
    x[1, 200] = float("inf")
    x[2, 300] = float("-inf")
    x[3, 384:512] = float("nan")
    return x


def _zeros_and_not_finite(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """Zero tiles and tokens, and some NaN and Inf elsewhere."""
    x = _zero_tiles(g, x)
    x[3, 5], x[7, 200], x[11, 300] = float("nan"), float("inf"), float("-inf")
    return x


def _ties(g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """Midpoints between e4m3 numbers, subnormal ones too, in tiles whose largest value is 448."""
    steps = torch.randint(8, 16, x.shape, generator=g) + 0.5
    x = torch.sign(x) * torch.ldexp(steps, torch.randint(-9, 5, x.shape, generator=g))
    low = torch.sign(x) * (torch.randint(0, 8, x.shape, generator=g) + 0.5) * 2.0**-9
    x = torch.where(uniform(g, 0, 1, *x.shape) < 0.2, low, x)
    x[:, 0::32] = E4M3_MAX
    return torch.ldexp(x, torch.randint(-20, 20, (x.shape[0], 1), generator=g))


def _hostile_rope(g: torch.Generator, n: int) -> torch.Tensor:
    """Magnitudes that only bf16 and fp32 hold, and NaN and Inf."""
    rope = normal(g, n, 64) * 10 ** uniform(g, -30, 30, n, 1)
    rope[0, 3], rope[1, 60], rope[2, 0] = float("nan"), float("inf"), float("-inf")
    return rope


def _write_case(
    name: str,
    about: str,
    shows: tuple[str, ...] = (),
    fill: Fill | None = None,
    *,
    layout: str = "v32_fp8",
    values: str = "gaussian",
    rounding: str = "amax",
    page_size: int = 64,
    page_pad: int = 0,
    row_pad: int = 0,
    base: int = 0,
    skip: bool = False,
    strided: bool = False,
    int32: bool = False,
    hostile_rope: bool = False,
    saturated: float = 1.0,
    past_2gib: bool = False,
    dtype: torch.dtype = torch.float32,
    n: int = 48,
    quick: bool = False,
) -> Case:
    full = f"kv_write/{name}"

    def build(seed: int, device: torch.device) -> list[WriteInputs]:
        g = rng(seed, full)
        fields = get_layout(layout)
        x = VALUES[values](g, n, fields.latent.count)
        if fill is not None:
            x = fill(g, x)
        rope = _hostile_rope(g, n) if hostile_rope else normal(g, n, 64)
        if past_2gib:
            cache = large_cache(layout, page_size, None, device)
            at = torch.tensor([2**31, 2**32]) * cache.page_size // cache.pages.stride(0)
            slots = torch.cat([at[0] + torch.arange(n // 2), at[1] + torch.arange(n - n // 2)])
            slots = slots[torch.randperm(n, generator=g)] - 8
        else:
            scale = scale_for(fields, torch.where(torch.isfinite(x), x, 0.0))
            scale = None if scale is None else scale / saturated
            pages = -(-2 * n // page_size) + 1
            cache = poisoned_cache(pages, page_size, layout, page_pad, device, scale, row_pad, base)
            slots = torch.randperm(cache.num_slots, generator=g)[:n]
        if skip:
            slots[torch.rand(n, generator=g) < 0.4] = -1
        if int32:
            slots = slots.int()
        latent, rope = x.to(dtype), rope.to(dtype)
        if strided:
            # Columns of one wider tensor, as a projection's output is.
            latent = torch.cat([rope, latent, rope], 1)[:, rope.shape[1] : -rope.shape[1]]
            rope = torch.cat([rope, rope + 1], 1)[:, : rope.shape[1]]
        latent, rope = move(latent, device), move(rope, device)
        given = rope if fields.rope else None
        return [WriteInputs(cache, latent, given, slots.to(device), rounding)]

    return Case(full, "kv_write", about, shows, build, quick=quick)


def _layout_cases() -> list[Case]:
    """Every layout with a writer of its own: plain, hostile magnitudes, slots."""
    slots = ("writer_slot_off_by_page", "writer_packed_stride")
    zeros = ("writer_zero_tile_nan",)
    cases: list[Case] = []
    for layout in (
        "v4_fp8",
        "v41_fp8_planar",
        "v41_fp8_inline",
        "v41_fp4_planar",
        "v41_fp4_inline",
        "glm53_nope_fp8",
        "glm53_nope_nvfp4",
        "nvfp4_bf16_rope",
        "fp8_tensor",
    ):
        fields = get_layout(layout)
        planar = ("writer_planar_as_inline",) * fields.planar
        fp8 = fields.latent.dtype == "e4m3"
        tiled = fp8 and fields.scales is not None
        cases += [
            _write_case(
                f"layout/{layout}",
                f"{layout}: pages of 53 in a padded pool, some tokens skipped",
                slots + planar,
                layout=layout,
                values="token_magnitudes" if tiled else "gaussian",
                page_size=53,
                page_pad=48,
                skip=True,
                n=24,
                quick=layout == "v4_fp8",
            ),
            _write_case(
                f"layout/{layout}/not_finite",
                f"{layout}: NaN and Inf stay visible, zero tiles stay zero",
                zeros * tiled + planar,
                _zeros_and_not_finite,
                layout=layout,
                page_size=16,
                n=24,
            ),
        ]
        if layout in ("v4_fp8", "v41_fp8_planar", "glm53_nope_fp8", "glm53_nope_nvfp4"):
            cases.append(
                _write_case(
                    f"layout/{layout}/magnitudes",
                    f"{layout}: tiles from 1e-30 to 1e30",
                    ("writer_tiny_flushed",) * tiled,
                    _magnitudes,
                    layout=layout,
                    page_size=16,
                    n=24,
                )
            )
    cases.append(
        _write_case(
            "layout/v4_fp8/offsets",
            "v4_fp8: slots either side of 2^31 and 2^32 bytes",
            ("writer_slot_off_by_page", "writer_int32_overflow"),
            layout="v4_fp8",
            past_2gib=True,
        )
    )
    return cases


def _seldom() -> list[Case]:
    """Counts, strides and numbers that one model's writer never meets."""
    pool = ("writer_packed_stride", "writer_storage_offset_ignored")
    cases = [
        _write_case(f"tokens/{n}", f"{n} tokens", ("writer_tail_lost",) * (n > 1), n=n)
        for n in (1, 37, 1501)
    ]
    cases += [
        _write_case("tokens/0", "no token at all", n=0),
        _write_case(
            "strided",
            "latent and RoPE part are columns of wider tensors, int32 slots",
            ("writer_strides_ignored",),
            strided=True,
            int32=True,
            skip=True,
        ),
        _write_case(
            "rope",
            "RoPE parts from 1e-30 to 1e30, NaN and Inf",
            ("writer_bf16_limited",),
            hostile_rope=True,
        ),
        _write_case(
            "bf16/magnitudes",
            "bf16 layout: values from 1e-30 to 1e30",
            ("writer_bf16_limited",),
            _magnitudes,
            layout="bf16",
            page_size=16,
        ),
        _write_case(
            "bf16/not_finite",
            "bf16 layout: NaN and Inf stay",
            (),
            _not_finite,
            layout="bf16",
            page_size=16,
        ),
    ]
    for layout in ("fp8_tensor", "nvfp4_bf16_rope"):
        cases.append(
            _write_case(
                f"layout/{layout}/saturation",
                f"{layout}: a tensor scale that is four times too small: values saturate",
                ("writer_tensor_unsaturated",) * (layout == "fp8_tensor"),
                layout=layout,
                page_size=16,
                saturated=4.0,
            )
        )
    for layout, pad in (("v32_fp8", 112), ("glm53_nope_fp8", 128), ("bf16", 64)):
        cases.append(
            _write_case(
                f"row_stride/{layout}",
                f"{layout}, {pad} bytes after each token stay, in a pool that begins elsewhere",
                pool,
                layout=layout,
                row_pad=pad,
                page_pad=256,
                base=4096 + 16,
                page_size=16,
            )
        )
    return cases


WRITE_CASES: tuple[Case, ...] = (
    _write_case("gaussian", "Gaussian tokens, fp32 scales", (), quick=True),
    _write_case("gaussian/bf16_input", "bf16 tokens", (), dtype=torch.bfloat16),
    _write_case(
        "gaussian/pow2", "scales rounded up to powers of two", (), rounding="pow2", quick=True
    ),
    _write_case(
        "outlier_channels", "outlier channels: most values near zero", (), values="outlier_channels"
    ),
    _write_case(
        "zero_tiles",
        "all-zero tiles and tokens: 0/0 must not happen",
        ("writer_zero_tile_nan",),
        _zero_tiles,
        quick=True,
    ),
    _write_case(
        "zero_tiles/pow2",
        "all-zero tiles, power-of-two scales",
        ("writer_zero_tile_nan",),
        _zero_tiles,
        rounding="pow2",
    ),
    _write_case(
        "magnitudes", "tiles from 1e-30 to 1e30", ("writer_tiny_flushed",), _magnitudes, quick=True
    ),
    _write_case(
        "magnitudes/pow2",
        "tiles from 1e-30 to 1e30, power-of-two scales",
        ("writer_tiny_flushed",),
        _magnitudes,
        rounding="pow2",
    ),
    _write_case(
        "saturation",
        "values at 448 times the scale and a rounding beyond",
        ("writer_no_saturation",),
        _saturating,
        quick=True,
    ),
    _write_case(
        "saturation/pow2",
        "the same with power-of-two scales",
        ("writer_no_saturation",),
        _saturating,
        rounding="pow2",
    ),
    *(
        _write_case(
            f"ties/{layout}/{rounding}",
            f"{layout}, values halfway between e4m3 numbers: to the even one ({rounding})",
            (),
            _ties,
            layout=layout,
            rounding=rounding,
            dtype=torch.bfloat16,
            page_size=16,
        )
        for layout, rounding in (("v32_fp8", "amax"), ("v32_fp8", "pow2"), ("v4_fp8", "pow2"))
    ),
    _write_case(
        "not_finite", "NaN and Inf stay visible and leave their tile alone", (), _not_finite
    ),
    _write_case(
        "skip",
        "-1 skips a token; nothing else is touched",
        ("writer_slot_off_by_page",),
        skip=True,
        quick=True,
    ),
    _write_case("page_size/53", "53 tokens per page", ("writer_slot_off_by_page",), page_size=53),
    _write_case("page_size/1", "one token per page", ("writer_slot_off_by_page",), page_size=1),
    _write_case(
        "page_stride",
        "padded page stride: bytes between pages stay",
        ("writer_slot_off_by_page", "writer_packed_stride"),
        page_pad=4096,
        page_size=16,
        quick=True,
    ),
    _write_case(
        "offsets",
        "slots either side of 2^31 and 2^32 bytes",
        ("writer_slot_off_by_page", "writer_int32_overflow"),
        past_2gib=True,
    ),
    _write_case("bf16", "bf16 layout", ("writer_slot_off_by_page",), layout="bf16", page_size=16),
    _write_case(
        "bf16_nope", "bf16 layout without RoPE", (), layout="bf16_nope", page_size=16, skip=True
    ),
    *_layout_cases(),
    *_seldom(),
)
