"""FlashMLA's names, argument order, defaults, shapes and lse conventions, on our kernels.

    from sparse_mla.compat import flash_mla

`install()` puts it where `import flash_mla` and the engines' own names for it find it.

Signatures follow flash_mla/flash_mla_interface.py of deepseek-ai/FlashMLA at commit 9241ae3.
Where FlashMLA asserts, these functions raise ValueError; what is not there yet raises
NotImplementedError naming the option. Keyword-only arguments are ours: FlashMLA tells its two FP8
layouts apart by q's width, and the layouts it does not know need a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch

from ..kv_cache import KVCache
from ..kv_layout import LAYOUTS
from ..ops.checks import check_scale
from ..ops.dense_decode.interface import dense_decode
from ..ops.sparse_decode.interface import decode
from ..ops.sparse_prefill.interface import prefill
from .install import install, uninstall

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "install",
    "uninstall",
]


@dataclass
class FlashMLASchedMeta:
    """Accepted where FlashMLA wants its scheduling metadata.

    Nothing here influences an answer: splits are planned per call from the shapes, so an object
    reused with other lengths, or for another batch, is safe.
    """

    have_initialized: bool = False
    config: object | None = None
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
    *,
    kv_format: str | None = None,
    extra_kv_format: str | None = None,
    kv_scale: torch.Tensor | None = None,
    extra_kv_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode over a paged cache: sparse with `indices`, dense without.

    Args:
        q: [b, s_q, h_q, 576 or 512] bf16, 1 <= h_q <= 128.
        k_cache: [num_pages, page_size, 1, bytes per token] uint8, int8 or float8_e4m3fn with
            `is_fp8_kvcache=True`: 656 bytes where q is 576 wide (docs/formats.md, v32_fp8), 584
            where it is 512 wide (v4_fp8); or [num_pages, page_size, 1, 576 or 512] bf16 without
            it. Any page size, padded page strides allowed. In dense mode also
            [num_pages, page_size, h_kv, ...] with h_q a multiple of h_kv.
        block_table: [b, max_pages] int32, and cache_seqlens, [b] int32, in dense mode; unused in
            sparse mode, where they may be None.
        head_dim_v: 512.
        tile_scheduler_metadata: from `get_mla_metadata`; never read.
        num_splits: must be None.
        softmax_scale: default q's width ** -0.5.
        causal: query i of s_q sees the first cache_seqlens - s_q + i + 1 tokens; must be False in
            sparse mode.
        indices: [b, s_q, topk] int32 slots; None asks for dense decode, and so must be the options
            after it.
        attn_sink: [h_q] float32.
        topk_length: [b] int32.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: a second cache, attended
            together with the first; its indices are [b, s_q, extra_topk].
        kv_format, extra_kv_format: name of a cache's layout (docs/formats.md), needed where
            FlashMLA's rule above does not say it. The extra cache's is the first one's by default.
        kv_scale, extra_kv_scale: [1] float32, for layouts with a scale of the whole tensor.

    Returns:
        out [b, s_q, h_q, 512] bf16 and lse [b, h_q, s_q] float32, natural; a query with nothing
        valid gets out 0 and lse +inf.
    """
    if num_splits is not None:
        raise ValueError(f"num_splits is {num_splits!r}, must be None")
    _check_flag("causal", causal)
    _check_flag("is_fp8_kvcache", is_fp8_kvcache)
    if indices is None:
        sparse = {
            "attn_sink": attn_sink,
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
            "extra_kv_format": extra_kv_format,
            "extra_kv_scale": extra_kv_scale,
        }
        for name, value in sparse.items():
            if value is not None:
                raise ValueError(f"{name} is given, must be None when indices is None")
        _check_head_dim_v("head_dim_v", head_dim_v)
        _check_tensor("q", q, 4)
        _check_tensor("k_cache", k_cache, 4)
        heads = [
            _cache(
                "k_cache",
                k_cache[:, :, i : i + 1],
                q.shape[-1],
                is_fp8_kvcache,
                kv_format,
                kv_scale,
            )
            for i in range(k_cache.shape[2])
        ]
        return _dense(q, heads, block_table, cache_seqlens, softmax_scale, causal)
    if causal:
        raise ValueError("causal is True, must be False when indices are given")
    _check_head_dim_v("head_dim_v", head_dim_v)
    _check_tensor("q", q, 4)
    _check_tensor("k_cache", k_cache, 4)
    if softmax_scale is not None:
        check_scale(softmax_scale, q.shape[-1], "softmax_scale")
    width = q.shape[-1]
    cache = _cache("k_cache", k_cache, width, is_fp8_kvcache, kv_format, kv_scale)
    extra_cache = None
    if extra_k_cache is None:
        for name, value in (
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
            ("extra_topk_length", extra_topk_length),
            ("extra_kv_format", extra_kv_format),
            ("extra_kv_scale", extra_kv_scale),
        ):
            if value is not None:
                raise ValueError(f"{name} is given, extra_k_cache is None")
    else:
        _check_tensor("extra_k_cache", extra_k_cache, 4)
        extra_cache = _cache(
            "extra_k_cache",
            extra_k_cache,
            width,
            is_fp8_kvcache,
            kv_format if extra_kv_format is None else extra_kv_format,
            extra_kv_scale,
        )
    out, lse = decode(
        q,
        cache,
        indices,
        scale=softmax_scale,
        topk_length=topk_length,
        attn_sink=attn_sink,
        extra_cache=extra_cache,
        extra_indices=extra_indices_in_kvcache,
        extra_topk_length=extra_topk_length,
    )
    return out, _empty_as_plus_inf(lse).transpose(1, 2)


