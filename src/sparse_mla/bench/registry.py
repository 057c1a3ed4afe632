"""The tensors of a workload, and who can answer it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from .. import arch, dispatch
from ..kv_cache import KVCache
from ..ops.dense_decode.interface import dense_decode
from ..ops.sparse_decode.interface import decode
from ..ops.sparse_decode.source import Source
from ..ops.sparse_prefill.interface import prefill
from .workloads import Workload

Answer = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[], Answer]


@dataclass(frozen=True)
class Data:
    """A workload's tensors on a device. For prefill, q is [s_q, h, d] and cache holds the rows.

    In dense decode indices is the block table, and seqlens are the lengths [b]. An extra cache
    comes with sinks [h], as in the models that have one.
    """

    workload: Workload
    q: torch.Tensor
    cache: KVCache
    indices: torch.Tensor
    scale: float
    seqlens: torch.Tensor | None = None
    extra: Source | None = None
    sink: torch.Tensor | None = None

    def lists(self, tokens: torch.Tensor) -> torch.Tensor:
        """The slots [n, topk] int32 that these query tokens, of all in order, attend to."""
        if self.seqlens is None:
            return self.indices.reshape(-1, self.indices.shape[-1])[tokens]
        pages = self.indices[tokens // self.workload.s_q]
        offset = torch.arange(PAGE_SIZE, dtype=torch.int32, device=pages.device)
        slots = pages[:, :, None] * PAGE_SIZE + offset
        return slots.flatten(1)[:, : self.workload.topk]

    def extra_lists(
        self, tokens: torch.Tensor
    ) -> list[tuple[KVCache, torch.Tensor, torch.Tensor | None]]:
        """The extra cache, and the lists and lengths of these query tokens, of all in order."""
        if self.extra is None:
            return []
        lists = self.extra.indices.flatten(0, -2)[tokens]
        lengths = self.extra.lengths
        if lengths is not None:
            lengths = lengths[tokens // self.workload.s_q]
        return [(self.extra.cache, lists, lengths)]

    def extra_options(self) -> dict[str, Any]:
        """The arguments of `decode` about the extra cache, which come with sinks."""
        if self.extra is None:
            return {}
        return {
            "attn_sink": self.sink,
            "extra_cache": self.extra.cache,
            "extra_indices": self.extra.indices,
            "extra_topk_length": self.extra.lengths,
        }


# FlashMLA's dense decode takes no other.
PAGE_SIZE = 64


def make_cache(
    layout: str, tokens: int, device: torch.device, page_size: int | None = None
) -> KVCache:
    """A packed cache of Gaussian tokens, scales amax/448; by default in pages as models have."""
    page_size = page_size or {"v32_fp8": 64, "v4_fp8": 256}.get(layout, 1)
    cache = KVCache.empty(-(-tokens // page_size), page_size, layout, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    chunk = 1 << 19
    for start in range(0, cache.num_slots, chunk):
        slots = torch.arange(start, min(start + chunk, cache.num_slots), device=device)
        latent = torch.randn(
            len(slots), cache.layout.latent.count, generator=generator, device=device
        )
        rope = None
        if cache.layout.rope is not None:
            rope = torch.randn(len(slots), 64, generator=generator, device=device)
        cache.append(latent, rope, slots)
    return cache


# An extra cache takes a second to write and serves many workloads.
_make_extra_cache = lru_cache(maxsize=1)(make_cache)


def make_extra(workload: Workload, device: torch.device) -> Source:
    """An extra cache in pages of 64 tokens, or of two where its lists have lengths."""
    page_size = 2 if workload.extra_lengths else 64
    cache = _make_extra_cache(workload.layout, workload.s_kv, device, page_size)
    generator = torch.Generator(device=device).manual_seed(2)
    shape = (workload.b, workload.s_q, workload.extra_topk)
    options: dict[str, Any] = {
        "generator": generator,
        "device": device,
        "dtype": torch.int32,
    }
    indices = torch.randint(workload.s_kv, shape, **options)
    lengths = None
    if workload.extra_lengths:
        lengths = torch.randint(workload.extra_topk + 1, (workload.b,), **options)
    return Source(cache, indices, lengths)


def make_data(workload: Workload, cache: KVCache) -> Data:
    """Random queries and indices over `cache`, or in dense decode random pages of it."""
    device = cache.device
    generator = torch.Generator(device=device).manual_seed(1)
    d_qk = cache.layout.d_qk
    lead = (workload.s_q,) if workload.op == "prefill" else (workload.b, workload.s_q)
    q = torch.randn(*lead, workload.h_q, d_qk, generator=generator, device=device)
    # Three times the usual scale: softmax weights neither flat nor one-hot on Gaussian data.
    scale = 3.0 * d_qk**-0.5
    if workload.op == "dense_decode":
        cache = KVCache.from_tensor(
            cache.tensor().view(-1, PAGE_SIZE, 1, 2 * d_qk), cache.layout.name
        )
        count = -(-workload.topk // PAGE_SIZE)
        pages = torch.randperm(workload.b * count, generator=generator, device=device)
        table = pages.view(workload.b, count).to(torch.int32)
        seqlens = torch.full((workload.b,), workload.topk, dtype=torch.int32, device=device)
        return Data(workload, q.to(torch.bfloat16), cache, table, scale, seqlens)
    indices = torch.randint(
        workload.s_kv,
        (*lead, workload.topk),
        generator=generator,
        device=device,
        dtype=torch.int32,
    )
    extra = sink = None
    if workload.extra_topk:
        extra = make_extra(workload, device)
        sink = torch.randn(workload.h_q, generator=generator, device=device)
    return Data(workload, q.to(torch.bfloat16), cache, indices, scale, extra=extra, sink=sink)


@dataclass
class Providers:
    """Who answers a workload: name -> a call that returns (out, lse), and who does not: why."""

    calls: dict[str, Call] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def providers(data: Data, backends: Sequence[str] = (), peers: bool = True) -> Providers:
    """Our backends and, if wanted, the peers that are installed.

    Args:
        backends: names of ours; default those that run on this machine.

    Raises:
        ValueError: the op has no backend of that name.
    """
    found = Providers()
    workload, device = data.workload, data.q.device
    request = dispatch.Request(
        workload.op,
        workload.layout,
        workload.h_q,
        workload.tokens,
        workload.topk,
        extra_layout=workload.layout if workload.extra_topk else "",
        extra_topk=workload.extra_topk,
    )
    for name in backends or dispatch.available_backends(device):
        try:
            dispatch.choose(request, arch.of(device), name)
        except NotImplementedError as error:
            found.refused[f"sparse_mla:{name}"] = str(error)
        else:
            found.calls[f"sparse_mla:{name}"] = _ours(data, name)
    if peers and device.type == "cpu":
        found.calls["torch:gather_einsum"] = lambda: gather_einsum(data)
    peer = _flash_mla(data) if peers and device.type == "cuda" else None
    if peer is not None:
        found.calls["flash_mla"] = peer
    return found


def _ours(data: Data, backend: str) -> Call:
    if data.workload.op == "decode":
        extra = data.extra_options()
        return lambda: decode(
            data.q, data.cache, data.indices, scale=data.scale, backend=backend, **extra
        )
    seqlens = data.seqlens
    if seqlens is not None:
        return lambda: dense_decode(
            data.q, data.cache, data.indices, seqlens, scale=data.scale, backend=backend
        )

    def call() -> Answer:
        out, _, lse = prefill(data.q, data.cache, data.indices, scale=data.scale, backend=backend)
        return out, lse

    return call


def gather_einsum(data: Data) -> Answer:
    """The straightforward way on CPU: gather rows, dequantise to float32, einsum, softmax."""
    keys = data.cache.read(data.indices.reshape(-1), torch.float32)
    keys = keys.view(*data.indices.shape, -1)
    logits = torch.einsum("bshd,bstd->bsht", data.q.float(), keys) * data.scale
    lse = torch.logsumexp(logits, dim=-1)
    out = torch.einsum("bsht,bstd->bshd", torch.exp(logits - lse[..., None]), keys[..., :512])
    return out.to(torch.bfloat16), lse


def _flash_mla(data: Data) -> Call | None:
    """An installed flash_mla, given what it takes: heads padded to 64 or 128 by the caller."""
    try:
        flash_mla = importlib.import_module("flash_mla")
    except ImportError:
        return None
    if data.seqlens is not None:
        return _flash_mla_dense(flash_mla, data)
    heads = data.q.shape[-2]
    padded = 64 if heads <= 64 else 128
    q = torch.zeros(*data.q.shape[:-2], padded, data.q.shape[-1], dtype=data.q.dtype).to(data.q)
    q[..., :heads, :] = data.q
    if data.workload.op == "prefill":
        rows = data.cache.tensor().view(torch.bfloat16).view(-1, 1, q.shape[-1])

        def prefill_call() -> Answer:
            out, _, lse = flash_mla.flash_mla_sparse_fwd(
                q, rows, data.indices.unsqueeze(1), data.scale
            )
            return out[..., :heads, :], lse[..., :heads]

        return prefill_call
    meta, _ = flash_mla.get_mla_metadata()
    kv = data.cache.tensor().view(torch.float8_e4m3fn)
    extra: dict[str, Any] = {}
    if data.extra is not None and data.sink is not None:
        sink = torch.zeros(padded, device=q.device)
        sink[:heads] = data.sink
        extra = {
            "attn_sink": sink,
            "extra_k_cache": data.extra.cache.tensor().view(torch.float8_e4m3fn),
            "extra_indices_in_kvcache": data.extra.indices,
            "extra_topk_length": data.extra.lengths,
        }

    def decode_call() -> Answer:
        out, lse = flash_mla.flash_mla_with_kvcache(
            q, kv, None, None, 512, meta, None, data.scale, False, True, data.indices, **extra
        )
        return out[..., :heads, :], lse.transpose(1, 2)[..., :heads]

    return decode_call


def _flash_mla_dense(flash_mla: ModuleType, data: Data) -> Call:
    """Its dense decode; the schedule is made by the first call and kept, as engines do."""
    meta, _ = flash_mla.get_mla_metadata()
    kv = data.cache.tensor().view(torch.bfloat16)

    def call() -> Answer:
        out, lse = flash_mla.flash_mla_with_kvcache(
            data.q, kv, data.indices, data.seqlens, 512, meta, None, data.scale
        )
        return out, lse.transpose(1, 2)

    return call
