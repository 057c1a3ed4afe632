"""Faults in what is loaded: which entries count, where their bytes lie, what the bytes mean."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kv_cache import KVCache
from ..kv_layout import KVLayout
from .case import Inputs
from .faults_fault import Fault, caches, has_lengths, has_masked, has_rope, quantised
from .faults_kernel import (
    Arithmetic,
    EmulatedKernel,
    Source,
    byte_offsets,
    footer_offsets,
    memory_bytes,
)


class ScalePow2Down(EmulatedKernel):
    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        _, exponent = torch.frexp(scales)
        return torch.where(scales > 0, torch.ldexp(torch.ones_like(scales), exponent - 1), scales)

    def outer(self, scales: torch.Tensor) -> torch.Tensor:
        return self.scales(scales)


class DequantisedBf16(EmulatedKernel):
    def dequantised(self, latent: torch.Tensor, layout: KVLayout) -> torch.Tensor:
        return latent.to(torch.bfloat16).to(latent.dtype) if layout.quantised else latent


class ScaleBf16(EmulatedKernel):
    """With product "bf16" value times scale is rounded as well: FlashMLA's arithmetic on Hopper."""

    product = ""

    def dequantised(self, latent: torch.Tensor, layout: KVLayout) -> torch.Tensor:
        if self.product != "bf16" or not layout.quantised:
            return latent
        return latent.to(torch.bfloat16).to(latent.dtype)

    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.to(torch.bfloat16).to(scales.dtype)

    def outer(self, scales: torch.Tensor) -> torch.Tensor:
        return self.scales(scales)


class ScaleNeighbourTile(EmulatedKernel):
    by = -1

    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.roll(self.by, dims=2)


class ScaleNeighbourToken(EmulatedKernel):
    by = -1

    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.roll(self.by, dims=1)


class Fp8AsFnuz(EmulatedKernel):
    """AMD's e4m3 has an exponent bias of 8: the same byte is worth half, 0x80 is NaN."""

    def latent_values(self, layout: KVLayout, rows: torch.Tensor) -> torch.Tensor:
        if layout.latent.dtype != "e4m3":
            return layout.latent.read(rows)
        return layout.latent.read(rows).view(torch.float8_e4m3fnuz)


