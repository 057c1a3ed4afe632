"""Faults that only unusual calls show: long lists, strides, used buffers, sinks and lengths of all
kinds, and the writer's like. The cases made for them are in cases_seldom.py,
cases_beside.py and case_writes.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..kv_cache import KVCache
from .case import Inputs, Output, WriteInputs
from .faults_fault import Fault, caches, has_lengths, has_sink
from .faults_kernel import EmulatedKernel, Source, byte_offsets, footer_offsets


class ListCut(EmulatedKernel):
    limit = 2048

    def in_length(self, source: Source) -> torch.Tensor:
        column = torch.arange(source.indices.shape[1], device=source.indices.device)
        return super().in_length(source) & (column < self.limit)


class LengthWraps(EmulatedKernel):
    """A length near 2^31 is rounded up to whole blocks past it, or a negative one is no limit, or
    what a split has left of one near -2^31 wraps around."""

    which = "rounded up"

    def in_length(self, source: Source) -> torch.Tensor:
        if source.lengths is None:
            return super().in_length(source)
        lengths = source.lengths.long()
        if self.which == "left of a split":
            begins = torch.arange(source.indices.shape[1], device=lengths.device) // 64 * 64
            return super().in_length(source) | (lengths[:, None] - begins < -(2**31))
        if self.which == "negative":
            ends = torch.where(lengths < 0, source.indices.shape[1], lengths)
        else:
            ends = torch.where(lengths + 63 >= 2**31, 0, lengths)
        return super().in_length(replace(source, lengths=ends))


class StorageOffsetIgnored(EmulatedKernel):
    def offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().offsets(cache, slots) - int(cache.pages.storage_offset())

    def footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return super().footer_offsets(cache, slots) - int(cache.pages.storage_offset())

    def write_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return byte_offsets(cache, slots) - int(cache.pages.storage_offset())

    def write_footer_offsets(self, cache: KVCache, slots: torch.Tensor) -> torch.Tensor:
        return footer_offsets(cache, slots) - int(cache.pages.storage_offset())


class StridesFromShape(EmulatedKernel):
    """Queries, lists and tables are read as if they were contiguous."""

    def run(self, inputs: Inputs, state: Any) -> Output:
        q, indices = as_packed(inputs.q), as_packed(inputs.indices)
        extra, table = inputs.extra_indices, inputs.block_table
        packed = replace(
            inputs,
            q=q,
            indices=indices,
            extra_indices=None if extra is None else as_packed(extra),
            block_table=None if table is None else as_packed(table),
        )
        return super().run(packed, state)

    def write(self, inputs: WriteInputs) -> None:
        rope = None if inputs.rope is None else as_packed(inputs.rope)
        super().write(replace(inputs, latent=as_packed(inputs.latent), rope=rope))


class SinkRounded(EmulatedKernel):
    def sink_factor(self, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        return super().sink_factor(lse, sink.to(torch.bfloat16).to(lse.dtype))


class SinkOverflow(EmulatedKernel):
    """exp(lse) / (exp(lse) + exp(sink)) as it is written, or with sinks held within +-80."""

    limit = 0.0

    def sink_factor(self, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        if self.limit:
            held = sink.clamp(-self.limit, self.limit)
            return super().sink_factor(lse, torch.where(sink.isinf(), sink, held))
        weight = torch.exp(lse.float()).to(lse.dtype)
        plain = weight / (weight + torch.exp(sink.float()).to(lse.dtype))
        return torch.where(sink.isinf(), super().sink_factor(lse, sink), plain)


class SinkWrongHead(EmulatedKernel):
    """The next head's sink, or those of the first heads over and over."""

    heads = 0

    def sink_factor(self, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        own = torch.arange(len(sink), device=sink.device)
        other = own % self.heads if self.heads else (own + 1) % max(len(sink), 1)
        return super().sink_factor(lse, sink[other])


class LogitsClamped(EmulatedKernel):
    limit = 65504.0

    def logits(self, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        return super().logits(q, keys, scale).clamp_max(self.limit)


class StaleBuffers(EmulatedKernel):
    """What was derived from a buffer is found again by its address, whatever it holds by then."""

    def run(self, inputs: Inputs, state: Any) -> Output:
        parts = (inputs.q, inputs.cache.pages, inputs.indices)
        key = (*(part.data_ptr() for part in parts), *inputs.q.shape)
        answers = state.setdefault("answers", {})
        if key not in answers:
            answers[key] = super().run(inputs, state)
        found: Output = answers[key]
        return found


class WriterTailLost(EmulatedKernel):
    group = 8

    def write(self, inputs: WriteInputs) -> None:
        whole = len(inputs.slots) // self.group * self.group
        rope = None if inputs.rope is None else inputs.rope[:whole]
        cut = replace(inputs, latent=inputs.latent[:whole], rope=rope, slots=inputs.slots[:whole])
        super().write(cut)


class WriterBf16Limited(EmulatedKernel):
    """What is stored as bf16 is held within the range of e4m3 or of fp16 on its way."""

    limit = 448.0

    def write(self, inputs: WriteInputs) -> None:
        rope, latent = inputs.rope, inputs.latent
        if rope is not None:
            rope = rope.clamp(-self.limit, self.limit)
        if not inputs.cache.layout.quantised:
            latent = latent.clamp(-self.limit, self.limit)
        super().write(replace(inputs, latent=latent, rope=rope))


class WriterTensorUnsaturated(EmulatedKernel):
    """With one scale for the tensor a value may pass 448 times it: the cast makes it NaN."""

    def write(self, inputs: WriteInputs) -> None:
        scale = inputs.cache.tensor_scale
        if scale is None or inputs.cache.layout.latent.dtype != "e4m3":
            super().write(inputs)
            return
        x = inputs.latent.float()
        lost = torch.where(x.abs() > 464 * scale, float("nan"), x)
        super().write(replace(inputs, latent=lost))


def as_packed(t: torch.Tensor) -> torch.Tensor:
    """What memory holds where a contiguous tensor of this shape would lie."""
    if t.is_contiguous():
        return t
    left = t.untyped_storage().nbytes() // t.element_size() - int(t.storage_offset())
    flat = t.as_strided((left,), (1,))
    places = torch.arange(t.numel(), device=t.device).clamp_max(left - 1)
    return flat[places].view(t.shape)


def _long(inputs: Inputs) -> bool:
    lists = (inputs.indices, inputs.extra_indices)
    return any(x is not None and x.shape[-1] > 1024 for x in lists)


def _extreme_lengths(inputs: Inputs) -> bool:
    if not has_lengths(inputs):
        return False
    given = (inputs.topk_length, inputs.extra_topk_length)
    return any(x is not None and bool(((x < 0) | (x > 2**31 - 64)).any()) for x in given)


def _elsewhere(inputs: Inputs | WriteInputs) -> bool:
    every = caches(inputs) if isinstance(inputs, Inputs) else [inputs.cache]
    return any(cache.pages.storage_offset() for cache in every)


def _slices(inputs: Inputs) -> bool:
    parts = (inputs.q, inputs.indices, inputs.extra_indices, inputs.block_table)
    return any(part is not None and not part.is_contiguous() for part in parts)


def _written_slices(inputs: WriteInputs) -> bool:
    return any(x is not None and not x.is_contiguous() for x in (inputs.latent, inputs.rope))


def _tensor_scale(inputs: WriteInputs) -> bool:
    return inputs.cache.tensor_scale is not None


SELDOM_FAULTS = (
    Fault(
        "logits_clamped",
        7,
        "holds logits below what fp16, or exp in fp32, can take: past it all tokens weigh the same",
        LogitsClamped,
        variants=({}, {"limit": 6e4}, {"limit": 88.0}, {"limit": 60.0}),
    ),
    Fault(
        "length_wraps",
        10,
        "rounds a length near 2^31 up past it, or lets a negative one wrap around or be no limit",
        LengthWraps,
        _extreme_lengths,
        variants=({}, {"which": "negative"}, {"which": "left of a split"}),
    ),
    Fault(
        "stale_buffers",
        12,
        "keeps what it made of a buffer by its address and misses that it was filled anew",
        StaleBuffers,
        lambda inputs: bool(inputs.contents),
    ),
    Fault("sink_rounded", 19, "rounds the sinks to bf16", SinkRounded, has_sink),
    Fault(
        "sink_overflow",
        19,
        "takes exp of lse and of the sink themselves, or holds sinks within 80",
        SinkOverflow,
        has_sink,
        variants=({}, {"limit": 80.0}),
    ),
    Fault(
        "sink_wrong_head",
        19,
        "applies the next head's sink, or those of the first 16 to 64 heads to all",
        SinkWrongHead,
        has_sink,
        variants=({}, {"heads": 16}, {"heads": 32}, {"heads": 64}),
    ),
    Fault(
        "storage_offset_ignored",
        20,
        "counts pages from the beginning of the pool's memory, not of the cache's",
        StorageOffsetIgnored,
        _elsewhere,
    ),
    Fault(
        "strides_from_shape",
        20,
        "takes queries, lists and block tables for contiguous",
        StridesFromShape,
        _slices,
    ),
    Fault(
        "list_cut",
        21,
        "attends to the first 1024 to 4096 entries of a longer list",
        ListCut,
        _long,
        variants=({}, {"limit": 1024}, {"limit": 4096}),
    ),
    Fault(
        "writer_tail_lost",
        24,
        "writes whole groups of tokens only",
        WriterTailLost,
        op="kv_write",
        variants=tuple({"group": group} for group in (8, 4, 16, 32, 64)),
    ),
    Fault(
        "writer_strides_ignored",
        24,
        "takes latent and RoPE parts for contiguous",
        StridesFromShape,
        _written_slices,
        "kv_write",
    ),
    Fault(
        "writer_bf16_limited",
        24,
        "holds what is stored as bf16 within the range of e4m3 or fp16",
        WriterBf16Limited,
        op="kv_write",
        variants=({}, {"limit": 65504.0}),
    ),
    Fault(
        "writer_tensor_unsaturated",
        24,
        "lets values past 448 times the tensor's scale become NaN",
        WriterTensorUnsaturated,
        _tensor_scale,
        "kv_write",
    ),
    Fault(
        "writer_storage_offset_ignored",
        24,
        "counts pages from the beginning of the pool's memory, not of the cache's",
        StorageOffsetIgnored,
        _elsewhere,
        "kv_write",
    ),
)
