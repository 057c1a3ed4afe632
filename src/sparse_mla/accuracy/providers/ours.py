"""Our backends, through the public functions of whichever sparse_mla is importable."""

from __future__ import annotations

from typing import Any

from ...arch import Arch
from ..case import Implementation, Inputs, NotOffered, Output, WriteInputs
from .base import bf16_rows

TITLE = "this library's backends"
PACKAGE = "sparse_mla"
DISTRIBUTIONS = ("sparse-mla",)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Backend:
    """A backend of this library, through its public functions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.architectures = {"cpu": ("cpu",), "sm90": ("sm_90",)}.get(name, ARCHITECTURES)

    def new_state(self) -> None:
        return None

    def run(self, inputs: Inputs, state: Any) -> Output:
        import sparse_mla

        cache = _theirs(inputs.cache)
        if inputs.op == "decode":
            out, lse = sparse_mla.decode(
                inputs.q,
                cache,
                inputs.indices,
                scale=inputs.scale,
                topk_length=inputs.topk_length,
                attn_sink=inputs.attn_sink,
                extra_cache=None if inputs.extra_cache is None else _theirs(inputs.extra_cache),
                extra_indices=inputs.extra_indices,
                extra_topk_length=inputs.extra_topk_length,
                backend=self.name,
            )
            return Output(out, lse)
        if inputs.op == "dense_decode":
            if not hasattr(sparse_mla, "dense_decode"):  # an older version
                raise NotOffered(inputs.op)
            if inputs.block_table is None or inputs.cache_seqlens is None:
                raise ValueError("a dense call without block_table or cache_seqlens")
            out, lse = sparse_mla.dense_decode(
                inputs.q,
                cache,
                inputs.block_table,
                inputs.cache_seqlens,
                scale=inputs.scale,
                causal=inputs.causal,
                backend=self.name,
            )
            return Output(out, lse)
        kv = bf16_rows(inputs)
        out, max_logits, lse = sparse_mla.prefill(
            inputs.q,
            cache if kv is None else kv,
            inputs.indices,
            scale=inputs.scale,
            topk_length=inputs.topk_length,
            attn_sink=inputs.attn_sink,
            backend=self.name,
        )
        return Output(out, lse, max_logits)

    def write(self, inputs: WriteInputs) -> None:
        _theirs(inputs.cache).append(
            inputs.latent, inputs.rope, inputs.slots, scale_rounding=inputs.scale_rounding
        )


def _theirs(cache: Any) -> Any:
    """The cache as that library's own class: in another process it may be another version's."""
    import sparse_mla

    if isinstance(cache, sparse_mla.KVCache):
        return cache
    layout = sparse_mla.LAYOUTS.get(cache.layout.name)
    if layout is None:
        raise NotOffered(f"layout {cache.layout.name}")
    given: list[Any] = [cache.pages, cache.page_size, layout, cache.token_stride]
    if cache.tensor_scale is not None:  # older versions have no place for it
        given.append(cache.tensor_scale)
    return sparse_mla.KVCache(*given)


def load(name: str) -> Implementation:
    """`sparse_mla:triton` or `triton` is that backend, `sparse_mla` the best one here."""
    import sparse_mla

    backend = name.removeprefix("sparse_mla").removeprefix(":")
    available = sparse_mla.dispatch.available_backends()
    if not backend:
        backend = available[0]
    if backend not in (*available, "cpu"):
        raise NotOffered(
            f"backend {backend!r} does not run here; available: {', '.join(available)}"
        )
    return Backend(backend)


def supports(provider: Backend | None, op: str, layout: str, machine: Arch) -> tuple[bool, str]:
    if op == "kv_write":
        return True, "KVCache.append"
    import sparse_mla

    request = sparse_mla.dispatch.Request(op, layout, 64)
    answers = sparse_mla.dispatch.explain(request, machine)
    named = [a for a in answers if provider is None or a.backend == provider.name]
    if provider is not None and named:
        return named[0].ok, named[0].reason
    for answer in named:
        if answer.ok:
            return True, f"{answer.backend}: {answer.reason}"
    return False, "; ".join(f"{a.backend}: {a.reason}" for a in named) or f"no backend for {op}"
