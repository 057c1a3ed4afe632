"""The backends of dense decode, best first, and when each of them can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...arch import Arch
from ...dispatch import Backend, Request
from ..sparse_decode import backends as sparse_decode

LAYOUTS = ("bf16", "bf16_nope")


Supports = Callable[[Request, Arch], tuple[bool, str]]


def _where(sparse: Supports) -> Supports:
    """Where sparse decode's code for bf16 caches runs, dense decode's does, for its layouts."""

    def supports(request: Request, machine: Arch) -> tuple[bool, str]:
        ok, reason = sparse(replace(request, layout="bf16"), machine)
        if ok and request.layout not in LAYOUTS:
            return False, f"has no kernel for layout {request.layout}: {', '.join(LAYOUTS)}"
        return ok, reason

    return supports


MODULE = "sparse_mla.ops.dense_decode"
BACKENDS = (
    Backend("cpu", _where(sparse_decode.cpu_supports), f"{MODULE}.cpu", "run"),
    Backend("sm90", _where(sparse_decode.sm90_supports), f"{MODULE}.sm90", "run"),
    Backend("triton", _where(sparse_decode.triton_supports), f"{MODULE}.triton", "run"),
)
