"""KV-cache byte layouts as data: where a token's bytes lie and what they hold.

A layout is chosen by name and never inferred from a width: 528 bytes per token, for example, is
three different layouts. docs/formats.md lists the fields and where each format comes from;
kv_quantise.py has the number formats and the writers' rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .kv_quantise import (
    check_scale_rounding,
    decode_e2m1,
    decode_ue8m0,
    divide_to_e4m3,
    encode_e2m1,
    encode_ue8m0,
    outer_scales,
    quantise_e2m1,
    quantise_e4m3,
)

_TORCH_DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_ITEM_BITS = {"e2m1": 4, "e4m3": 8, "ue8m0": 8, "bf16": 16, "fp32": 32}


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
        return self.count * _ITEM_BITS[self.dtype] // 8

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The field's values, [n, count], from token rows [n, row bytes] uint8; exact."""
        part = rows[:, self.offset : self.offset + self.nbytes].contiguous()
        if self.dtype == "e2m1":
            return decode_e2m1(part)
        if self.dtype == "ue8m0":
            return decode_ue8m0(part)
        return part.view(_TORCH_DTYPES[self.dtype])

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Store `values` [n, count], cast to the field's dtype, into rows [n, row bytes] uint8."""
        if self.dtype == "e2m1":
            raw = encode_e2m1(values)
        elif self.dtype == "ue8m0":
            raw = encode_ue8m0(values)
        else:
            flat = values.to(_TORCH_DTYPES[self.dtype]).reshape(-1)
            raw = flat.view(torch.uint8).view(-1, self.nbytes)
        rows[:, self.offset : self.offset + self.nbytes] = raw


