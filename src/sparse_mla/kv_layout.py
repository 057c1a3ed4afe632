"""KV-cache byte layouts as data: where a token's bytes lie, what they hold, how to quantise them.

A layout is chosen by name and never inferred from a width: 528 bytes per token, for example, is
three different layouts. docs/formats.md lists the fields and where each format comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3_MAX = 448.0
FP32_MIN_NORMAL = 2.0**-126

_TORCH_DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_ITEM_BYTES = {"e4m3": 1, "bf16": 2, "fp32": 4}

SCALE_ROUNDINGS = ("amax", "pow2")


@dataclass(frozen=True)
class Field:
    """One field of a token: `count` values of `dtype`, `offset` bytes into the token's row.

    In a planar layout the offset of the scales counts from the token's footer instead.
    """

    offset: int
    count: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.count * _ITEM_BYTES[self.dtype]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The field's values, [n, count], from token rows [n, row bytes] uint8."""
        part = rows[:, self.offset : self.offset + self.nbytes].contiguous()
        return part.view(_TORCH_DTYPES[self.dtype])

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Store `values` [n, count], cast to the field's dtype, into rows [n, row bytes] uint8."""
        raw = values.to(_TORCH_DTYPES[self.dtype]).contiguous().view(torch.uint8)
        rows[:, self.offset : self.offset + self.nbytes] = raw


@dataclass(frozen=True)
class KVLayout:
    """How one token of the KV cache is stored.

    A token's logical row is the latent (`latent.count` values) followed by the RoPE part
    (`rope.count` bf16 values); keys are the whole row, values its first `d_v` entries.

    Attributes:
        name: the name users give.
        latent: the latent part; quantised if `scales` is set.
        scales: the scales to multiply by, exactly as stored, one per `tile` latent values.
        tile: latent values per scale.
        rope: the unquantised RoPE part, if it is stored apart.
        row_bytes: bytes of a token's row.
        footer_bytes: planar layouts keep `scales` after all rows of the page, this many bytes a
            token; 0 where the scales are inside the row.
        page_multiple: a page is padded to a multiple of this many bytes.
        d_v: width of the values.
        models: where the layout is used.
    """

    name: str
    latent: Field
    scales: Field | None
    tile: int
    rope: Field | None
    row_bytes: int
    footer_bytes: int = 0
    page_multiple: int = 1
    d_v: int = 512
    models: str = ""

    @property
    def d_qk(self) -> int:
        """Width of a query or key."""
        return self.latent.count + (self.rope.count if self.rope else 0)

    @property
    def planar(self) -> bool:
        return self.footer_bytes > 0

    @property
    def bytes_per_token(self) -> int:
        return self.row_bytes + self.footer_bytes

    @property
    def quantised(self) -> bool:
        return self.scales is not None

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a packed page of `page_size` tokens, padding included."""
        packed = page_size * self.bytes_per_token
        return -(-packed // self.page_multiple) * self.page_multiple

    def pack(
        self, latent: torch.Tensor, rope: torch.Tensor | None, scale_rounding: str = "amax"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise tokens into bytes.

        Args:
            latent: [n, latent.count], any float dtype.
            rope: [n, rope.count], any float dtype; None where the layout has no RoPE part.
            scale_rounding: "amax" stores amax/448 as it is, "pow2" rounds it up to a power of two.

        Returns:
            rows [n, row_bytes] and footers [n, footer_bytes], both uint8. Bytes that no field
            covers are zero.
        """
        n = latent.shape[0]
        rows = torch.zeros(n, self.row_bytes, dtype=torch.uint8, device=latent.device)
        footers = torch.zeros(n, self.footer_bytes, dtype=torch.uint8, device=latent.device)
        if self.scales is None:
            self.latent.write(rows, latent)
        else:
            values, scales = quantise_e4m3(latent, self.tile, scale_rounding)
            self.latent.write(rows, values)
            self.scales.write(footers if self.planar else rows, scales)
        if self.rope is not None:
            if rope is None:
                raise ValueError(
                    f"rope is None, layout {self.name} stores {self.rope.count} values"
                )
            self.rope.write(rows, rope)
        return rows, footers

    def unpack(
        self, rows: torch.Tensor, footers: torch.Tensor, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Logical rows [n, d_qk] in `dtype`, from `pack`'s two byte tensors.

        Values are latent * scale computed in `dtype`; in float64 that product is exact.
        """
        latent = self.latent.read(rows).to(dtype)
        if self.scales is not None:
            scales = self.scales.read(footers if self.planar else rows).to(dtype)
            tiles = latent.view(-1, self.scales.count, self.tile) * scales[..., None]
            latent = tiles.view(-1, self.latent.count)
        if self.rope is None:
            return latent
        return torch.cat([latent, self.rope.read(rows).to(dtype)], dim=1)


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
    n, d = x.shape
    tiles = x.to(torch.float32).view(n, d // tile, tile)
    finite = torch.isfinite(tiles)
    amax = torch.where(finite, tiles, 0.0).abs().amax(-1)
    scales = (amax / E4M3_MAX).clamp_min(FP32_MIN_NORMAL)
    if scale_rounding == "pow2":
        mantissa, exponent = torch.frexp(scales)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    scales = torch.where(amax == 0, 1.0, scales)
    values = (tiles / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    values = torch.where(finite, values, float("nan"))
    return values.view(n, d).to(torch.float8_e4m3fn), scales


def check_scale_rounding(scale_rounding: str) -> None:
    if scale_rounding not in SCALE_ROUNDINGS:
        raise ValueError(
            f"scale_rounding is {scale_rounding!r}, allowed: {', '.join(SCALE_ROUNDINGS)}"
        )


_ALL = (
    KVLayout(
        name="v32_fp8",
        latent=Field(0, 512, "e4m3"),
        scales=Field(512, 4, "fp32"),
        tile=128,
        rope=Field(528, 64, "bf16"),
        row_bytes=656,
        models="DeepSeek-V3.2, GLM-5",
    ),
    KVLayout(
        name="bf16",
        latent=Field(0, 512, "bf16"),
        scales=None,
        tile=512,
        rope=Field(1024, 64, "bf16"),
        row_bytes=1152,
        models="any MLA model with a separate RoPE part",
    ),
    KVLayout(
        name="bf16_nope",
        latent=Field(0, 512, "bf16"),
        scales=None,
        tile=512,
        rope=None,
        row_bytes=1024,
        models="any MLA model whose 512-wide rows hold RoPE",
    ),
)

LAYOUTS: dict[str, KVLayout] = {layout.name: layout for layout in _ALL}


def get_layout(layout: str | KVLayout) -> KVLayout:
    """The layout of that name; ValueError lists the names that exist."""
    if isinstance(layout, KVLayout):
        return layout
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, allowed: {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]
