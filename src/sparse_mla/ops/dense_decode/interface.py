"""Dense decode: every query token attends to all tokens of its sequence.

Reading path: `dense_decode` (this file) checks and dispatches; backends.py says who can run;
cpu.py, triton.py and sm90.py compute. docs/semantics.md is the contract.
"""

from __future__ import annotations

import torch

from ... import arch, dispatch
from ...kv_cache import KVCache
from ...kv_layout import get_layout
from ..checks import (
    check_backend,
    check_main_cache,
    check_query,
    check_scale,
    check_splits,
    check_vector,
)
from ..gradients import refuse_backward


def dense_decode(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    num_splits: int | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA attention of decode queries over all tokens of their sequences in a paged cache.

    Args:
        q: [b, s_q, h_q, d_qk] bf16, last dim contiguous; 1 <= h_q <= 128.
        cache: the KV cache; its layout says what the bytes mean.
        block_table: [b, max_pages] int32, each sequence's pages in order, last dim contiguous.
            Entries past a sequence's pages are never read. Tokens of a page that the cache does
            not have (outside [0, cache.num_pages)) count as absent and are never loaded.
        cache_seqlens: [b] int32, tokens of each sequence, with the query tokens where these are
            in the cache. At most max_pages * page_size count; less than 0 is 0.
        scale: logits are scale * <q, k>; default d_qk ** -0.5.
        causal: query i of s_q sees the first cache_seqlens - s_q + i + 1 tokens instead of all.
        num_splits: pieces that each sequence is cut into at most, 1 to 1024 (on Hopper no more
            than 64), merged afterwards; default: all tokens of the batch are shared out evenly.
        batch_invariant: a row's bits do not depend on what else is in the batch.
        backend: "sm90", "triton" or "cpu"; default the first that supports the call.

    Returns:
        out [b, s_q, h_q, d_v] bf16 and lse [b, s_q, h_q] float32, the natural log of the sum of
        exponentials. A query that sees nothing gets out 0 and lse -inf.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not allowed.
        NotImplementedError: no backend, or not the named one, supports the call.
    """
    check_main_cache("cache", cache)
    check_query(q, ("b", "s_q", "h_q", "d_qk"), cache)
    _check_block_table(block_table, q)
    if cache_seqlens is None:
        raise ValueError("cache_seqlens is None, must be a tensor [b] int32")
    check_vector("cache_seqlens", cache_seqlens, q.shape[0], torch.int32, q)
    for name, value in (("causal", causal), ("batch_invariant", batch_invariant)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, must be True or False")
    return torch.ops.sparse_mla.dense_decode(
        q,
        cache.pages,
        cache.layout.name,
        cache.page_size,
        cache.token_stride,
        cache.tensor_scale,
        block_table,
        cache_seqlens,
        check_scale(scale, q.shape[-1]),
        causal,
        check_splits(num_splits),
        batch_invariant,
        check_backend("dense_decode", backend),
    )


def _check_block_table(block_table: torch.Tensor, q: torch.Tensor) -> None:
    """block_table is int32 [b, max_pages] on q's device with a contiguous last dim."""
    if not isinstance(block_table, torch.Tensor) or block_table.dim() != 2:
        tensor = isinstance(block_table, torch.Tensor)
        given = tuple(block_table.shape) if tensor else type(block_table).__name__
        raise ValueError(f"block_table is {given}, must be a tensor [b, max_pages]")
    if block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table is {tuple(block_table.shape)}, q has {q.shape[0]} sequences")
    if block_table.dtype != torch.int32:
        raise ValueError(f"block_table has dtype {block_table.dtype}, must be torch.int32")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(
            f"block_table has strides {block_table.stride()}, the last dim must be contiguous"
        )
    if block_table.device != q.device:
        raise ValueError(f"block_table is on {block_table.device}, q is on {q.device}")


@torch.library.custom_op("sparse_mla::dense_decode", mutates_args=())
def _dense_decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    layout: str,
    page_size: int,
    token_stride: int,
    tensor_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    num_splits: int,
    batch_invariant: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = KVCache(pages, page_size, get_layout(layout), token_stride, tensor_scale)
    request = dispatch.Request(
        op="dense_decode",
        layout=layout,
        heads=q.shape[2],
        tokens=q.shape[0] * q.shape[1],
        topk=block_table.shape[1] * page_size,
        alignment=cache.alignment,
    )
    run = dispatch.choose(request, arch.of(q.device), backend or None).load()
    return run(q, cache, block_table, cache_seqlens, scale, causal, num_splits, batch_invariant)


@_dense_decode.register_fake
def _(
    q: torch.Tensor,
    pages: torch.Tensor,
    layout: str,
    page_size: int,
    token_stride: int,
    tensor_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    num_splits: int,
    batch_invariant: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:-1], get_layout(layout).d_v))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


refuse_backward(_dense_decode, "sparse_mla.dense_decode")
