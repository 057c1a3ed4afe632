"""The backends of dense decode, best first, and when each of them can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...arch import Arch
from ...dispatch import Backend, Request
from ...kv_layout import LAYOUTS
from ..sparse_decode import backends as sparse_decode

CPU_LAYOUTS = tuple(name for name, layout in LAYOUTS.items() if not layout.extra_only)
TRITON_LAYOUTS = ("bf16", "bf16_nope", "fp8_tensor")
SM90_LAYOUTS = ("bf16", "bf16_nope")

Supports = Callable[[Request, Arch], tuple[bool, str]]


def _where(sparse: Supports, layouts: tuple[str, ...]) -> Supports:
    """Where sparse decode's code for bf16 caches runs, dense decode's does, for these layouts."""

    def supports(request: Request, machine: Arch) -> tuple[bool, str]:
        ok, reason = sparse(replace(request, layout="bf16"), machine)
        if ok and request.layout not in layouts:
            return False, f"has no kernel for layout {request.layout}: {', '.join(layouts)}"
        return ok, reason

    return supports


cpu_supports = _where(sparse_decode.cpu_supports, CPU_LAYOUTS)
sm90_supports = _where(sparse_decode.sm90_supports, SM90_LAYOUTS)
triton_supports = _where(sparse_decode.triton_supports, TRITON_LAYOUTS)

BACKENDS = (
    Backend("cpu", cpu_supports, "sparse_mla.ops.dense_decode.cpu", "run"),
    Backend("sm90", sm90_supports, "sparse_mla.ops.dense_decode.sm90", "run"),
    Backend("triton", triton_supports, "sparse_mla.ops.dense_decode.triton", "run"),
)
