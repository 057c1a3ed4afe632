"""Sparse prefill: a run of query tokens attends to selected rows of one KV buffer.

Reading path: `prefill` (this file) checks and dispatches; backends.py says who can run; cpu.py and
triton.py compute with the kernels of sparse_decode, sm90.py with its own over bf16 rows and with
sparse_decode's over other caches. docs/semantics.md is the contract.
"""

from __future__ import annotations

import torch

from ... import arch, dispatch
from ...kv_cache import KVCache
from ...kv_layout import get_layout
from ..checks import (
    check_backend,
    check_indices,
    check_main_cache,
    check_query,
    check_scale,
    check_vector,
)
from ..gradients import refuse_backward

_BF16_LAYOUTS = {576: "bf16", 512: "bf16_nope"}


def prefill(
    q: torch.Tensor,
    kv: torch.Tensor | KVCache,
    indices: torch.Tensor,
    *,
    scale: float | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse MLA attention of prefill queries.

    Args:
        q: [s_q, h_q, d_qk] bf16, last dim contiguous; 1 <= h_q <= 128.
        kv: [s_kv, d_qk] or [s_kv, 1, d_qk] bf16 rows (values are the first 512 entries), or a
            KVCache of any layout that is not `extra_only`.
        indices: [s_q, topk] or [s_q, 1, topk] int32 rows of `kv`; entries outside it are ignored
            and never loaded, repeated entries count repeatedly.
        scale: logits are scale * <q, k>; default d_qk ** -0.5.
        topk_length: [s_q] int32; only the first so many entries of a query's list count.
        attn_sink: [h_q] float32; out is scaled by exp(lse) / (exp(lse) + exp(sink)).
        backend: "sm90", "triton" or "cpu"; default the first that supports the call.

    Returns:
        out [s_q, h_q, d_v] bf16, max_logits [s_q, h_q] float32 and lse [s_q, h_q] float32, both
        natural. A query with nothing valid gets out 0, max_logits -inf and lse -inf.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not allowed.
        NotImplementedError: no backend, or not the named one, supports the call.
    """
    cache = kv if isinstance(kv, KVCache) else rows_as_cache(kv)
    check_main_cache("kv", cache)
    check_query(q, ("s_q", "h_q", "d_qk"), cache)
    s_q, heads, d_qk = q.shape
    if isinstance(indices, torch.Tensor) and indices.dim() == 3 and indices.shape[1] == 1:
        indices = indices[:, 0]
    check_indices(indices, (s_q,), q)
    check_vector("topk_length", topk_length, s_q, torch.int32, q)
    check_vector("attn_sink", attn_sink, heads, torch.float32, q)
    return torch.ops.sparse_mla.sparse_prefill(
        q,
        cache.pages,
        cache.layout.name,
        cache.page_size,
        cache.token_stride,
        cache.tensor_scale,
        indices,
        topk_length,
        attn_sink,
        check_scale(scale, d_qk),
        check_backend("prefill", backend),
    )


def rows_as_cache(kv: torch.Tensor) -> KVCache:
    """bf16 rows [s_kv, d_qk] or [s_kv, 1, d_qk] as a cache with one token per page, no copy."""
    if not isinstance(kv, torch.Tensor) or kv.dim() not in (2, 3):
        given = tuple(kv.shape) if isinstance(kv, torch.Tensor) else type(kv).__name__
        raise ValueError(f"kv is {given}, must be a KVCache or a tensor [s_kv, (1,) d_qk]")
    if kv.dtype != torch.bfloat16:
        raise ValueError(f"kv has dtype {kv.dtype}, must be torch.bfloat16")
    if kv.dim() == 3 and kv.shape[1] != 1:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, dim 1 (KV heads) must be 1")
    if kv.shape[-1] not in _BF16_LAYOUTS:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, d_qk must be 576 or 512")
    rows = kv if kv.dim() == 3 else kv.unsqueeze(1)
    try:
        return KVCache.from_tensor(rows, _BF16_LAYOUTS[kv.shape[-1]])
    except ValueError as error:
        raise ValueError(f"kv: {error}") from error


@torch.library.custom_op("sparse_mla::sparse_prefill", mutates_args=())
def _sparse_prefill(
    q: torch.Tensor,
    pages: torch.Tensor,
    layout: str,
    page_size: int,
    token_stride: int,
    tensor_scale: torch.Tensor | None,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cache = KVCache(pages, page_size, get_layout(layout), token_stride, tensor_scale)
    request = dispatch.Request(
        op="prefill",
        layout=layout,
        heads=q.shape[1],
        tokens=q.shape[0],
        topk=indices.shape[-1],
        alignment=cache.alignment,
    )
    run = dispatch.choose(request, arch.of(q.device), backend or None).load()
    return run(q, cache, indices, topk_length, attn_sink, scale)


@_sparse_prefill.register_fake
def _(
    q: torch.Tensor,
    pages: torch.Tensor,
    layout: str,
    page_size: int,
    token_stride: int,
    tensor_scale: torch.Tensor | None,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:-1], get_layout(layout).d_v))
    rows = q.shape[:-1]
    return out, q.new_empty(rows, dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)


refuse_backward(_sparse_prefill, "sparse_mla.prefill")
