"""A correct kernel, step by step, that the fault library breaks one step at a time.

It computes as real kernels do: bytes gathered by byte offset, chunks of 64 tokens with a running
maximum, weights rounded to bf16, partial results of a split merged by their lse. Each step is a
method, and a fault (faults_reading.py, faults_softmax.py, faults_whole.py) overrides one of them.
With `UNROUNDED` arithmetic the same code rounds neither weights nor output, so that a diagnosis
compares an observed output with the fault alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..kv_cache import KVCache
from ..kv_layout import KVLayout
from ..kv_quantise import E4M3_MAX, FP32_MIN_NORMAL
from .case import Inputs, Output, WriteInputs
from .token_bytes import joined, parts, stored_scales

# Keeps the decoded keys of one block of query rows near 40 MB in float32.
_TOKENS_PER_BLOCK = 1 << 14


@dataclass(frozen=True)
class Arithmetic:
    """How an emulated kernel rounds and how it divides the work.

    Attributes:
        compute: dtype of logits, weights and accumulators.
        weights: dtype the weights are rounded to before they meet the values; None keeps them.
        output: dtype of the output.
        chunk: tokens that share one step of the running maximum.
        splits: parts that are computed apart and merged by their lse; at most one per chunk.
    """

    compute: torch.dtype = torch.float32
    weights: torch.dtype | None = torch.bfloat16
    output: torch.dtype = torch.bfloat16
    chunk: int = 64
    splits: int = 1


KERNEL = Arithmetic()
UNROUNDED = Arithmetic(torch.float32, None, torch.float32)
EXACT = Arithmetic(torch.float64, None, torch.float64)

# Steps that decide what is loaded. A kernel that overrides none of them can share loaded keys.
_LOADING = (
    "counts",
    "decode",
    "dense_ends",
    "dense_lengths",
    "dense_lists",
    "dense_slots",
    "dense_table",
    "dequantised",
    "footer_offsets",
    "gather",
    "in_cache",
    "in_length",
    "latent_values",
    "load",
    "offsets",
    "outer",
    "read",
    "rope",
    "scales",
    "slots",
    "sources",
    "stored_scales",
)


@dataclass(frozen=True)
class Source:
    """A cache, and what each of n query tokens selects from it: indices [n, topk], lengths [n]."""

    cache: KVCache
    indices: torch.Tensor
    lengths: torch.Tensor | None


class Attended(NamedTuple):
    """Results for n query tokens: out [n, h, d_v]; lse and max_logits [n, h]; empty [n]."""

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor
    empty: torch.Tensor


class EmulatedKernel:
    """Attention and cache writer without a fault, as small steps that a fault can override."""

    name = "clean"

    def __init__(self, arithmetic: Arithmetic = KERNEL) -> None:
        self.arithmetic = arithmetic
        self.shared: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def share_keys(
        self, shared: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]]
    ) -> None:
        """Use keys that another kernel loaded for the same Inputs objects, if loading is clean."""
        if all(getattr(type(self), step) is getattr(EmulatedKernel, step) for step in _LOADING):
            self.shared = shared

    def new_state(self) -> Any:
        return {}

    # The call, as the host side of a kernel sees it.

    def run(self, inputs: Inputs, state: Any) -> Output:
        q = self.queries(inputs)
        sources = self.sources(inputs, state)
        width = sum(source.indices.shape[1] for source in sources)
        step = max(1, _TOKENS_PER_BLOCK // max(width, 1))
        blocks = []
        for first in range(0, max(q.shape[0], 1), step):
            rows = slice(first, first + step)
            part = [_rows_of(source, rows) for source in sources]
            loaded = self.loaded_keys(part, (id(inputs), first))
            scale = self.softmax_scale(inputs)
            blocks.append(self.attend(q[rows], loaded, scale, inputs.cache.layout.d_v))
        done = self.finish(Attended(*map(torch.cat, zip(*blocks, strict=True))), inputs)
        shape = inputs.q.shape[:-1]
        return Output(
            out=done.out.to(self.arithmetic.output).view(*shape, done.out.shape[-1]),
            lse=self.lse_unit(done.lse).to(self._statistics).view(shape),
            max_logits=self.max_logits_unit(done.max_logits).to(self._statistics).view(shape),
        )

    def queries(self, inputs: Inputs) -> torch.Tensor:
        """[n, h, d_qk] in compute dtype; n counts sequences times query tokens."""
        return inputs.q.reshape(-1, *inputs.q.shape[-2:]).to(self.arithmetic.compute)

    def softmax_scale(self, inputs: Inputs) -> float:
        return inputs.scale

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        """What each query token selects, from the main and the extra cache."""
        s_q = inputs.queries
        if inputs.block_table is not None:
            return [_source(inputs.cache, self.dense_lists(inputs), None, s_q)]
        made = [_source(inputs.cache, inputs.indices, inputs.topk_length, s_q)]
        if inputs.extra_cache is not None and inputs.extra_indices is not None:
            extra = (inputs.extra_cache, inputs.extra_indices, inputs.extra_topk_length)
            made.append(_source(*extra, s_q))
        return made

    def dense_lists(self, inputs: Inputs) -> torch.Tensor:
        """The slots [b, s_q, T] that each query token of a dense call sees, -1 past its last."""
        table, lengths = self.dense_table(inputs), self.dense_lengths(inputs)
        size = inputs.cache.page_size
        token = torch.arange(table.shape[1] * size, device=table.device)
        pages = table.long()[:, token // size]
        slots = self.dense_slots(inputs.cache, pages, token % size)
        return torch.where(token < self.dense_ends(inputs, lengths)[..., None], slots[:, None], -1)

    def dense_table(self, inputs: Inputs) -> torch.Tensor:
        """Pages of each sequence, [b, pages]."""
        assert inputs.block_table is not None
        return inputs.block_table

    def dense_lengths(self, inputs: Inputs) -> torch.Tensor:
        """Tokens of each sequence, [b] int64."""
        assert inputs.cache_seqlens is not None
        return inputs.cache_seqlens.long()

    def dense_slots(
        self, cache: KVCache, pages: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """Slots of tokens `offsets` [T] of pages [b, T], -1 for pages that the cache lacks."""
        there = (pages >= 0) & (pages < cache.num_pages)
        return torch.where(there, pages * cache.page_size + offsets, -1)

    def dense_ends(self, inputs: Inputs, lengths: torch.Tensor) -> torch.Tensor:
        """How many of its sequence's tokens each query token sees, [b, s_q]."""
        s_q = inputs.q.shape[1]
        hidden = torch.arange(s_q - 1, -1, -1, device=lengths.device) if inputs.causal else 0
        return (
            lengths[:, None] - hidden + torch.zeros(s_q, dtype=torch.int64, device=lengths.device)
        )

    # The device side: load a list of tokens.

    def loaded_keys(
        self, sources: list[Source], block: tuple[int, int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and masks of each source, loaded or shared."""
        if self.shared is None:
            return [self.load(source) for source in sources]
        if block not in self.shared:
            self.shared[block] = [self.load(source) for source in sources]
        return self.shared[block]

    def attend(
        self,
        q: torch.Tensor,
        loaded: list[tuple[torch.Tensor, torch.Tensor]],
        scale: float,
        d_v: int,
    ) -> Attended:
        """Attention of a block of query tokens; each source's list fills whole chunks."""
        chunk = self.arithmetic.chunk
        parts = [_padded(*part, -(-part[0].shape[1] // chunk) * chunk) for part in loaded]
        if len(parts) == 1:
            return self.attend_keys(q, *parts[0], scale, d_v)
        keys, valid = zip(*parts, strict=True)
        return self.attend_keys(q, torch.cat(keys, 1), torch.cat(valid, 1), scale, d_v)

    def load(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, topk, d_qk], zero where masked, and which of them count."""
        counts = self.counts(source)
        slots = self.slots(source, counts)
        tokens = self.gather(source.cache, slots, counts)
        return self.decode(source.cache, tokens), counts

    def counts(self, source: Source) -> torch.Tensor:
        """Which entries count, [n, topk]."""
        return self.in_cache(source) & self.in_length(source)

    def in_cache(self, source: Source) -> torch.Tensor:
        return (source.indices >= 0) & (source.indices < source.cache.num_slots)

    def in_length(self, source: Source) -> torch.Tensor:
        column = torch.arange(source.indices.shape[1], device=source.indices.device)
        if source.lengths is None:
            return torch.ones_like(source.indices, dtype=torch.bool)
        return column < source.lengths[:, None]

    def slots(self, source: Source, counts: torch.Tensor) -> torch.Tensor:
        """The slot that each entry loads; what a masked entry names is never looked at."""
        return torch.where(counts, source.indices, 0)

    def gather(self, cache: KVCache, slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Bytes of tokens [n, topk, row + footer]; zeros where an entry does not count."""
        return self.read(cache, slots, counts)

    def read(self, cache: KVCache, slots: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Bytes of the entries to load; zeros elsewhere and outside the cache's memory."""
        layout = cache.layout
        rows = read_bytes(cache, self.offsets(cache, slots), load, layout.row_bytes)
        if not layout.planar:
            return rows
        footers = self.footer_offsets(cache, slots)
        return joined(rows, read_bytes(cache, footers, load, layout.footer_bytes))

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        """Byte offset of each slot's row from the cache's first byte."""
        return byte_offsets(cache, slots)

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        """Byte offset of each slot's scales in a planar layout."""
        return footer_offsets(cache, slots)

    def decode(self, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
        """Keys [n, topk, d_qk] from the bytes of tokens."""
        layout = cache.layout
        flat = tokens.flatten(0, 1)
        shape = tokens.shape[:2]
        compute = self.arithmetic.compute
        latent = self.latent_values(layout, parts(layout, flat)[0]).to(compute)
        latent = latent.view(*shape, layout.latent.count)
        stored = self.stored_scales(layout, flat)
        scales = None
        if stored is not None:
            scales = self.scales(stored.to(compute).view(*shape, stored.shape[1]))
            tiles = latent.unflatten(2, (scales.shape[2], layout.tile)) * scales[..., None]
            latent = tiles.flatten(2)
        if layout.outer is not None:
            outer = layout.outer.read(flat).to(compute)
            latent = latent * self.outer(outer).view(*shape, 1)
        if cache.tensor_scale is not None:
            latent = latent * self.outer(cache.tensor_scale.to(compute))
        latent = self.dequantised(latent, layout)
        if layout.rope is None:
            return latent
        rope = layout.rope.read(flat).to(compute)
        rope = rope.view(*shape, layout.rope.count)
        return torch.cat([latent, self.rope(rope, scales)], dim=2)

    def latent_values(self, layout: KVLayout, rows: torch.Tensor) -> torch.Tensor:
        return layout.latent.read(rows)

    def stored_scales(self, layout: KVLayout, tokens: torch.Tensor) -> torch.Tensor | None:
        """The tiles' scales [n, tiles] of tokens [n, row + footer]; None where there are none."""
        return stored_scales(layout, tokens)

    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        """The factors to multiply by, from the stored ones, [n, topk, tiles]."""
        return scales

    def outer(self, scales: torch.Tensor) -> torch.Tensor:
        """The factors of whole tokens [n * topk, 1], or of the whole tensor [1]."""
        return scales

    def dequantised(self, latent: torch.Tensor, layout: KVLayout) -> torch.Tensor:
        """The latent part [n, topk, 512] as it meets the query and the weights."""
        return latent

    def rope(self, rope: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """The RoPE part [n, topk, 64]; `scales` is None in layouts without any."""
        return rope

    # The device side: softmax over chunks and splits.

    def attend_keys(
        self, q: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor, scale: float, d_v: int
    ) -> Attended:
        """Attention over loaded keys [n, T, d_qk], T a multiple of the chunk."""
        n, heads, _ = q.shape
        chunk = self.arithmetic.chunk
        chunks = max(1, keys.shape[1] // chunk)
        splits = min(self.arithmetic.splits, chunks)
        tokens = -(-chunks // splits) * splits * chunk
        keys, valid = _padded(keys, valid, tokens)
        logits = self.mask(self.logits(q, keys, scale), valid[:, None])
        steps = tokens // (splits * chunk)
        parts = self.softmax(
            logits.view(n, heads, splits, steps, chunk),
            keys[..., :d_v].reshape(n, splits, steps * chunk, d_v),
            valid.view(n, 1, splits, steps, chunk),
        )
        out, lse = self.merge(*parts)
        return Attended(out, lse, logits.amax(2), ~valid.any(1))

    def logits(self, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        return (q @ keys.mT) * scale

    def mask(self, logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return torch.where(valid, logits, float("-inf"))

    def softmax(
        self, logits: torch.Tensor, values: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Online softmax, unrolled: each chunk uses the maximum so far and decays afterwards.

        Args:
            logits: [n, h, splits, chunks, chunk].
            values: [n, splits, chunks * chunk, d_v].
            valid: [n, 1, splits, chunks, chunk].

        Returns:
            normalised partial outputs [n, h, splits, d_v] and their lse [n, h, splits].
        """
        peak = self.running_max(logits)
        p = self.weights(logits, peak, valid)
        final = peak[..., -1:]
        decay = torch.exp(peak - finite_or_zero(final))
        total = self.row_sum(p.sum(-1), decay)
        weights = (self.round_weights(p) * decay[..., None]).flatten(3)
        out = torch.einsum("nhst,nstd->nhsd", weights, values)
        out = torch.where(total[..., None] == 0, 0.0, out / total[..., None])
        return out, final.squeeze(-1) + torch.log(total)

    def running_max(self, logits: torch.Tensor) -> torch.Tensor:
        """The maximum up to each chunk, [n, h, splits, chunks]."""
        return logits.amax(-1).cummax(-1).values

    def weights(
        self, logits: torch.Tensor, peak: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """exp(logit - maximum so far); 0 before the first valid token."""
        return torch.exp(logits - finite_or_zero(peak)[..., None])

    def row_sum(self, sums: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return (sums * decay).sum(-1)

    def round_weights(self, p: torch.Tensor) -> torch.Tensor:
        kept = self.arithmetic.weights
        return p if kept is None else p.to(kept).to(p.dtype)

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial results over dim 2 into one, weighted by exp(lse)."""
        whole = torch.logsumexp(lse, 2)
        share = torch.exp(lse - finite_or_zero(whole)[..., None])
        return (share[..., None] * out).sum(2), whole

    # The end of the call.

    def finish(self, done: Attended, inputs: Inputs) -> Attended:
        """The sink's share and the rows with nothing valid, for all n query tokens."""
        out, lse = done.out, done.lse
        if inputs.attn_sink is not None:
            out = out * self.sink_factor(lse, inputs.attn_sink.to(lse.dtype))[..., None]
        empty = done.empty[:, None]
        out = torch.where(empty[..., None], 0.0, out)
        lse = torch.where(empty, float("-inf"), lse)
        max_logits = torch.where(empty, float("-inf"), done.max_logits)
        return Attended(out, lse, max_logits, done.empty)

    def sink_factor(self, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(lse - sink)

    def lse_unit(self, lse: torch.Tensor) -> torch.Tensor:
        return lse

    def max_logits_unit(self, max_logits: torch.Tensor) -> torch.Tensor:
        return max_logits

    @property
    def _statistics(self) -> torch.dtype:
        return torch.float64 if self.arithmetic.compute is torch.float64 else torch.float32

    # The writer.

    def write(self, inputs: WriteInputs) -> None:
        cache, layout = inputs.cache, inputs.cache.layout
        keep = inputs.slots >= 0
        latent = inputs.latent[keep].to(torch.float32)
        rope = None if inputs.rope is None else inputs.rope[keep]
        packed = layout.pack(latent, rope, inputs.scale_rounding, cache.tensor_scale)
        if tiles_of_e4m3(layout) and layout.scales is not None:
            # Once more, by the steps that a fault may change.
            rounding = "pow2" if layout.scales.dtype == "ue8m0" else inputs.scale_rounding
            tiles = latent.view(latent.shape[0], layout.scales.count, layout.tile)
            scales = self.written_scales(tiles, rounding)
            values = self.to_e4m3(tiles / scales[..., None])
            layout.latent.write(packed[0], values.flatten(1))
            layout.scales.write(packed[layout.planar], scales)
        slots = inputs.slots[keep].to(torch.int64)
        write_bytes(cache, self.write_offsets(cache, slots), packed[0])
        if layout.planar:
            write_bytes(cache, self.write_footer_offsets(cache, slots), packed[1])

    def write_footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return footer_offsets(cache, slots)

    def write_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return byte_offsets(cache, slots)

    def written_scales(self, tiles: torch.Tensor, rounding: str) -> torch.Tensor:
        """amax/448 or the power of two above it; 1 for a tile of zeros, never below 2^-126."""
        amax = torch.where(torch.isfinite(tiles), tiles, 0.0).abs().amax(-1)
        scales = (amax / E4M3_MAX).clamp_min(FP32_MIN_NORMAL)
        if rounding == "pow2":
            scales = torch.exp2(torch.log2(scales.double()).ceil()).float()
        return torch.where(amax == 0, 1.0, scales)

    def to_e4m3(self, scaled: torch.Tensor) -> torch.Tensor:
        """e4m3 values; finite ones saturate, NaN and Inf become NaN."""
        finite = torch.isfinite(scaled)
        limited = torch.where(finite, scaled.clamp(-E4M3_MAX, E4M3_MAX), float("nan"))
        return limited.to(torch.float8_e4m3fn)


def finite_or_zero(peak: torch.Tensor) -> torch.Tensor:
    """A maximum to subtract: 0 where nothing was valid, since -inf - -inf is NaN."""
    return torch.where(peak == float("-inf"), 0.0, peak)


def tiles_of_e4m3(layout: KVLayout) -> bool:
    """Whether the latent part is e4m3 values with a scale for every tile."""
    return layout.latent.dtype == "e4m3" and layout.scales is not None


def byte_offsets(
    cache: KVCache,
    slots: torch.Tensor,
    *,
    page_stride: int | None = None,
    page_size: int | None = None,
    token_stride: int | None = None,
) -> torch.Tensor:
    """Where each slot's row begins, int64, counted from the cache's first byte.

    What is given stands for the cache's own, as a fault may have it.
    """
    size = cache.page_size if page_size is None else page_size
    between = cache.pages.stride(0) if page_stride is None else page_stride
    within = cache.token_stride if token_stride is None else token_stride
    return slots // size * between + slots % size * within


def footer_offsets(
    cache: KVCache,
    slots: torch.Tensor,
    *,
    page_stride: int | None = None,
    page_size: int | None = None,
    footer_bytes: int | None = None,
) -> torch.Tensor:
    """Where each slot's scales begin in a planar layout, after all rows of the page."""
    size = cache.page_size if page_size is None else page_size
    between = cache.pages.stride(0) if page_stride is None else page_stride
    width = cache.layout.footer_bytes if footer_bytes is None else footer_bytes
    return slots // size * between + size * cache.layout.row_bytes + slots % size * width


def memory_bytes(cache: KVCache) -> int:
    """Bytes from the cache's first row to the end of its last token."""
    if cache.num_slots == 0:
        return 0
    layout = cache.layout
    page = (cache.page_size - 1) * cache.token_stride + layout.row_bytes
    if layout.planar:
        page += cache.page_size * layout.footer_bytes
    return (cache.num_pages - 1) * cache.pages.stride(0) + page


def every_byte(cache: KVCache, width: int) -> torch.Tensor:
    """The cache's memory as overlapping items, one starting at every byte: [bytes, width]."""
    starts = max(0, memory_bytes(cache) - width + 1)
    return cache.pages.as_strided((starts, width), (1, 1))


def read_bytes(
    cache: KVCache, offsets: torch.Tensor, load: torch.Tensor, width: int
) -> torch.Tensor:
    """`width` bytes at each offset [n, topk] to load; zeros elsewhere and outside the memory."""
    flat = every_byte(cache, width)
    load = load & (offsets >= 0) & (offsets < flat.shape[0])
    found = flat.new_zeros(*offsets.shape, width)
    found[load] = flat[offsets[load]]
    return found


def write_bytes(cache: KVCache, offsets: torch.Tensor, items: torch.Tensor) -> None:
    """Store items [n, width] at offsets [n]; nothing outside the cache's memory."""
    flat = every_byte(cache, items.shape[1])
    inside = (offsets >= 0) & (offsets < flat.shape[0])
    flat[offsets[inside]] = items[inside]


def _padded(
    keys: torch.Tensor, valid: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [n, T, d] and masks [n, T] with masked tokens appended up to `tokens`."""
    more = tokens - keys.shape[1]
    if not more:
        return keys, valid
    pad = torch.nn.functional.pad
    return pad(keys, (0, 0, 0, more)), pad(valid, (0, more))


def _source(
    cache: KVCache, indices: torch.Tensor, lengths: torch.Tensor | None, s_q: int
) -> Source:
    if lengths is not None:
        lengths = lengths.repeat_interleave(s_q)
    return Source(cache, indices.flatten(0, -2).to(torch.int64), lengths)


def _rows_of(source: Source, rows: slice) -> Source:
    lengths = None if source.lengths is None else source.lengths[rows]
    return Source(source.cache, source.indices[rows], lengths)
