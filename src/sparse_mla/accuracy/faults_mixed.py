"""Faults of one path or of two options together; the cases made for them are in cases_mixed.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..kv_cache import KVCache
from .case import Inputs
from .faults_fault import Fault, caches, causal_queries, has_sink
from .faults_kernel import (
    Attended,
    EmulatedKernel,
    Source,
    byte_offsets,
    footer_offsets,
)


class SinkWhenSplit(EmulatedKernel):
    """The kernel that merges the parts of long lists does not know of sinks."""

    longest = 512

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        split = _width(inputs) > self.longest
        return super().finish(done, replace(inputs, attn_sink=None) if split else inputs)


class ExtraGeometry(EmulatedKernel):
    """The second cache is read with the first one's page size, or its distance between pages."""

    what = "page size"

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        self.main, self.extra = inputs.cache, inputs.extra_cache
        return super().sources(inputs, state)

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return byte_offsets(cache, slots, **self._wrong(cache))

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return footer_offsets(cache, slots, **self._wrong(cache))

    def _wrong(self, cache: KVCache) -> dict[str, int]:
        if cache is not self.extra:
            return {}
        if self.what == "page size":
            return {"page_size": self.main.page_size}
        return {"page_stride": int(self.main.pages.stride(0))}


class Slot24Bits(EmulatedKernel):
    """A slot shares a word with other bits, or is a 24-bit factor: past 2^24 it wraps around."""

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().offsets(cache, slots % 2**24)

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().footer_offsets(cache, slots % 2**24)


class CausalLastTileOnly(EmulatedKernel):
    """Only the last tile is masked: a query that ends in an earlier one sees all of that."""

    tile = 64

    def dense_ends(self, inputs: Inputs, lengths: torch.Tensor) -> torch.Tensor:
        ends = super().dense_ends(inputs, lengths)
        before = (lengths - 1).clamp_min(0) // self.tile * self.tile
        return torch.maximum(ends, before[:, None])


class StaleTensorScale(EmulatedKernel):
    """The first call's scale of the whole tensor is kept, as where it is read on the host once."""

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        made = super().sources(inputs, state)
        for i, source in enumerate(made):
            if source.cache.tensor_scale is not None:
                kept = state.setdefault(f"scale {i}", source.cache.tensor_scale)
                made[i] = replace(source, cache=replace(source.cache, tensor_scale=kept))
        return made


def _width(inputs: Inputs) -> int:
    extra = inputs.extra_indices
    return int(inputs.indices.shape[-1]) + (0 if extra is None else int(extra.shape[-1]))


def _sink_and_long(inputs: Inputs) -> bool:
    return has_sink(inputs) and _width(inputs) > 128


def _unlike(inputs: Inputs) -> bool:
    main, extra = inputs.cache, inputs.extra_cache
    if extra is None:
        return False
    return main.page_size != extra.page_size or main.pages.stride(0) != extra.pages.stride(0)


def _many_slots(inputs: Inputs) -> bool:
    return any(cache.num_slots > 2**24 for cache in caches(inputs))


def _tensor_scale(inputs: Inputs) -> bool:
    return any(cache.tensor_scale is not None for cache in caches(inputs))


def _several_causal(inputs: Inputs) -> bool:
    return causal_queries(inputs) and inputs.queries > 1


MIXED_FAULTS = (
    Fault(
        "slot_24_bits",
        8,
        "keeps slots in 24 bits: past 2^24 they wrap around",
        Slot24Bits,
        _many_slots,
    ),
    Fault(
        "stale_tensor_scale",
        12,
        "keeps the first call's scale of the whole tensor",
        StaleTensorScale,
        _tensor_scale,
    ),
    Fault(
        "sink_when_split",
        19,
        "forgets the sink where a list is long enough to be split",
        SinkWhenSplit,
        _sink_and_long,
        variants=tuple({"longest": longest} for longest in (512, 128, 256, 1024)),
    ),
    Fault(
        "extra_geometry",
        26,
        "reads the second cache with the first one's page size or distance between pages",
        ExtraGeometry,
        _unlike,
        variants=({}, {"what": "page stride"}),
    ),
    Fault(
        "causal_last_tile_only",
        27,
        "masks the last tile of a causal call only: queries that end before it see too much",
        CausalLastTileOnly,
        _several_causal,
        variants=tuple({"tile": tile} for tile in (64, 128, 32, 16)),
    ),
)
