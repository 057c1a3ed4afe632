"""FlashMLA's names, argument order, defaults, shapes and lse conventions, on our kernels.

    from sparse_mla.compat import flash_mla

Signatures follow flash_mla/flash_mla_interface.py of deepseek-ai/FlashMLA at commit 9241ae3.
Where FlashMLA asserts, these functions raise ValueError; what is not there yet raises
NotImplementedError naming the option.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kv_cache import KVCache
from ..ops.checks import check_scale
from ..ops.dense_decode.interface import dense_decode
from ..ops.sparse_decode.interface import decode
from ..ops.sparse_prefill.interface import prefill

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]


@dataclass
class FlashMLASchedMeta:
    """Accepted where FlashMLA wants its scheduling metadata.

    Nothing here influences an answer: splits are planned per call from the shapes, so an object
    reused with other lengths, or for another batch, is safe.
    """

    have_initialized: bool = False
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """A fresh metadata object and None, as FlashMLA returns. All arguments are ignored."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode over a paged cache: sparse with `indices`, dense without.

    Args:
        q: [b, s_q, h_q, 576] bf16, 1 <= h_q <= 128.
        k_cache: [num_pages, page_size, 1, 656] uint8, int8 or float8_e4m3fn with
            `is_fp8_kvcache=True` (docs/formats.md, v32_fp8), or [num_pages, page_size, 1, 576]
            bf16 without it. Any page size, padded page strides allowed. Dense mode takes bf16
            only, and [num_pages, page_size, h_kv, 576] with h_q a multiple of h_kv.
        block_table: [b, max_pages] int32, and cache_seqlens, [b] int32, in dense mode; unused in
            sparse mode, where they may be None.
        head_dim_v: 512.
        tile_scheduler_metadata: from `get_mla_metadata`; never read.
        num_splits: must be None.
        softmax_scale: default 576 ** -0.5.
        causal: query i of s_q sees the first cache_seqlens - s_q + i + 1 tokens; must be False in
            sparse mode.
        indices: [b, s_q, topk] int32 slots; None asks for dense decode, and so must be the options
            after it.
        attn_sink: [h_q] float32.
        topk_length: [b] int32.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: not there yet.

    Returns:
        out [b, s_q, h_q, 512] bf16 and lse [b, h_q, s_q] float32, natural; a query with nothing
        valid gets out 0 and lse +inf.
    """
    if num_splits is not None:
        raise ValueError(f"num_splits is {num_splits!r}, must be None")
    if indices is None:
        sparse = {
            "attn_sink": attn_sink,
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
        }
        for name, value in sparse.items():
            if value is not None:
                raise ValueError(f"{name} is given, must be None when indices is None")
        _check_head_dim_v("head_dim_v", head_dim_v)
        return _dense(q, k_cache, block_table, cache_seqlens, softmax_scale, causal, is_fp8_kvcache)
    if causal:
        raise ValueError("causal is True, must be False when indices are given")
    for name, value in (
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices_in_kvcache),
        ("extra_topk_length", extra_topk_length),
    ):
        if value is not None:
            raise NotImplementedError(f"{name} is not supported yet")
    _check_head_dim_v("head_dim_v", head_dim_v)
    _check_tensor("q", q, 4)
    _check_tensor("k_cache", k_cache, 4)
    if softmax_scale is not None:
        check_scale(softmax_scale, 576, "softmax_scale")
    if q.shape[-1] == 512 and is_fp8_kvcache:
        raise NotImplementedError(
            "q has d_qk 512 with an FP8 cache: layout v4_fp8 is not supported yet"
        )
    try:
        cache = KVCache.from_tensor(k_cache, "v32_fp8" if is_fp8_kvcache else _bf16_layout(k_cache))
    except ValueError as error:
        raise ValueError(f"k_cache: {error}") from error
    out, lse = decode(
        q, cache, indices, scale=softmax_scale, topk_length=topk_length, attn_sink=attn_sink
    )
    return out, _empty_as_plus_inf(lse).transpose(1, 2)


def _dense(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    is_fp8_kvcache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense decode, one KV head after another."""
    if is_fp8_kvcache:
        raise NotImplementedError("is_fp8_kvcache is True: dense decode takes a bf16 cache only")
    _check_tensor("q", q, 4)
    _check_tensor("k_cache", k_cache, 4)
    if block_table is None or cache_seqlens is None:
        name = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{name} is None, must be a tensor when indices is None")
    if softmax_scale is not None:
        check_scale(softmax_scale, q.shape[-1], "softmax_scale")
    kv_heads, heads = k_cache.shape[2], q.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k_cache has {kv_heads} heads, q has {heads}, must be a multiple")
    layout, group = _bf16_layout(k_cache), heads // kv_heads
    parts = []
    for i in range(kv_heads):
        try:
            cache = KVCache.from_tensor(k_cache[:, :, i : i + 1], layout)
        except ValueError as error:
            raise ValueError(f"k_cache: {error}") from error
        own = q[:, :, i * group : (i + 1) * group]
        parts.append(
            dense_decode(own, cache, block_table, cache_seqlens, scale=softmax_scale, causal=causal)
        )
    outs, sums = zip(*parts, strict=True)
    out = outs[0] if kv_heads == 1 else torch.cat(outs, dim=2)
    lse = sums[0] if kv_heads == 1 else torch.cat(sums, dim=2)
    return out, _empty_as_plus_inf(lse).transpose(1, 2)


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill over bf16 rows.

    Args:
        q: [s_q, h_q, d_qk] bf16, d_qk 576 or 512.
        kv: [s_kv, 1, d_qk] bf16.
        indices: [s_q, 1, topk] int32; entries < 0 or >= s_kv are ignored.
        sm_scale: the softmax scale.
        d_v: 512.
        attn_sink: [h_q] float32.
        topk_length: [s_q] int32.

    Returns:
        out [s_q, h_q, 512] bf16, max_logits and lse [s_q, h_q] float32, natural; a query with
        nothing valid gets out 0, max_logits -inf and lse +inf.
    """
    _check_head_dim_v("d_v", d_v)
    _check_tensor("q", q, 3)
    _check_tensor("kv", kv, 3)
    _check_tensor("indices", indices, 3)
    if indices.shape[1] != 1:
        raise ValueError(f"indices has shape {tuple(indices.shape)}, must be [s_q, 1, topk]")
    if sm_scale is None:
        raise ValueError("sm_scale is None, must be a finite number")
    check_scale(sm_scale, 576, "sm_scale")
    out, max_logits, lse = prefill(
        q, kv, indices, scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink
    )
    return out, max_logits, _empty_as_plus_inf(lse)


def _check_tensor(name: str, value: torch.Tensor, dims: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dim() != dims:
        given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} is {given}, must be a tensor with {dims} dims")


def _check_head_dim_v(name: str, value: int) -> None:
    if value != 512:
        raise ValueError(f"{name} is {value}, must be 512")


def _bf16_layout(k_cache: torch.Tensor) -> str:
    if k_cache.dtype != torch.bfloat16:
        raise ValueError(
            f"dtype is {k_cache.dtype}, must be torch.bfloat16 when is_fp8_kvcache is False"
        )
    if k_cache.shape[-1] not in (576, 512):
        raise ValueError(f"shape is {tuple(k_cache.shape)}, the width must be 576 or 512")
    return "bf16" if k_cache.shape[-1] == 576 else "bf16_nope"


def _empty_as_plus_inf(lse: torch.Tensor) -> torch.Tensor:
    return torch.where(lse == float("-inf"), float("inf"), lse)
