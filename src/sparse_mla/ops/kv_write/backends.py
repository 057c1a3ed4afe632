"""The backends of the cache's writer, best first, and when each of them can run."""

from __future__ import annotations

from ...arch import Arch
from ...dispatch import Backend, Request
from ..sparse_decode.backends import MIN_CAPABILITY, MIN_TRITON, triton_version

# The widest field of a row that a kernel stores at once, an fp32 scale.
ALIGNMENT = 4


def triton_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.triton is None:
        return False, "triton is not installed"
    if triton_version(machine) < MIN_TRITON:
        return False, f"triton is {machine.triton}, needs {'.'.join(map(str, MIN_TRITON))} or newer"
    if request.alignment < ALIGNMENT:
        return False, f"the cache is aligned to {request.alignment} bytes, needs {ALIGNMENT}"
    if machine.device == "cpu":
        if machine.interpret:
            return True, "Triton's interpreter runs it on CPU tensors (TRITON_INTERPRET=1): slow"
        return False, "needs a GPU (TRITON_INTERPRET=1 would interpret it on CPU tensors)"
    if machine.hip:
        return False, "its inline PTX needs an NVIDIA GPU"
    if machine.capability is None or machine.capability < MIN_CAPABILITY:
        return False, f"compute capability is {machine.capability}, needs 8.0 or newer"
    return True, "one Triton kernel that quantises and scatters, compute capability 8.0 and newer"


def cpu_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.device != "cpu":
        return False, f"tensors are on {machine.device}"
    return True, "torch packs, then scatters"


def torch_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    return True, "torch packs, then scatters: dozens of small kernels and a sync on a GPU"


BACKENDS = (
    Backend("cpu", cpu_supports, "sparse_mla.ops.kv_write.cpu", "run"),
    Backend("triton", triton_supports, "sparse_mla.ops.kv_write.triton", "run"),
    Backend("torch", torch_supports, "sparse_mla.ops.kv_write.cpu", "run"),
)
