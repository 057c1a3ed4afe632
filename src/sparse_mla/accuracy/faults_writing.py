"""Faults of the cache writer: scales, conversion to e4m3, where the bytes go."""

from __future__ import annotations

import torch

from ..kv_cache import KVCache
from ..kv_quantise import E4M3_MAX
from .case import WriteInputs
from .faults_fault import Fault
from .faults_kernel import (
    EmulatedKernel,
    byte_offsets,
    footer_offsets,
    memory_bytes,
    tiles_of_e4m3,
)


class ZeroTileNan(EmulatedKernel):
    def written_scales(self, tiles: torch.Tensor, rounding: str) -> torch.Tensor:
        scales = super().written_scales(tiles, rounding)
        return torch.where(tiles.abs().amax(-1) == 0, 0.0, scales)


class NoSaturation(EmulatedKernel):
    """The scale is rounded so that a tile's largest values pass 448, and nothing stops them there.

    Past 464, where rounding to 448 ends, e4m3 has no number: the cast gives NaN, or the bits wrap.
    """

    wraps = False

    def written_scales(self, tiles: torch.Tensor, rounding: str) -> torch.Tensor:
        _, exponent = torch.frexp(super().written_scales(tiles, "amax"))
        return torch.ldexp(torch.ones(exponent.shape, device=tiles.device), exponent - 1)

    def to_e4m3(self, scaled: torch.Tensor) -> torch.Tensor:
        past = scaled.abs() >= 464
        wrapped = scaled.sign() * (scaled.abs() - E4M3_MAX) if self.wraps else float("nan")
        return super().to_e4m3(torch.where(past, wrapped, scaled))


class TinyFlushed(EmulatedKernel):
    """amax is held above a floor against division by zero; e4m3 ends 2^-18 below its maximum."""

    floor = 1e-4

    def written_scales(self, tiles: torch.Tensor, rounding: str) -> torch.Tensor:
        scales = super().written_scales(tiles, rounding)
        amax = tiles.abs().amax(-1)
        return torch.where((amax > 0) & (amax < self.floor), self.floor / E4M3_MAX, scales)


class SlotsPacked(EmulatedKernel):
    what = "pages"

    def write_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        packed, row = cache.layout.page_bytes(cache.page_size), cache.layout.row_bytes
        if self.what == "tokens":
            return byte_offsets(cache, slots, token_stride=row)
        return byte_offsets(cache, slots, page_stride=packed, token_stride=row)

    def write_footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        packed = cache.layout.page_bytes(cache.page_size)
        return footer_offsets(cache, slots, page_stride=packed)


class SlotsInt32(EmulatedKernel):
    """Offsets from 2^31 on become negative, and such writes go nowhere in the cache."""

    def write_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return (super().write_offsets(cache, slots) + 2**31) % 2**32 - 2**31

    def write_footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return (super().write_footer_offsets(cache, slots) + 2**31) % 2**32 - 2**31


class SlotsNextPage(EmulatedKernel):
    def write_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().write_offsets(cache, slots) + cache.pages.stride(0)

    def write_footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().write_footer_offsets(cache, slots) + cache.pages.stride(0)


class FootersInline(EmulatedKernel):
    """A planar page's scales go right after each row."""

    def write_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        if not cache.layout.planar:
            return super().write_offsets(cache, slots)
        return byte_offsets(cache, slots, token_stride=cache.layout.bytes_per_token)

    def write_footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return self.write_offsets(cache, slots) + cache.layout.row_bytes


def _tiled(inputs: WriteInputs) -> bool:
    return tiles_of_e4m3(inputs.cache.layout)


def _planar(inputs: WriteInputs) -> bool:
    return inputs.cache.layout.planar


def _past_int32(inputs: WriteInputs) -> bool:
    return memory_bytes(inputs.cache) > 2**31


WRITING = (
    Fault(
        "writer_zero_tile_nan",
        24,
        "divides an all-zero tile by its scale 0",
        ZeroTileNan,
        _tiled,
        "kv_write",
    ),
    Fault(
        "writer_no_saturation",
        24,
        "rounds scales down and lets values past 448 become NaN or wrap",
        NoSaturation,
        _tiled,
        "kv_write",
        ({}, {"wraps": True}),
    ),
    Fault(
        "writer_tiny_flushed",
        24,
        "never lets amax fall below 1e-4: tiny tiles lose all their bits",
        TinyFlushed,
        _tiled,
        "kv_write",
        ({}, {"floor": 1e-12}),
    ),
    Fault(
        "writer_slot_off_by_page",
        24,
        "writes each token one page further on",
        SlotsNextPage,
        op="kv_write",
    ),
    Fault(
        "writer_packed_stride",
        24,
        "ignores page and token strides that exceed the packed size",
        SlotsPacked,
        op="kv_write",
        variants=({}, {"what": "tokens"}),
    ),
    Fault(
        "writer_planar_as_inline",
        25,
        "writes the scales of a planar layout right after each row",
        FootersInline,
        _planar,
        "kv_write",
    ),
    Fault(
        "writer_int32_overflow",
        24,
        "computes slot offsets in int32, wrong past 2^31 bytes",
        SlotsInt32,
        _past_int32,
        "kv_write",
    ),
)
