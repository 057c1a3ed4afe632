"""Argument checks that the attention ops share. Shapes, dtypes and devices only: no sync."""

from __future__ import annotations

import torch

from .. import dispatch
from ..kv_cache import KVCache

MAX_HEADS = 128


def check_main_cache(name: str, cache: KVCache) -> None:
    """A KVCache whose layout may stand alone."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"{name} is {type(cache).__name__}, must be a sparse_mla.KVCache")
    if cache.layout.extra_only:
        raise ValueError(
            f"{name} has layout {cache.layout.name}, which models use for an extra cache beside "
            "another one only"
        )


def check_query(q: torch.Tensor, dims: tuple[str, ...], cache: KVCache) -> None:
    """q has the named dims, bf16, contiguous last dim, and the width that the layout wants."""
    shape = f"[{', '.join(dims)}]"
    if not isinstance(q, torch.Tensor) or q.dim() != len(dims):
        given = tuple(q.shape) if isinstance(q, torch.Tensor) else type(q).__name__
        raise ValueError(f"q is {given}, must be a tensor {shape}")
    if q.dtype != torch.bfloat16:
        raise ValueError(f"q has dtype {q.dtype}, must be torch.bfloat16")
    if q.shape[-1] != cache.layout.d_qk:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, layout {cache.layout.name} has d_qk {cache.layout.d_qk}"
        )
    if not 1 <= q.shape[-2] <= MAX_HEADS:
        raise ValueError(f"q has {q.shape[-2]} heads, must be 1..{MAX_HEADS}")
    if q.stride(-1) != 1:
        raise ValueError(f"q has strides {q.stride()}, the last dim must be contiguous")
    if q.device != cache.device:
        raise ValueError(f"q is on {q.device}, the cache is on {cache.device}")


def check_indices(
    indices: torch.Tensor, lead: tuple[int, ...], q: torch.Tensor, name: str = "indices"
) -> None:
    """indices is int32 [*lead, topk] on q's device with a contiguous last dim."""
    if not isinstance(indices, torch.Tensor):
        raise ValueError(f"{name} is {type(indices).__name__}, must be a tensor {_lists(lead)}")
    if indices.dim() != len(lead) + 1 or tuple(indices.shape[:-1]) != lead:
        raise ValueError(f"{name} is {tuple(indices.shape)}, must be a tensor {_lists(lead)}")
    if indices.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {indices.dtype}, must be torch.int32")
    if indices.shape[-1] > 1 and indices.stride(-1) != 1:
        raise ValueError(f"{name} has strides {indices.stride()}, the last dim must be contiguous")
    if indices.device != q.device:
        raise ValueError(f"{name} is on {indices.device}, q is on {q.device}")


def _lists(lead: tuple[int, ...]) -> str:
    # Only for messages: sizes are symbols while torch.compile traces, and str() of one fails.
    return f"[{', '.join(str(n) for n in lead)}, topk]"


def check_vector(
    name: str, vector: torch.Tensor | None, length: int, dtype: torch.dtype, q: torch.Tensor
) -> None:
    """An optional 1-D contiguous tensor of that length and dtype on q's device."""
    if vector is None:
        return
    if not isinstance(vector, torch.Tensor) or tuple(vector.shape) != (length,):
        given = tuple(vector.shape) if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise ValueError(f"{name} is {given}, must be a tensor [{length}]")
    if vector.dtype != dtype:
        raise ValueError(f"{name} has dtype {vector.dtype}, must be {dtype}")
    if not vector.is_contiguous():
        raise ValueError(f"{name} has strides {vector.stride()}, must be contiguous")
    if vector.device != q.device:
        raise ValueError(f"{name} is on {vector.device}, q is on {q.device}")


def check_scale(scale: float | None, d_qk: int, name: str = "scale") -> float:
    """The softmax scale, d_qk ** -0.5 by default; must be finite in float32."""
    if scale is None:
        return float(d_qk) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{name} is {scale!r}, must be a finite number")
    if not abs(scale) <= torch.finfo(torch.float32).max:  # also NaN
        raise ValueError(f"{name} is {scale!r}, must be a finite number in float32")
    return float(scale)


def check_backend(op: str, backend: str | None) -> str:
    """The backend's name as the custom ops take it: "" asks for the best one."""
    names = [b.name for b in dispatch.backends_of(op)]
    if backend is not None and backend not in names:
        raise ValueError(f"backend is {backend!r}, {op} has: {', '.join(names)}")
    return backend or ""
