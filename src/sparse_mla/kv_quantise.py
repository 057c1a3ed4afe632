"""Number formats of quantised caches, and how a writer rounds to them.

e2m1 is a 4-bit float (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two to a byte with the even
element in the low nibble; ue8m0 is a byte that means 2 ** (byte - 127), 255 being NaN. Both are
decoded by their definition here, as torch's own types for them are young.

The writers follow public ones, in words of our own:

- fp32 and ue8m0 scales: amax/448, as it is or rounded up to a power of two (`quantize_k_cache` in
  tests/quant.py of deepseek-ai/FlashMLA; there amax/448 is also held above 1e-4, which costs small
  tiles their bits, and is not done here);
- e4m3 scales over 16 e2m1 values: amax/6 over an outer scale, rounded to nearest. The outer scale
  is per token, amax/(6 * 448), which puts the largest tile's scale at the top of e4m3's range
  (local-inference-lab/b12x pull request 86), or per layer and given (sgl-project/sglang pull
  request 35237), or there is none.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""The smallest e4m3 number above 0."""
E2M1_MAX = 6.0
FP32_MIN_NORMAL = 2.0**-126

SCALE_ROUNDINGS = ("amax", "pow2")

# Below it the product of outer scale and smallest e4m3 scale would be subnormal in fp32.
_MIN_OUTER = FP32_MIN_NORMAL / E4M3_TINY

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def check_scale_rounding(scale_rounding: str) -> None:
    if scale_rounding not in SCALE_ROUNDINGS:
        raise ValueError(
            f"scale_rounding is {scale_rounding!r}, allowed: {', '.join(SCALE_ROUNDINGS)}"
        )


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [n, w] as float32 values [n, 2 w]: low nibbles are the even elements."""
    values = [*_E2M1, *(-v for v in _E2M1)]
    table = torch.tensor(values, dtype=torch.float32, device=packed.device)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1)
    return table[codes.long()].flatten(-2)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Floats [n, d] as packed bytes [n, d // 2], rounded to nearest, ties to even, saturated.

    NaN has no code: it becomes 0.
    """
    size = values.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    # Midpoints between neighbours; a tie goes to the even code.
    for edge in (0.25, 1.25, 2.5, 5.0):
        code += size > edge
    for edge in (0.75, 1.75, 3.5):
        code += size >= edge
    code |= torch.signbit(values).to(torch.uint8) << 3
    code.masked_fill_(torch.isnan(values), 0)
    return code[..., 0::2] | code[..., 1::2] << 4


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """Bytes as float32 powers of two: 0 is 2^-127, 255 is NaN."""
    bits = codes.to(torch.int32) << 23
    bits.masked_fill_(codes == 0, 1 << 22).masked_fill_(codes == 255, 0x7FC00000)
    return bits.view(torch.float32)


def encode_ue8m0(powers: torch.Tensor) -> torch.Tensor:
    """Powers of two from 2^-127 to 2^127 as bytes; NaN as 255."""
    _, exponent = torch.frexp(powers.to(torch.float64))
    code = (exponent + 126).to(torch.uint8)
    return code.masked_fill_(torch.isnan(powers), 255)


def tile_maxima(x: torch.Tensor, tile: int) -> torch.Tensor:
    """Largest magnitude among the finite values of every `tile` of x [n, d], float32."""
    tiles = x.to(torch.float32).unflatten(1, (-1, tile))
    return torch.where(torch.isfinite(tiles), tiles, 0.0).abs().amax(-1)


def over(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, correctly rounded: on CUDA torch multiplies by a Python number's reciprocal."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def quantise_e4m3(
    x: torch.Tensor, tile: int, scale_rounding: str = "amax"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, d] to e4m3 values with one fp32 scale for every `tile` values.

    The scale is amax/448 over the tile's finite values (`scale_rounding="amax"`, as SGLang and
    vLLM write it) or the next power of two above it ("pow2", as FlashMLA's tests write it). It is
    1 for an all-zero tile and never below the smallest normal fp32, so that 0/0 cannot occur.
    Finite values saturate at +-448; NaN and Inf become the e4m3 NaN, so that a poisoned token
    stays visible and leaves the rest of its tile alone.

    Returns:
        values [n, d] float8_e4m3fn and scales [n, d // tile] float32.
    """
    check_scale_rounding(scale_rounding)
    amax = tile_maxima(x, tile)
    scales = over(amax, E4M3_MAX).clamp_min(FP32_MIN_NORMAL)
    if scale_rounding == "pow2":
        mantissa, exponent = torch.frexp(scales)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    scales = torch.where(amax == 0, 1.0, scales)
    return divide_to_e4m3(x, scales), scales


def divide_to_e4m3(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [n, d] over scales [n, tiles] (or [1]) as e4m3, saturated; NaN and Inf as NaN."""
    tiles = x.to(torch.float32).unflatten(1, (scales.shape[-1], -1))
    values = (tiles / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    values = torch.where(torch.isfinite(tiles), values, float("nan"))
    return values.flatten(1).to(torch.float8_e4m3fn)


def outer_scales(x: torch.Tensor) -> torch.Tensor:
    """The outer scale of every token of x [n, d], [n, 1] float32: amax/(6 * 448), 1 for zeros."""
    amax = tile_maxima(x, x.shape[1])
    scales = over(amax, E2M1_MAX * E4M3_MAX).clamp_min(_MIN_OUTER)
    return torch.where(amax == 0, 1.0, scales)


def quantise_e2m1(
    x: torch.Tensor, tile: int, outer: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, d] to e2m1 values with one e4m3 scale for every `tile` values.

    The scale is amax/6 over `outer`, rounded to the nearest e4m3 number and held between the
    smallest one and 448; 1 for an all-zero tile. Values saturate at +-6. As e2m1 has no NaN, a
    tile with a NaN or Inf gets a NaN scale: all its values are lost, and visibly so.

    Args:
        outer: [n, 1] or [1] float32, positive; None for none.

    Returns:
        values [n, d] float32, not yet rounded to e2m1, and scales [n, d // tile] float32 that
        e4m3 holds exactly.
    """
    tiles = x.to(torch.float32).unflatten(1, (-1, tile))
    amax = tile_maxima(x, tile)
    want = over(amax, E2M1_MAX)
    want = want if outer is None else want / outer
    scales = want.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
    scales = torch.where(amax == 0, 1.0, scales)
    values = tiles / (scales if outer is None else scales * outer)[..., None]
    scales = torch.where(torch.isfinite(tiles).all(-1), scales, float("nan"))
    return values.flatten(1), scales
