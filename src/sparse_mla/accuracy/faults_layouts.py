"""Faults in reading a layout: order of nibbles, planar pages, scales of several kinds."""

from __future__ import annotations

import torch

from ..kv_cache import KVCache
from ..kv_layout import KVLayout
from .case import Inputs
from .faults_fault import Fault, caches
from .faults_kernel import EmulatedKernel, byte_offsets, footer_offsets


class NibblesSwapped(EmulatedKernel):
    """The even element is taken from the high nibble."""

    def latent_values(self, layout: KVLayout, rows: torch.Tensor) -> torch.Tensor:
        values = super().latent_values(layout, rows)
        if layout.latent.dtype != "e2m1":
            return values
        return values.unflatten(1, (-1, 2)).flip(2).flatten(1)


class PlanarAsInline(EmulatedKernel):
    """Each row is looked for right after the one before it and its scales, as the shape says."""

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        if not cache.layout.planar:
            return super().offsets(cache, slots)
        return byte_offsets(cache, slots, token_stride=cache.layout.bytes_per_token)

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return self.offsets(cache, slots) + cache.layout.row_bytes


class ScaleTableOffByPad(EmulatedKernel):
    """The pad byte of a token's scales is not reckoned with, or taken to come first."""

    pad = "missing"

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        pad = _pad_bytes(cache.layout)
        if self.pad == "first":
            return super().footer_offsets(cache, slots) + pad
        return footer_offsets(cache, slots, footer_bytes=cache.layout.footer_bytes - pad)


class PagePaddingIgnored(EmulatedKernel):
    """Planar pages follow each other without the padding to `page_multiple`."""

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        if not cache.layout.planar:
            return super().offsets(cache, slots)
        return byte_offsets(cache, slots, page_stride=_unpadded(cache))

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return footer_offsets(cache, slots, page_stride=_unpadded(cache))


class OuterScaleForgotten(EmulatedKernel):
    def outer(self, scales: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(scales)


class Ue8m0Bias(EmulatedKernel):
    """2^(byte - 126) or 2^(byte - 128)."""

    bias = 126

    def stored_scales(self, layout: KVLayout, tokens: torch.Tensor) -> torch.Tensor | None:
        stored = super().stored_scales(layout, tokens)
        if stored is None or layout.scales is None or layout.scales.dtype != "ue8m0":
            return stored
        return stored * 2.0 ** (127 - self.bias)


def _pad_bytes(layout: KVLayout) -> int:
    """Bytes of a token's footer that hold no scale."""
    if layout.scales is None or not layout.planar:
        return 0
    return layout.footer_bytes - layout.scales.nbytes


def _unpadded(cache: KVCache) -> int:
    return cache.page_size * cache.layout.bytes_per_token


def _fp4(inputs: Inputs) -> bool:
    return any(cache.layout.latent.dtype == "e2m1" for cache in caches(inputs))


def _planar(inputs: Inputs) -> bool:
    return any(cache.layout.planar for cache in caches(inputs))


def _footers_with_pad(inputs: Inputs) -> bool:
    return any(_pad_bytes(cache.layout) for cache in caches(inputs))


def _padded_pages(inputs: Inputs) -> bool:
    return any(
        cache.layout.planar and cache.num_pages > 1 and cache.pages.stride(0) != _unpadded(cache)
        for cache in caches(inputs)
    )


def _outer(inputs: Inputs) -> bool:
    return any(
        cache.layout.outer is not None or cache.tensor_scale is not None for cache in caches(inputs)
    )


def _ue8m0(inputs: Inputs) -> bool:
    scales = [cache.layout.scales for cache in caches(inputs)]
    return any(field is not None and field.dtype == "ue8m0" for field in scales)


LAYOUT_FAULTS = (
    Fault(
        "nibbles_swapped",
        25,
        "takes the even element of e2m1 pairs from the high nibble",
        NibblesSwapped,
        _fp4,
    ),
    Fault(
        "planar_as_inline",
        25,
        "reads a planar page as if each row were followed by its own scales",
        PlanarAsInline,
        _planar,
    ),
    Fault(
        "scale_table_off_by_pad",
        25,
        "leaves the pad byte of each token's scales out of the table's stride, or takes it first",
        ScaleTableOffByPad,
        _footers_with_pad,
        variants=({}, {"pad": "first"}),
    ),
    Fault(
        "page_padding_ignored",
        25,
        "takes planar pages for packed, without the padding that their format has",
        PagePaddingIgnored,
        _padded_pages,
    ),
    Fault(
        "outer_scale_forgotten",
        25,
        "multiplies by the tiles' scales only, not by the token's or the tensor's",
        OuterScaleForgotten,
        _outer,
    ),
    Fault(
        "ue8m0_bias",
        25,
        "decodes ue8m0 scales with a bias of 126 or 128: twice or half of every value",
        Ue8m0Bias,
        _ue8m0,
        variants=({}, {"bias": 128}),
    ),
)
