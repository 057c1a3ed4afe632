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
from .case import Inputs, NotOffered, Output, WriteInputs

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
    "gather",
    "in_cache",
    "in_length",
    "latent_values",
    "load",
    "offsets",
    "read",
    "rope",
    "scales",
    "slots",
    "sources",
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
        for source in sources:
            if source.cache.layout.planar:
                raise NotOffered(f"layout {source.cache.layout.name} is planar")
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
        s_q = inputs.q.shape[1] if inputs.op == "decode" else 1
        made = [_source(inputs.cache, inputs.indices, inputs.topk_length, s_q)]
        if inputs.extra_cache is not None and inputs.extra_indices is not None:
            extra = (inputs.extra_cache, inputs.extra_indices, inputs.extra_topk_length)
            made.append(_source(*extra, s_q))
        return made

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
        rows = self.gather(source.cache, slots, counts)
        return self.decode(source.cache.layout, rows), counts

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
        """Token rows [n, topk, row_bytes]; zeros where an entry does not count."""
        return self.read(cache, slots, counts)

    def read(self, cache: KVCache, slots: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Rows of the entries to load; zeros elsewhere and outside the cache's memory."""
        flat = flat_rows(cache)
        offsets = self.offsets(cache, slots)
        load = load & (offsets >= 0) & (offsets < flat.shape[0])
        rows = flat.new_zeros(*slots.shape, cache.layout.row_bytes)
        rows[load] = flat[offsets[load]]
        return rows

    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        """Byte offset of each slot's row from the cache's first byte."""
        return byte_offsets(cache, slots)

    def decode(self, layout: KVLayout, rows: torch.Tensor) -> torch.Tensor:
        """Keys [n, topk, d_qk] from token rows."""
        flat = rows.flatten(0, 1)
        shape = rows.shape[:2]
        latent = self.latent_values(layout, flat).to(self.arithmetic.compute)
        scales = None
        if layout.scales is not None:
            stored = layout.scales.read(flat).to(self.arithmetic.compute)
            scales = self.scales(stored.view(*shape, layout.scales.count))
            tiles = latent.view(*shape, layout.scales.count, layout.tile) * scales[..., None]
            latent = tiles.flatten(2)
        latent = latent.view(*shape, layout.latent.count)
        if layout.rope is None:
            return latent
        rope = layout.rope.read(flat).to(self.arithmetic.compute)
        rope = rope.view(*shape, layout.rope.count)
        return torch.cat([latent, self.rope(rope, scales)], dim=2)

    def latent_values(self, layout: KVLayout, rows: torch.Tensor) -> torch.Tensor:
        return layout.latent.read(rows)

    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        """The factors to multiply by, from the stored ones, [n, topk, tiles]."""
        return scales

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
        if layout.planar:
            raise NotOffered(f"layout {layout.name} is planar")
        keep = inputs.slots >= 0
        latent = inputs.latent[keep].to(torch.float32)
        rows = latent.new_zeros(latent.shape[0], layout.row_bytes, dtype=torch.uint8)
        if layout.scales is None:
            layout.latent.write(rows, latent)
        else:
            tiles = latent.view(latent.shape[0], layout.scales.count, layout.tile)
            scales = self.written_scales(tiles, inputs.scale_rounding)
            values = self.to_e4m3(tiles / scales[..., None])
            layout.latent.write(rows, values.flatten(1))
            layout.scales.write(rows, scales)
        if layout.rope is not None and inputs.rope is not None:
            layout.rope.write(rows, inputs.rope[keep])
        flat = flat_rows(cache)
        offsets = self.write_offsets(cache, inputs.slots[keep].to(torch.int64))
        inside = (offsets >= 0) & (offsets < flat.shape[0])
        flat[offsets[inside]] = rows[inside]

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


def byte_offsets(cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
    """Where each slot's row begins, int64, counted from the cache's first byte."""
    page, offset = slots // cache.page_size, slots % cache.page_size
    return page * cache.pages.stride(0) + offset * cache.token_stride


def memory_bytes(cache: KVCache) -> int:
    """Bytes from the cache's first row to the end of its last one."""
    if cache.num_slots == 0:
        return 0
    last_page = (cache.num_pages - 1) * cache.pages.stride(0)
    return last_page + (cache.page_size - 1) * cache.token_stride + cache.layout.row_bytes


def flat_rows(cache: KVCache) -> torch.Tensor:
    """The cache's memory as overlapping rows, one starting at every byte: [bytes, row_bytes]."""
    starts = max(0, memory_bytes(cache) - cache.layout.row_bytes + 1)
    return cache.pages.as_strided((starts, cache.layout.row_bytes), (1, 1))


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