def _dense(
    q: torch.Tensor,
    caches: list[KVCache],
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense decode, one KV head after another; each serves as many query heads."""
    if block_table is None or cache_seqlens is None:
        name = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{name} is None, must be a tensor when indices is None")
    if softmax_scale is not None:
        check_scale(softmax_scale, q.shape[-1], "softmax_scale")
    if not caches or q.shape[2] % len(caches):
        raise ValueError(
            f"k_cache has {len(caches)} heads, q has {q.shape[2]}, which must be a multiple"
        )
    group = q.shape[2] // len(caches)
    parts = [
        dense_decode(
            q[:, :, i * group : (i + 1) * group],
            cache,
            block_table,
            cache_seqlens,
            scale=softmax_scale,
            causal=causal,
        )
        for i, cache in enumerate(caches)
    ]
    outs, sums = zip(*parts, strict=True)
    out = outs[0] if len(caches) == 1 else torch.cat(outs, dim=2)
    lse = sums[0] if len(caches) == 1 else torch.cat(sums, dim=2)
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


def flash_attn_varlen_func(*args: object, **kwargs: object) -> object:
    """FlashMLA's dense attention with forward and backward, for its SM100; not offered here."""
    raise NotImplementedError(_NO_VARLEN.format("flash_attn_varlen_func"))


def flash_attn_varlen_qkvpacked_func(*args: object, **kwargs: object) -> object:
    """See `flash_attn_varlen_func`."""
    raise NotImplementedError(_NO_VARLEN.format("flash_attn_varlen_qkvpacked_func"))


def flash_attn_varlen_kvpacked_func(*args: object, **kwargs: object) -> object:
    """See `flash_attn_varlen_func`."""
    raise NotImplementedError(_NO_VARLEN.format("flash_attn_varlen_kvpacked_func"))


_NO_VARLEN = (
    "{} is FlashMLA's dense multi-head attention, which this package does not offer: "
    "torch.nn.functional.scaled_dot_product_attention or flash-attn has it"
)


def _check_tensor(name: str, value: torch.Tensor, dims: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dim() != dims:
        given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} is {given}, must be a tensor with {dims} dims")


def _check_head_dim_v(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value != 512:
        raise ValueError(f"{name} is {value!r}, must be 512")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, must be True or False")


# FlashMLA's rule for FP8 caches: q's width -> layout.
_FP8_LAYOUTS = {576: "v32_fp8", 512: "v4_fp8"}


def _cache(
    name: str,
    tensor: torch.Tensor,
    width: int,
    quantised: bool,
    layout: str | None,
    scale: torch.Tensor | None,
) -> KVCache:
    """The cache argument `name` in the named layout, or in the one that FlashMLA's rule says."""
    try:
        if layout is None:
            layout = _fp8_layout(tensor, width) if quantised else _bf16_layout(tensor)
        return KVCache.from_tensor(tensor, layout, tensor_scale=scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _fp8_layout(tensor: torch.Tensor, width: int) -> str:
    if width not in _FP8_LAYOUTS:
        raise ValueError(f"q is {width} wide, must be 576 or 512 where kv_format is None")
    expected = _FP8_LAYOUTS[width]
    given = tensor.shape[-1]
    if given != LAYOUTS[expected].bytes_per_token:
        fitting = [
            layout.name
            for layout in LAYOUTS.values()
            if layout.quantised and given in (layout.bytes_per_token, *layout.wide_rows)
        ]
        raise ValueError(
            f"{given} bytes per token, {expected} has {LAYOUTS[expected].bytes_per_token}; "
            f"layouts with {given}: {', '.join(fitting) or 'none'}. Name one by kv_format"
        )
    return expected


def _bf16_layout(k_cache: torch.Tensor) -> str:
    if k_cache.dtype != torch.bfloat16:
        raise ValueError(
            f"dtype is {k_cache.dtype}, must be torch.bfloat16 when is_fp8_kvcache is False"
        )
    if k_cache.shape[-1] not in (576, 512):
        raise ValueError(f"shape is {tuple(k_cache.shape)}, the width must be 576 or 512")
    return "bf16" if k_cache.shape[-1] == 576 else "bf16_nope"


def _empty_as_plus_inf(lse: torch.Tensor) -> torch.Tensor:
    values = {"nan": float("nan"), "posinf": float("inf"), "neginf": float("inf")}
    if lse.requires_grad:
        return lse.nan_to_num(**values)
    # In place, on a tensor that nobody else has, and one kernel instead of two.
    return lse.nan_to_num_(**values)
