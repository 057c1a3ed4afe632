"""The vocabulary of the gate: what an implementation is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kv_cache import KVCache


class NotOffered(Exception):
    """An implementation lacks an op, layout or option, and says so. Never counted as passed."""


class Crashed(Exception):
    """What ran the implementation is gone: its process, or its CUDA context."""


class Hung(Exception):
    """The implementation did not answer within its time limit."""


class Raised(Exception):
    """An exception of an implementation in another process; its text begins with the type."""


@dataclass(frozen=True)
class Inputs:
    """One call of attention.

    Shapes for op "decode": q [b, s_q, h_q, d_qk], indices [b, s_q, topk], lengths [b].
    For op "prefill": q [s_q, h_q, d_qk], indices [s_q, topk], lengths [s_q]; the cache holds
    bf16 rows with page size 1. attn_sink is [h_q] float32 in both.
    For op "dense_decode": q as for "decode", block_table [b, pages] and cache_seqlens [b] int32;
    indices [b, s_q, T] is what they amount to, for the oracle, and not given to implementations.
    `contents` pairs buffers, which calls of a case may share, with what they hold in this call:
    `refill` puts it there, and whoever makes the call or asks the oracle does that first.
    """

    op: str
    q: torch.Tensor
    cache: KVCache
    indices: torch.Tensor
    scale: float
    topk_length: torch.Tensor | None = None
    attn_sink: torch.Tensor | None = None
    extra_cache: KVCache | None = None
    extra_indices: torch.Tensor | None = None
    extra_topk_length: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | None = None
    causal: bool = False
    contents: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def refill(self) -> None:
        """Put this call's contents into its buffers."""
        for buffer, held in self.contents:
            buffer.copy_(held)

    @property
    def queries(self) -> int:
        """Query tokens that share a sequence, and with it a length."""
        return 1 if self.op == "prefill" else self.q.shape[1]


@dataclass(frozen=True)
class WriteInputs:
    """One call of the cache writer (op "kv_write"): `KVCache.append` with these arguments.

    `cache` holds the bytes before the call; the writer changes them in place.
    """

    cache: KVCache
    latent: torch.Tensor
    rope: torch.Tensor | None
    slots: torch.Tensor
    scale_rounding: str = "amax"
    op: str = "kv_write"


@dataclass(frozen=True)
class Output:
    """What an implementation answered: out and lse shaped as the op says.

    lse is [b, s_q, h_q] or [s_q, h_q], None from kernels that have none; `empty_lse` is the value
    that the implementation's convention gives a row with nothing valid: -inf for ours, +inf for
    FlashMLA's entry points.
    `padded` says what the adapter had to pad, as engines do, because the implementation refuses
    the shape as it is ("heads", "topk"), and `note` tells it to a reader. `changed` names an input
    that the call changed, where only the process that ran it can see that.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    max_logits: torch.Tensor | None = None
    empty_lse: float = float("-inf")
    padded: tuple[str, ...] = ()
    note: str = ""
    changed: str = ""


class Implementation(Protocol):
    """Anything that the gate can put on trial: a backend of ours, a peer's module, a fault."""

    name: str

    def new_state(self) -> Any:
        """What one caller keeps between calls (FlashMLA's scheduling metadata), fresh."""
        ...

    def run(self, inputs: Inputs, state: Any) -> Output:
        """Answer one attention call; raise NotOffered where the implementation lacks it."""
        ...

    def write(self, inputs: WriteInputs) -> None:
        """Write to the cache in place; raise NotOffered where the implementation has no writer."""
        ...


@dataclass(frozen=True)
class Case:
    """One entry of the catalogue.

    Attributes:
        name: unique, stable; shown in tables.
        op: "decode", "prefill", "dense_decode" or "kv_write".
        about: what the input is and which failure it shows, one line.
        shows: names of the faults that this case is there to catch.
        build: (seed, device) -> the calls, in order; they share one implementation state, so a
            case about stale metadata is simply two calls.
        repeats: how often the calls are repeated to see bits move.
        quick: part of `--quick`.
    """

    name: str
    op: str
    about: str
    shows: tuple[str, ...]
    build: Callable[[int, torch.device], list[Inputs] | list[WriteInputs]]
    repeats: int = 1
    quick: bool = False