@dataclass(frozen=True)
class KVLayout:
    """How one token of the KV cache is stored.

    A token's logical row is the latent (`latent.count` values) followed by the RoPE part
    (`rope.count` bf16 values); keys are the whole row, values its first `d_v` entries. A latent
    value is the product of the stored number, its tile's scale, its token's outer scale and the
    tensor's scale, as far as the layout has them.

    Attributes:
        name: the name users give.
        latent: the latent part.
        scales: the scales to multiply by, exactly as stored, one per `tile` latent values.
        tile: latent values per scale.
        rope: the unquantised RoPE part, if it is stored apart.
        row_bytes: bytes of a token's row.
        footer_bytes: planar layouts keep `scales` after all rows of the page, this many bytes a
            token; 0 where the scales are inside the row.
        page_multiple: a page is padded to a multiple of this many bytes.
        outer: an fp32 scale of the whole token, in its row.
        tensor_scale: an fp32 scale of the whole cache goes with it, `KVCache.tensor_scale`.
        extra_only: the layout occurs only in an extra cache beside another one.
        wide_rows: widths in bytes, beside the layout's own, of the rows of engines' tensors;
            what follows the row in them is never read.
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
    outer: Field | None = None
    tensor_scale: bool = False
    extra_only: bool = False
    wide_rows: tuple[int, ...] = ()
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
        """Whether latent values are anything but bf16 numbers."""
        return self.latent.dtype != "bf16"

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a packed page of `page_size` tokens, padding included."""
        packed = page_size * self.bytes_per_token
        return -(-packed // self.page_multiple) * self.page_multiple

    def pack(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor | None,
        scale_rounding: str = "amax",
        tensor_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise tokens into bytes.

        Args:
            latent: [n, latent.count], any float dtype.
            rope: [n, rope.count], any float dtype; None where the layout has no RoPE part.
            scale_rounding: of fp32 scales: "amax" stores amax/448 as it is, "pow2" rounds it up
                to a power of two. Scales of other dtypes have a rounding of their own: ue8m0 up,
                e4m3 to nearest.
            tensor_scale: [1] float32, positive, where the layout has a scale of the whole tensor.

        Returns:
            rows [n, row_bytes] and footers [n, footer_bytes], both uint8. Bytes that no field
            covers are zero.
        """
        check_scale_rounding(scale_rounding)
        self.check_tensor_scale(tensor_scale, latent.device)
        n = latent.shape[0]
        rows = torch.zeros(n, self.row_bytes, dtype=torch.uint8, device=latent.device)
        footers = torch.zeros(n, self.footer_bytes, dtype=torch.uint8, device=latent.device)
        values, scales = latent, None
        if self.latent.dtype == "e2m1":
            outer = tensor_scale
            if self.outer is not None:
                outer = outer_scales(latent)
                self.outer.write(rows, outer)
            values, scales = quantise_e2m1(latent, self.tile, outer)
        elif self.scales is not None:
            rounding = "pow2" if self.scales.dtype == "ue8m0" else scale_rounding
            values, scales = quantise_e4m3(latent, self.tile, rounding)
        elif tensor_scale is not None:
            values = divide_to_e4m3(latent, tensor_scale)
        self.latent.write(rows, values)
        if self.scales is not None and scales is not None:
            self.scales.write(footers if self.planar else rows, scales)
        if self.rope is not None:
            if rope is None:
                raise ValueError(
                    f"rope is None, layout {self.name} stores {self.rope.count} values"
                )
            self.rope.write(rows, rope)
        return rows, footers

    def unpack(
        self,
        rows: torch.Tensor,
        footers: torch.Tensor,
        dtype: torch.dtype = torch.float64,
        tensor_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logical rows [n, d_qk] in `dtype`, from `pack`'s two byte tensors.

        Values are latent times scales computed in `dtype`; in float64 the products are exact.
        """
        self.check_tensor_scale(tensor_scale, rows.device)
        latent = self.latent.read(rows).to(dtype)
        if self.scales is not None:
            scales = self.scales.read(footers if self.planar else rows).to(dtype)
            tiles = latent.view(-1, self.scales.count, self.tile) * scales[..., None]
            latent = tiles.view(-1, self.latent.count)
        if self.outer is not None:
            latent = latent * self.outer.read(rows).to(dtype)
        if tensor_scale is not None:
            latent = latent * tensor_scale.to(dtype)
        if self.rope is None:
            return latent
        return torch.cat([latent, self.rope.read(rows).to(dtype)], dim=1)

    def check_tensor_scale(self, tensor_scale: torch.Tensor | None, device: torch.device) -> None:
        """A [1] float32 tensor on `device` where the layout has one, None elsewhere."""
        if not self.tensor_scale:
            if tensor_scale is not None:
                raise ValueError(f"tensor_scale is given, layout {self.name} has none")
            return
        wanted = f"layout {self.name} needs a tensor [1] of torch.float32 on {device}"
        if not isinstance(tensor_scale, torch.Tensor):
            raise ValueError(f"tensor_scale is {type(tensor_scale).__name__}, {wanted}")
        if (
            tuple(tensor_scale.shape) != (1,)
            or tensor_scale.dtype != torch.float32
            or tensor_scale.device != device
        ):
            raise ValueError(
                f"tensor_scale is {tuple(tensor_scale.shape)} of {tensor_scale.dtype} on "
                f"{tensor_scale.device}, {wanted}"
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
    KVLayout(
        name="v4_fp8",
        latent=Field(0, 448, "e4m3"),
        scales=Field(0, 7, "ue8m0"),
        tile=64,
        rope=Field(448, 64, "bf16"),
        row_bytes=576,
        footer_bytes=8,
        page_multiple=576,
        models="DeepSeek-V4",
    ),
    KVLayout(
        name="v41_fp8_planar",
        latent=Field(0, 512, "e4m3"),
        scales=Field(0, 16, "ue8m0"),
        tile=32,
        rope=None,
        row_bytes=512,
        footer_bytes=16,
        page_multiple=512,
        models="DeepSeek-V4.1 (FlashInfer, TokenSpeed)",
    ),
    KVLayout(
        name="v41_fp8_inline",
        latent=Field(0, 512, "e4m3"),
        scales=Field(512, 16, "ue8m0"),
        tile=32,
        rope=None,
        row_bytes=528,
        models="DeepSeek-V4.1 (FlashMLA)",
    ),
    KVLayout(
        name="v41_fp4_planar",
        latent=Field(0, 512, "e2m1"),
        scales=Field(0, 32, "e4m3"),
        tile=16,
        rope=None,
        row_bytes=256,
        footer_bytes=32,
        page_multiple=512,
        extra_only=True,
        models="DeepSeek-V4.1, extra cache (FlashInfer, TokenSpeed)",
    ),
    KVLayout(
        name="v41_fp4_inline",
        latent=Field(0, 512, "e2m1"),
        scales=Field(256, 32, "e4m3"),
        tile=16,
        rope=None,
        row_bytes=288,
        extra_only=True,
        models="DeepSeek-V4.1, extra cache (FlashMLA)",
    ),
    KVLayout(
        name="glm53_nope_fp8",
        latent=Field(0, 512, "e4m3"),
        scales=Field(512, 4, "fp32"),
        tile=128,
        rope=None,
        row_bytes=528,
        wide_rows=(656,),
        models="GLM-5.3-Flash",
    ),
    KVLayout(
        name="glm53_nope_nvfp4",
        latent=Field(0, 512, "e2m1"),
        scales=Field(256, 32, "e4m3"),
        tile=16,
        rope=None,
        row_bytes=304,
        outer=Field(292, 1, "fp32"),
        models="GLM-5.3-Flash",
    ),
    KVLayout(
        name="nvfp4_bf16_rope",
        latent=Field(0, 512, "e2m1"),
        scales=Field(256, 32, "e4m3"),
        tile=16,
        rope=Field(288, 64, "bf16"),
        row_bytes=416,
        tensor_scale=True,
        models="GLM-5.2 (SGLang)",
    ),
    KVLayout(
        name="fp8_tensor",
        latent=Field(0, 576, "e4m3"),
        scales=None,
        tile=576,
        rope=None,
        row_bytes=576,
        tensor_scale=True,
        models="any MLA model with one scale per layer",
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
