"""The backends of sparse decode, best first, and when each of them can run."""

from __future__ import annotations

from ...arch import Arch
from ...dispatch import Backend, Request

LAYOUTS = ("v32_fp8", "bf16", "bf16_nope")
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)


def triton_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.triton is None:
        return False, "triton is not installed"
    if request.layout not in LAYOUTS:
        return False, f"has no kernel for layout {request.layout}"
    version = tuple(int(part) for part in machine.triton.split(".")[:2] if part.isdigit())
    if version < MIN_TRITON:
        return False, f"triton is {machine.triton}, needs {'.'.join(map(str, MIN_TRITON))} or newer"
    if machine.device == "cpu":
        if machine.interpret:
            return True, "Triton's interpreter runs it on CPU tensors (TRITON_INTERPRET=1): slow"
        return False, "needs a GPU (TRITON_INTERPRET=1 would interpret it on CPU tensors)"
    if machine.hip:
        return False, "its inline PTX needs an NVIDIA GPU"
    if machine.capability is None or machine.capability < MIN_CAPABILITY:
        return False, f"compute capability is {machine.capability}, needs 8.0 or newer"
    return True, "portable Triton kernel, compute capability 8.0 and newer"


def cpu_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.device != "cpu":
        return False, f"tensors are on {machine.device}"
    if request.layout not in LAYOUTS:
        return False, f"has no code for layout {request.layout}"
    return True, "torch on CPU threads, float32 arithmetic"


BACKENDS = (
    Backend("cpu", cpu_supports, "sparse_mla.ops.sparse_decode.cpu", "run"),
    Backend("triton", triton_supports, "sparse_mla.ops.sparse_decode.triton", "run"),
)
