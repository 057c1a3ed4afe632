"""Which backend answers a call, and why the others do not.

Every op lists its backends in order of preference. A backend answers (ok, reason) for a request
on a machine; the first that says ok runs. A backend that is asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import arch as arch_module
from .arch import Arch

OPS = ("decode", "prefill", "dense_decode", "kv_write")


@dataclass(frozen=True)
class Request:
    """The facts of a call that decide where it can run: nothing that needs a device sync.

    Attributes:
        op: one of OPS.
        layout: name of the cache's layout.
        heads: query heads.
        tokens: query tokens (b * s_q).
        topk: length of the index lists; for dense decode, tokens that the block table reaches.
        options: names of the optional arguments that were given.
        alignment: bytes; the largest power of two up to 16 that divides the cache's address, page
            stride and token stride; of both caches where there are two.
        extra_layout: name of the extra cache's layout; "" where there is none.
        extra_topk: length of its index lists.
    """

    op: str
    layout: str
    heads: int
    tokens: int = 1
    topk: int = 2048
    options: frozenset[str] = frozenset()
    alignment: int = 16
    extra_layout: str = ""
    extra_topk: int = 0


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: what users pass as `backend=`.
        supports: (request, machine) -> (ok, reason); the reason reads as a sentence either way.
        module: where the implementation lives; imported on first use.
        function: its name there.
    """

    name: str
    supports: Callable[[Request, Arch], tuple[bool, str]]
    module: str
    function: str

    def load(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.function)


@dataclass(frozen=True)
class Answer:
    """One line of `explain`."""

    backend: str
    ok: bool
    chosen: bool
    reason: str


def backends_of(op: str) -> tuple[Backend, ...]:
    """The op's backends, best first."""
    if op == "decode":
        from .ops.sparse_decode.backends import BACKENDS
    elif op == "prefill":
        from .ops.sparse_prefill.backends import BACKENDS
    elif op == "kv_write":
        from .ops.kv_write.backends import BACKENDS
    elif op == "dense_decode":
        from .ops.dense_decode.backends import BACKENDS
    else:
        raise ValueError(f"op is {op!r}, allowed: {', '.join(OPS)}")
    return BACKENDS


def explain(request: Request, machine: Arch) -> list[Answer]:
    """What each backend says to the request on that machine, and which one would run."""
    answers: list[Answer] = []
    for backend in backends_of(request.op):
        ok, reason = backend.supports(request, machine)
        chosen = ok and not any(a.chosen for a in answers)
        answers.append(Answer(backend.name, ok, chosen, reason))
    return answers


def choose(request: Request, machine: Arch, name: str | None = None) -> Backend:
    """The backend that runs the request.

    Raises:
        ValueError: no backend of that name.
        NotImplementedError: the named backend, or every backend, refuses; with the reasons.
    """
    backends = backends_of(request.op)
    if name is not None:
        named = [b for b in backends if b.name == name]
        if not named:
            names = ", ".join(b.name for b in backends)
            raise ValueError(f"backend is {name!r}, {request.op} has: {names}")
        backends = tuple(named)
    reasons = []
    for backend in backends:
        ok, reason = backend.supports(request, machine)
        if ok:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise NotImplementedError(f"no backend runs {request} on {machine.name}: " + "; ".join(reasons))


def available_backends(device: torch.device | str | None = None) -> list[str]:
    """Names of the backends that can run a plain decode call on this machine, best first."""
    machine = arch_module.of(arch_module.default_device() if device is None else device)
    request = Request(op="decode", layout="v32_fp8", heads=64)
    return [a.backend for a in explain(request, machine) if a.ok]