class RopeNotRead(EmulatedKernel):
    def rope(self, rope: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(rope)


class RopeScaled(EmulatedKernel):
    def rope(self, rope: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        return rope if scales is None else rope * scales[..., -1:]


class RopeInterleaved(EmulatedKernel):
    """Pairs (i, i + half) taken for pairs (2i, 2i + 1), or the other way round."""

    back = False

    def rope(self, rope: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        shape = (-1, 2) if self.back else (2, -1)
        return rope.unflatten(2, shape).mT.flatten(2)


class MaskedSlotNan(EmulatedKernel):
    """Weight 0 does not help: the masked slot's values are multiplied by it, and 0 * NaN is NaN."""

    loads = "token 0"

    def gather(self, cache: KVCache, slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.read(cache, slots, torch.ones_like(counts))

    def slots(self, source: Source, counts: torch.Tensor) -> torch.Tensor:
        last = max(source.cache.num_slots - 1, 0)
        if self.loads == "last token":
            return torch.where(counts, source.indices, last)
        if self.loads == "the index clamped":
            return source.indices.clamp(0, last)
        return torch.where(counts, source.indices, 0)


class IndexTooLargeLoaded(EmulatedKernel):
    def in_cache(self, source: Source) -> torch.Tensor:
        return (source.indices >= 0) & (source.cache.num_slots > 0)

    def slots(self, source: Source, counts: torch.Tensor) -> torch.Tensor:
        return torch.where(counts, source.indices.clamp_max(source.cache.num_slots - 1), 0)


class IndexNegativeLoaded(EmulatedKernel):
    """Only -1 is taken for "no token"; other negative indices count from the end or are clamped."""

    clamps = False

    def in_cache(self, source: Source) -> torch.Tensor:
        size = source.cache.num_slots
        return (source.indices != -1) & (source.indices < size) & (size > 0)

    def slots(self, source: Source, counts: torch.Tensor) -> torch.Tensor:
        wrapped = source.indices % max(source.cache.num_slots, 1)
        if self.clamps:
            wrapped = source.indices.clamp_min(0)
        return torch.where(counts, wrapped, 0)


class LengthIgnored(EmulatedKernel):
    def in_length(self, source: Source) -> torch.Tensor:
        return torch.ones_like(source.indices, dtype=torch.bool)


class LengthOneShort(EmulatedKernel):
    def in_length(self, source: Source) -> torch.Tensor:
        if source.lengths is None:
            return super().in_length(source)
        return super().in_length(Source(source.cache, source.indices, source.lengths - 1))


class DuplicatesDropped(EmulatedKernel):
    def counts(self, source: Source) -> torch.Tensor:
        counts = super().counts(source)
        slots = torch.where(counts, source.indices, -1)
        ordered, order = slots.sort(dim=1, stable=True)
        again = torch.zeros_like(counts)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        return counts & ~torch.zeros_like(counts).scatter(1, order, again)


class Int32Overflow(EmulatedKernel):
    """Offsets from 2^31 on become negative; memory below the cache reads as zeros."""

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return (super().offsets(cache, slots) + 2**31) % 2**32 - 2**31

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return (super().footer_offsets(cache, slots) + 2**31) % 2**32 - 2**31


class Uint32Overflow(EmulatedKernel):
    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().offsets(cache, slots) % 2**32

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().footer_offsets(cache, slots) % 2**32


class PageSize64(EmulatedKernel):
    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return byte_offsets(cache, slots, page_size=64)

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return footer_offsets(cache, slots, page_size=64)


class PackedPageStride(EmulatedKernel):
    """Pages, or tokens only, as far apart as the layout says, whatever the cache's strides are."""

    what = "pages"

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        packed, row = cache.layout.page_bytes(cache.page_size), cache.layout.row_bytes
        if self.what == "tokens":
            return byte_offsets(cache, slots, token_stride=row)
        return byte_offsets(cache, slots, page_stride=packed, token_stride=row)

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        packed = cache.layout.page_bytes(cache.page_size)
        return footer_offsets(cache, slots, page_stride=packed)


class LastBlockUnmasked(EmulatedKernel):
    """The list is padded to whole blocks, and what the padding holds counts as tokens."""

    block = 64
    padding = "token 0"

    def load(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        keys, counts = super().load(source)
        pad = -source.indices.shape[1] % self.block
        if self.padding == "token 0":
            following = torch.zeros_like(source.indices[:, :1]).expand(-1, pad)
        else:
            # Rows lie one after the other, so the read past a row's end finds the next ones.
            end = torch.arange(1, source.indices.shape[0] + 1) * source.indices.shape[1]
            flat = torch.nn.functional.pad(source.indices.flatten(), (0, pad), value=-1)
            columns = torch.arange(pad, device=flat.device)
            following = flat[end.to(flat.device)[:, None] + columns]
        extra = Source(source.cache, following, None)
        more, more_counts = super().load(extra)
        return torch.cat([keys, more], 1), torch.cat([counts, more_counts], 1)


class Race(EmulatedKernel):
    """In a quarter of the rows one chunk, another one each run, still holds the one before it."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__(arithmetic)
        self.generator = torch.Generator().manual_seed(0)

    def load(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        keys, counts = super().load(source)
        n, topk = counts.shape
        chunk = min(self.arithmetic.chunk, max(topk // 2, 1))
        late = torch.rand(n, generator=self.generator) < 0.25
        late[torch.randint(max(n, 1), (1,), generator=self.generator)[: min(n, 1)]] = True
        for row in late.nonzero().flatten().tolist():
            if topk >= 2 * chunk:
                latest = topk - 2 * chunk + 1
                first = int(torch.randint(latest, (1,), generator=self.generator))
                before, after = slice(first, first + chunk), slice(first + chunk, first + 2 * chunk)
                keys[row, after] = keys[row, before]
        return keys, counts


def _outside(inputs: Inputs, above: bool) -> bool:
    lists = [(inputs.cache, inputs.indices)]
    if inputs.extra_cache is not None and inputs.extra_indices is not None:
        lists.append((inputs.extra_cache, inputs.extra_indices))
    return any(
        bool((indices >= cache.num_slots).any() if above else (indices < -1).any())
        for cache, indices in lists
    )


def _too_large(inputs: Inputs) -> bool:
    return _outside(inputs, above=True)


def _negative(inputs: Inputs) -> bool:
    return _outside(inputs, above=False)


def _past(limit: int) -> Callable[[Inputs], bool]:
    def reaches(inputs: Inputs) -> bool:
        return any(memory_bytes(cache) > limit for cache in caches(inputs))

    return reaches


def _strided(inputs: Inputs) -> bool:
    return any(
        (cache.num_pages > 1 and cache.pages.stride(0) != cache.layout.page_bytes(cache.page_size))
        or (cache.page_size > 1 and cache.token_stride != cache.layout.row_bytes)
        for cache in caches(inputs)
    )


def _other_page_size(inputs: Inputs) -> bool:
    return any(cache.page_size != 64 for cache in caches(inputs))


def _partial_block(inputs: Inputs) -> bool:
    lists = [inputs.indices] + ([] if inputs.extra_indices is None else [inputs.extra_indices])
    return any(indices.shape[-1] % 128 for indices in lists)


READING = (
    Fault(
        "scale_pow2_down",
        1,
        "rounds the stored fp32 scales down to powers of two",
        ScalePow2Down,
        quantised,
    ),
    Fault(
        "scale_bf16",
        2,
        "rounds the stored fp32 scales to bf16",
        ScaleBf16,
        quantised,
        variants=({}, {"product": "bf16"}),
    ),
    Fault(
        "dequantised_bf16",
        2,
        "rounds the product of value and scale to bf16",
        DequantisedBf16,
        quantised,
    ),
    Fault(
        "scale_neighbour_tile",
        3,
        "multiplies a tile by the scale of the tile beside it",
        ScaleNeighbourTile,
        quantised,
        variants=({}, {"by": 1}),
    ),
    Fault(
        "scale_neighbour_token",
        3,
        "multiplies a token by the scales of the token beside it in the list",
        ScaleNeighbourToken,
        quantised,
        variants=({}, {"by": 1}),
    ),
    Fault(
        "fp8_fnuz",
        3,
        "decodes e4m3fn bytes as AMD's e4m3fnuz, worth half",
        Fp8AsFnuz,
        quantised,
    ),
    Fault(
        "masked_slot_nan",
        4,
        "loads a token for a masked entry and multiplies it by weight 0: 0 * NaN is NaN",
        MaskedSlotNan,
        has_masked,
        variants=({}, {"loads": "last token"}, {"loads": "the index clamped"}),
    ),
    Fault(
        "int32_overflow",
        8,
        "computes byte offsets in int32, wrong past 2^31",
        Int32Overflow,
        _past(2**31),
    ),
    Fault(
        "uint32_overflow",
        8,
        "computes byte offsets in uint32, wrong past 2^32",
        Uint32Overflow,
        _past(2**32),
    ),
    Fault(
        "index_too_large_loaded",
        9,
        "clamps indices past the cache to its last token and counts them",
        IndexTooLargeLoaded,
        _too_large,
    ),
    Fault(
        "index_negative_loaded",
        9,
        "masks only -1; other negative indices are loaded from the end, or as token 0",
        IndexNegativeLoaded,
        _negative,
        variants=({}, {"clamps": True}),
    ),
    Fault(
        "topk_length_ignored",
        10,
        "attends to entries beyond topk_length",
        LengthIgnored,
        has_lengths,
    ),
    Fault(
        "topk_length_one_short",
        10,
        "attends to one entry fewer than topk_length says",
        LengthOneShort,
        has_lengths,
    ),
    Fault(
        "duplicates_dropped",
        11,
        "counts an index that occurs several times once",
        DuplicatesDropped,
    ),
    Fault(
        "rope_not_read",
        16,
        "leaves the RoPE part out of the logits",
        RopeNotRead,
        has_rope,
    ),
    Fault(
        "rope_scaled",
        16,
        "multiplies the RoPE part by the latent's last scale",
        RopeScaled,
        quantised,
    ),
    Fault(
        "rope_interleaved",
        16,
        "mixes up interleaved and half-split order of the RoPE part",
        RopeInterleaved,
        has_rope,
        variants=({}, {"back": True}),
    ),
    Fault(
        "page_size_64",
        20,
        "takes 64 tokens per page, whatever the page size is",
        PageSize64,
        _other_page_size,
    ),
    Fault(
        "packed_page_stride",
        20,
        "takes pages and tokens for packed where their strides are larger",
        PackedPageStride,
        _strided,
        variants=({}, {"what": "tokens"}),
    ),
    Fault(
        "last_block_unmasked",
        21,
        "pads the list to whole blocks with index 0 and counts the padding",
        LastBlockUnmasked,
        _partial_block,
        variants=({}, {"block": 16}, {"block": 32}, {"block": 128}),
    ),
    Fault(
        "last_block_next_row",
        21,
        "reads whole blocks past the end of its list: the next row's indices count too",
        LastBlockUnmasked,
        _partial_block,
        variants=tuple({"padding": "next row", "block": block} for block in (64, 16, 32, 128)),
    ),
    Fault(
        "race",
        22,
        "a chunk is used before it has arrived: results move between runs",
        Race,
        random=True,
    ),
)
