"""What is measured: workloads as data, and who can answer them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import dispatch
from ..kv_cache import KVCache
from ..ops.sparse_decode.interface import decode
from ..ops.sparse_prefill.interface import prefill

Answer = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A shape to measure. Query tokens select random tokens of one shared cache."""

    op: str
    layout: str
    b: int
    s_q: int
    h_q: int
    topk: int
    s_kv: int

    @property
    def label(self) -> str:
        return f"{self.op} {self.layout} b={self.b} s_q={self.s_q} h={self.h_q} topk={self.topk}"


def _decode(b: int, h_q: int, s_q: int = 1) -> Workload:
    return Workload("decode", "v32_fp8", b, s_q, h_q, 2048, b * 32768)


# The rows of docs/performance.md; the shapes that serving GLM-5 and DeepSeek V3.2 meets, with 8
# to 32 heads on tensor-parallel ranks.
GPU_WORKLOADS = (
    _decode(128, 64),
    _decode(128, 32),
    _decode(128, 16),
    _decode(128, 8),
    _decode(32, 64),
    _decode(32, 16),
    _decode(4, 64),
    _decode(4, 16),
    _decode(64, 128),
    Workload("prefill", "bf16", 1, 4096, 64, 2048, 32768),
    Workload("prefill", "bf16", 1, 4096, 16, 2048, 32768),
)
CPU_WORKLOADS = (
    Workload("decode", "v32_fp8", 8, 1, 16, 2048, 65536),
    Workload("decode", "v32_fp8", 1, 1, 64, 2048, 65536),
    Workload("decode", "bf16", 8, 1, 16, 2048, 65536),
)


@dataclass(frozen=True)
class Data:
    """A workload's tensors on a device. For prefill, q is [s_q, h, d] and cache holds the rows."""

    workload: Workload
    q: torch.Tensor
    cache: KVCache
    indices: torch.Tensor
    scale: float


def make_cache(layout: str, tokens: int, device: torch.device) -> KVCache:
    """A packed cache of Gaussian tokens, scales amax/448."""
    page_size = 64 if layout == "v32_fp8" else 1
    cache = KVCache.empty(-(-tokens // page_size), page_size, layout, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    chunk = 1 << 19
    for start in range(0, cache.num_slots, chunk):
        slots = torch.arange(start, min(start + chunk, cache.num_slots), device=device)
        latent = torch.randn(len(slots), 512, generator=generator, device=device)
        rope = None
        if cache.layout.rope is not None:
            rope = torch.randn(len(slots), 64, generator=generator, device=device)
        cache.append(latent, rope, slots)
    return cache


def make_data(workload: Workload, cache: KVCache) -> Data:
    """Random queries and indices over `cache`."""
    device = cache.device
    generator = torch.Generator(device=device).manual_seed(1)
    d_qk = cache.layout.d_qk
    lead = (workload.b, workload.s_q) if workload.op == "decode" else (workload.s_q,)
    q = torch.randn(*lead, workload.h_q, d_qk, generator=generator, device=device)
    indices = torch.randint(
        workload.s_kv,
        (*lead, workload.topk),
        generator=generator,
        device=device,
        dtype=torch.int32,
    )
    # Three times the usual scale: softmax weights neither flat nor one-hot on Gaussian data.
    return Data(workload, q.to(torch.bfloat16), cache, indices, 3.0 * d_qk**-0.5)


def providers(data: Data) -> dict[str, Callable[[], Answer]]:
    """Who can answer the workload here: name -> a call that returns (out, lse)."""
    found: dict[str, Callable[[], Answer]] = {}
    workload = data.workload
    for backend in dispatch.available_backends(data.q.device):
        found[f"sparse_mla:{backend}"] = _ours(data, backend)
    if data.q.device.type == "cpu":
        found["torch:gather_einsum"] = lambda: gather_einsum(data)
    peer = _flash_mla(data) if data.q.device.type == "cuda" else None
    if peer is not None and workload.layout in ("v32_fp8", "bf16"):
        found["flash_mla"] = peer
    return found


def _ours(data: Data, backend: str) -> Callable[[], Answer]:
    if data.workload.op == "decode":
        return lambda: decode(data.q, data.cache, data.indices, scale=data.scale, backend=backend)

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


def _flash_mla(data: Data) -> Callable[[], Answer] | None:
    """An installed flash_mla, given what it takes: heads padded to 64 or 128 by the caller."""
    try:
        flash_mla = importlib.import_module("flash_mla")
    except ImportError:
        return None
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

    def decode_call() -> Answer:
        out, lse = flash_mla.flash_mla_with_kvcache(
            q, kv, None, None, 512, meta, None, data.scale, False, True, data.indices
        )
        return out[..., :heads, :], lse.transpose(1, 2)[..., :heads]

    return decode_call
