"""Sparse decode: every query token attends to its own list of cache slots.

Reading path: `decode` (this file) checks and dispatches; backends.py says who can run; cpu.py,
triton.py and sm90.py compute over a list of `Source`s. config.py holds the portable kernels' launch
choices; sm90.py says which of Hopper's launchers takes a call (sm90_fp8.py, sm90_expand.py, or
prefill's over bf16 rows), and each has its kernels in files of its name. docs/semantics.md is the
contract.
"""

from __future__ import annotations

import torch

from ... import arch, dispatch
from ...kv_cache import KVCache
from ...kv_layout import get_layout
from ..checks import (
    check_backend,
    check_indices,
    check_layout,
    check_main_cache,
    check_query,
    check_scale,
    check_splits,
    check_vector,
)
from ..gradients import refuse_backward
from .source import Source


def decode(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    *,
    scale: float | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_cache: KVCache | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    batch_invariant: bool = False,
    num_splits: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse MLA attention of decode queries over a paged cache.

    Args:
        q: [b, s_q, h_q, d_qk] bf16, last dim contiguous; 1 <= h_q <= 128.
        cache: the KV cache; its layout says what the bytes mean.
        indices: [b, s_q, topk] int32 slots (page * page_size + offset). Entries outside
            [0, cache.num_slots) are ignored and never loaded; repeated entries count repeatedly.
        scale: logits are scale * <q, k>; default d_qk ** -0.5.
        topk_length: [b] int32; only the first so many entries of a sequence's lists count.
        attn_sink: [h_q] float32; out is scaled by exp(lse) / (exp(lse) + exp(sink)).
        extra_cache: a second cache, attended together with the first; its layout and page size
            are its own, its d_qk and d_v the same.
        extra_indices: [b, s_q, extra_topk] int32 slots of `extra_cache`, needed with it.
        extra_topk_length: [b] int32, as `topk_length` for `extra_indices`.
        batch_invariant: a row's bits do not depend on what else is in the batch.
        num_splits: pieces that each list is cut into at most, 1 to 1024, merged afterwards; default
            chosen by shape.
        backend: "sm90", "triton" or "cpu"; default the first that supports the call (see
            `sparse-mla explain`).

    Returns:
        out [b, s_q, h_q, d_v] bf16 and lse [b, s_q, h_q] float32, the natural log of the sum of
        exponentials. A query with nothing valid gets out 0 and lse -inf.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not allowed.
        NotImplementedError: no backend, or not the named one, supports the call.
    """
    check_main_cache("cache", cache)
    check_query(q, ("b", "s_q", "h_q", "d_qk"), cache)
    b, s_q, heads, d_qk = q.shape
    check_indices(indices, (b, s_q), q)
    check_vector("topk_length", topk_length, b, torch.int32, q)
    check_vector("attn_sink", attn_sink, heads, torch.float32, q)
    _check_extra(cache, extra_cache, extra_indices, extra_topk_length, q)
    if not isinstance(batch_invariant, bool):
        raise ValueError(f"batch_invariant is {batch_invariant!r}, must be True or False")
    return torch.ops.sparse_mla.sparse_decode(
        q,
        *_parts(cache),
        indices,
        topk_length,
        attn_sink,
        check_scale(scale, d_qk),
        check_splits(num_splits),
        batch_invariant,
        check_backend("decode", backend),
        *_parts(extra_cache),
        extra_indices,
        extra_topk_length,
    )


def _check_extra(
    cache: KVCache,
    extra_cache: KVCache | None,
    extra_indices: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
    q: torch.Tensor,
) -> None:
    if extra_cache is None:
        for name, value in (
            ("extra_indices", extra_indices),
            ("extra_topk_length", extra_topk_length),
        ):
            if value is not None:
                raise ValueError(f"{name} is given, extra_cache is None")
        return
    if not isinstance(extra_cache, KVCache):
        raise ValueError(
            f"extra_cache is {type(extra_cache).__name__}, must be a sparse_mla.KVCache"
        )
    check_layout("extra_cache", extra_cache)
    main, extra = cache.layout, extra_cache.layout
    if (extra.d_qk, extra.d_v) != (main.d_qk, main.d_v):
        raise ValueError(
            f"extra_cache has layout {extra.name} with d_qk {extra.d_qk} and d_v {extra.d_v}, "
            f"cache has {main.name} with {main.d_qk} and {main.d_v}"
        )
    if extra_cache.device != q.device:
        raise ValueError(f"extra_cache is on {extra_cache.device}, q is on {q.device}")
    if extra_indices is None:
        raise ValueError("extra_indices is None, extra_cache needs them")
    check_indices(extra_indices, (q.shape[0], q.shape[1]), q, "extra_indices")
    check_vector("extra_topk_length", extra_topk_length, q.shape[0], torch.int32, q)


def _parts(
    cache: KVCache | None,
) -> tuple[torch.Tensor | None, str, int, int, torch.Tensor | None]:
    """A cache as a custom op takes it."""
    if cache is None:
        return None, "", 0, 0, None
    layout, scale = cache.layout.name, cache.tensor_scale
    return cache.pages, layout, cache.page_size, cache.token_stride, scale


@torch.library.custom_op("sparse_mla::sparse_decode", mutates_args=())
def _sparse_decode(
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
    num_splits: int,
    batch_invariant: bool,
    backend: str,
    extra_pages: torch.Tensor | None,
    extra_layout: str,
    extra_page_size: int,
    extra_token_stride: int,
    extra_tensor_scale: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = KVCache(pages, page_size, get_layout(layout), token_stride, tensor_scale)
    sources = [Source(cache, indices, topk_length)]
    if extra_pages is not None and extra_indices is not None:
        extra = KVCache(
            extra_pages,
            extra_page_size,
            get_layout(extra_layout),
            extra_token_stride,
            extra_tensor_scale,
        )
        sources.append(Source(extra, extra_indices, extra_topk_length))
    request = dispatch.Request(
        op="decode",
        layout=layout,
        heads=q.shape[2],
        tokens=q.shape[0] * q.shape[1],
        topk=indices.shape[-1],
        alignment=min(source.cache.alignment for source in sources),
        extra_layout=extra_layout,
        extra_topk=0 if extra_indices is None else extra_indices.shape[-1],
    )
    run = dispatch.choose(request, arch.of(q.device), backend or None).load()
    return run(q, sources, attn_sink, scale, num_splits, batch_invariant)


@_sparse_decode.register_fake
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
    num_splits: int,
    batch_invariant: bool,
    backend: str,
    extra_pages: torch.Tensor | None,
    extra_layout: str,
    extra_page_size: int,
    extra_token_stride: int,
    extra_tensor_scale: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:-1], get_layout(layout).d_v))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


refuse_backward(_sparse_decode, "sparse_mla.decode")
