"""A paged KV cache: pages of bytes, a layout that says what they mean, and slot arithmetic.

Slot = page * page_size + offset; the indices that attention takes are slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .arch import parse_device
from .kv_layout import KVLayout, get_layout


# Caches are compared by identity, and shown without their bytes, which may lie on a GPU.
@dataclass(frozen=True, eq=False, repr=False)
class KVCache:
    """Pages of one layer's KV cache.

    Attributes:
        pages: [num_pages, page bytes] uint8. `pages.stride(0)` is the page stride; it may exceed
            the packed size, as when layers share a pool.
        page_size: tokens per page, any number >= 1.
        layout: what the bytes mean.
        token_stride: bytes from one token's row to the next, at least `layout.row_bytes`; exactly
            that in planar layouts.
        tensor_scale: [1] float32 on the cache's device where the layout has a scale of the whole
            tensor, None elsewhere. Kernels read it on the device.
    """

    pages: torch.Tensor
    page_size: int
    layout: KVLayout
    token_stride: int
    tensor_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pages = self.pages
        if not isinstance(pages, torch.Tensor) or pages.dtype != torch.uint8 or pages.dim() != 2:
            raise ValueError(f"pages is {describe(pages)}, must be [num_pages, page bytes] uint8")
        if pages.shape[1] > 1 and pages.stride(1) != 1:
            raise ValueError(f"pages has strides {pages.stride()}, the last dim must be contiguous")
        if not isinstance(self.layout, KVLayout):
            raise ValueError(
                f"layout is {self.layout!r}, must be a KVLayout, as in sparse_mla.LAYOUTS"
            )
        _check_count("page_size", self.page_size, 1)
        _check_count("token_stride", self.token_stride, self.layout.row_bytes)
        if self.layout.planar and self.token_stride != self.layout.row_bytes:
            raise ValueError(
                f"token_stride is {self.token_stride}, the planar layout {self.layout.name} needs "
                f"{self.layout.row_bytes}"
            )
        self.layout.check_tensor_scale(self.tensor_scale, pages.device)
        need = (self.page_size - 1) * self.token_stride + self.layout.row_bytes
        need += self.page_size * self.layout.footer_bytes
        if pages.shape[1] < need:
            raise ValueError(
                f"pages has {pages.shape[1]} bytes a page, {self.page_size} tokens of "
                f"{self.layout.name} span {need}"
            )

    def __repr__(self) -> str:
        return (
            f"KVCache({self.num_pages} pages of {self.page_size} tokens, {self.layout.name}, "
            f"{self.device})"
        )

    @classmethod
    def empty(
        cls,
        pages: int,
        page_size: int,
        layout: str | KVLayout = "v32_fp8",
        *,
        device: torch.device | str | None = None,
        page_stride: int | None = None,
        tensor_scale: torch.Tensor | None = None,
    ) -> KVCache:
        """A cache of `pages` uninitialised pages.

        Args:
            layout: the layout's name.
            device: where the pages are; default torch's default device.
            page_stride: bytes from one page to the next, a multiple of 16, so that rows of a
                16-byte layout stay aligned; default the packed size, rounded up.
            tensor_scale: [1] float32 on the device where the layout has a scale of the whole
                tensor.

        Raises:
            ValueError: an argument's value is not allowed, or torch has no such device.
        """
        layout = get_layout(layout)
        _check_count("pages", pages, 0)
        _check_count("page_size", page_size, 1)
        packed = layout.page_bytes(page_size)
        stride = -(-packed // 16) * 16 if page_stride is None else page_stride
        if not isinstance(stride, int) or stride < packed or stride % 16:
            raise ValueError(
                f"page_stride is {stride}, must be a multiple of 16 and >= {packed}, the packed "
                f"size of {page_size} tokens in {layout.name}"
            )
        if device is not None:
            device = parse_device(device)
        storage = torch.empty(pages, stride, dtype=torch.uint8, device=device)
        return cls(storage[:, :packed], page_size, layout, layout.row_bytes, tensor_scale)

    @classmethod
    def from_tensor(
        cls,
        tensor: torch.Tensor,
        layout: str | KVLayout,
        page_size: int | None = None,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> KVCache:
        """Wrap an engine's cache tensor without copying.

        Args:
            tensor: [num_pages, page_size, (1,) width] with a contiguous last dim: bytes (uint8,
                int8 or float8_e4m3fn, width = bytes per token) or, for the bf16 layouts, bfloat16
                (width = d_qk). Page and token strides may be padded; in planar layouts pages
                only, and the shape says how many bytes a page has, not where a token lies. Or
                [num_pages, page bytes] together with `page_size`. Rows may also be as wide as
                `layout.wide_rows` says.
            layout: the layout's name. It is never inferred from the width.
            page_size: needed for a 2-D tensor; otherwise read off the shape.
            tensor_scale: as in the attributes.
        """
        layout = get_layout(layout)
        raw = _as_bytes(tensor, layout)
        if page_size is not None:
            _check_count("page_size", page_size, 1)
        if raw.dim() == 2:
            if page_size is None:
                raise ValueError("page_size is None, a 2-D cache tensor needs one")
            # Without the padding to `page_multiple`: the stride says where the next page is.
            need = page_size * layout.bytes_per_token
            if raw.shape[1] < need:
                raise ValueError(
                    f"tensor has pages of {raw.shape[1]} bytes, {page_size} tokens of "
                    f"{layout.name} need {need}"
                )
            return cls(raw, page_size, layout, layout.row_bytes, tensor_scale)
        if raw.dim() == 4:
            if raw.shape[2] != 1:
                raise ValueError(
                    f"tensor has shape {tuple(tensor.shape)}, dim 2 (KV heads) must be 1"
                )
            raw = raw.squeeze(2)
        if raw.dim() != 3:
            raise ValueError(f"tensor has {tensor.dim()} dims, allowed: 2, 3 or 4")
        if page_size is not None and page_size != raw.shape[1]:
            raise ValueError(f"page_size is {page_size}, the tensor's shape says {raw.shape[1]}")
        pages, size, width = raw.shape
        if size < 1:
            raise ValueError(f"tensor has shape {tuple(tensor.shape)}, the page size must be >= 1")
        widths = (layout.bytes_per_token, *layout.wide_rows)
        if width not in widths:
            raise ValueError(
                f"tensor has {width} bytes per token, layout {layout.name} has "
                f"{' or '.join(map(str, widths))}"
            )
        page_stride = raw.stride(0) if pages > 1 else layout.page_bytes(size)
        token_stride = raw.stride(1) if size > 1 else width
        if layout.planar:
            if token_stride != layout.bytes_per_token and size > 1:
                raise ValueError(
                    f"tensor has token stride {token_stride}, the planar layout {layout.name} "
                    f"needs packed pages (stride {layout.bytes_per_token})"
                )
            span, token_stride = size * layout.bytes_per_token, layout.row_bytes
        else:
            if token_stride < layout.row_bytes:
                raise ValueError(
                    f"tensor has token stride {token_stride}, layout {layout.name} needs at "
                    f"least {layout.row_bytes} bytes"
                )
            span = (size - 1) * token_stride + layout.row_bytes
        if pages > 1 and page_stride < span:
            raise ValueError(f"tensor has page stride {page_stride}, a page spans {span} bytes")
        view = raw.as_strided((pages, span), (max(page_stride, span), 1))
        return cls(view, size, layout, token_stride, tensor_scale)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def num_slots(self) -> int:
        """Tokens the cache can hold; valid indices lie in [0, num_slots)."""
        return self.pages.shape[0] * self.page_size

    @property
    def device(self) -> torch.device:
        return self.pages.device

    @property
    def alignment(self) -> int:
        """The largest power of two, at most 16, that divides every token's address, in bytes."""
        together = self.pages.data_ptr() | self.token_stride | 16
        if self.num_pages > 1:
            together |= self.pages.stride(0)
        return together & -together

    def rows_view(self) -> torch.Tensor:
        """The tokens' rows, [num_pages, page_size, row_bytes] uint8, a view."""
        return self.pages.as_strided(
            (self.num_pages, self.page_size, self.layout.row_bytes),
            (self.pages.stride(0), self.token_stride, 1),
        )

    def footers_view(self) -> torch.Tensor:
        """The scale table after the rows, [num_pages, page_size, footer_bytes] uint8, a view."""
        start = self.page_size * self.layout.row_bytes if self.layout.planar else 0
        return self.pages.as_strided(
            (self.num_pages, self.page_size, self.layout.footer_bytes),
            (self.pages.stride(0), self.layout.footer_bytes, 1),
            self.pages.storage_offset() + start,
        )

    def tensor(self) -> torch.Tensor:
        """The cache in FlashMLA's shape [num_pages, page_size, 1, bytes per token] uint8, a view.

        Planar layouts must be packed: that shape describes their pages only as a whole.
        """
        if not self.layout.planar:
            return self.rows_view().unsqueeze(2)
        width = self.layout.bytes_per_token
        return self.pages.as_strided(
            (self.num_pages, self.page_size, 1, width), (self.pages.stride(0), width, width, 1)
        )

    def append(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor | None,
        slots: torch.Tensor,
        *,
        scale_rounding: str = "amax",
        check_slots: bool | None = None,
        backend: str | None = None,
    ) -> None:
        """Quantise tokens and write them to their slots; one kernel on a GPU.

        Args:
            latent: [n, latent width] floats, any row stride.
            rope: [n, RoPE width] floats; None where the layout has no separate RoPE part.
            slots: [n] int32 or int64; -1 skips the token. Slots must be distinct.
            scale_rounding: of fp32 scales: "amax" (amax/448) or "pow2" (rounded up to a power of
                2). Other scales are rounded as `KVLayout.pack` says.
            check_slots: raise ValueError if a slot is below -1 or >= num_slots. By default CPU
                tensors are checked and those on a GPU are not, as it costs a sync: there such a
                token is skipped like one with -1.
            backend: "triton", "cpu" or "torch"; default the first that supports the call.

        Raises:
            ValueError: wrong shape, dtype or device; or a slot, if they are checked.
        """
        from .ops.kv_write.interface import write

        write(
            self,
            latent,
            rope,
            slots,
            scale_rounding=scale_rounding,
            check_slots=check_slots,
            backend=backend,
        )

    def read(self, slots: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Logical rows [n, d_qk] of the given slots [n] int32 or int64, dequantised in `dtype`.

        float64 is exact. ValueError if a slot lies outside [0, num_slots), or if `dtype` is not
        one of float64, float32, bfloat16 and float16.
        """
        if dtype not in _READ_DTYPES:
            allowed = ", ".join(str(d) for d in _READ_DTYPES)
            raise ValueError(f"dtype is {dtype}, allowed: {allowed}")
        check_slots_tensor(slots, self.device)
        slots = slots.to(torch.int64)
        bad = (slots < 0) | (slots >= self.num_slots)
        if bool(bad.any()):
            raise ValueError(f"slots holds {int(slots[bad][0])}, allowed: 0..{self.num_slots - 1}")
        page, offset = slots // self.page_size, slots % self.page_size
        rows = self.rows_view()[page, offset]
        footers = self.footers_view()[page, offset]
        return self.layout.unpack(rows, footers, dtype, self.tensor_scale)


_READ_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """What was given, for messages."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return type(value).__name__


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, must be an integer >= {least}")


def _as_bytes(tensor: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"tensor is {describe(tensor)}, must be a tensor")
    allowed: tuple[torch.dtype, ...] = (torch.uint8, torch.int8, torch.float8_e4m3fn)
    if not layout.quantised:
        allowed = (torch.uint8, torch.bfloat16)
    if tensor.dtype not in allowed:
        raise ValueError(
            f"tensor has dtype {tensor.dtype}, layout {layout.name} takes "
            f"{', '.join(str(d) for d in allowed)}"
        )
    if tensor.dim() < 2 or tensor.stride(-1) != 1:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)} and strides {tensor.stride()}, the last dim "
            "must be contiguous"
        )
    return tensor.view(torch.uint8)


def check_slots_tensor(slots: torch.Tensor, device: torch.device) -> None:
    """slots is [n] int32 or int64 on `device`."""
    if (
        not isinstance(slots, torch.Tensor)
        or slots.dim() != 1
        or slots.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"slots is {describe(slots)}, must be [n] int32 or int64")
    if slots.device != device:
        raise ValueError(f"slots is on {slots.device}, the cache is on {device}")
