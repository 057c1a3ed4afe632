"""The backends of sparse decode, best first, and when each of them can run."""

from __future__ import annotations

from ...arch import Arch
from ...dispatch import Backend, Request
from ...kv_layout import LAYOUTS

# Layouts whose values are bf16 numbers once expanded; an extra cache has the same layout.
SM90_EXPANDED = ("v4_fp8",)
SM90_LAYOUTS = ("v32_fp8", "bf16", "bf16_nope", *SM90_EXPANDED)
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
# Gluon is experimental and changes between minor versions.
GLUON_TRITON = ((3, 6),)


def triton_version(machine: Arch) -> tuple[int, ...]:
    """(major, minor); empty where it is not a number."""
    parts = (machine.triton or "").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def reads(request: Request) -> tuple[bool, str]:
    """Whether code that takes any layout of `LAYOUTS` can read the request's caches."""
    for layout in (request.layout, request.extra_layout):
        if layout and layout not in LAYOUTS:
            return False, f"has no code for {layout}"
    main = LAYOUTS[request.layout]
    if main.extra_only:
        return False, f"{main.name} is a layout of extra caches only"
    if request.extra_layout:
        extra = LAYOUTS[request.extra_layout]
        if (extra.d_qk, extra.d_v) != (main.d_qk, main.d_v):
            return False, f"{extra.name} has d_qk {extra.d_qk}, {main.name} has {main.d_qk}"
    return True, "reads every layout"


def triton_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.triton is None:
        return False, "triton is not installed"
    ok, reason = reads(request)
    if not ok:
        return False, reason
    if triton_version(machine) < MIN_TRITON:
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


def sm90_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.triton is None:
        return False, "triton is not installed"
    if machine.device != "cuda" or machine.hip or machine.capability != (9, 0):
        return False, "its wgmma kernels need a Hopper GPU (compute capability 9.0)"
    if request.layout not in SM90_LAYOUTS:
        return False, f"has no kernel for layout {request.layout}"
    if request.extra_layout and (
        request.layout not in SM90_EXPANDED or request.extra_layout != request.layout
    ):
        caches = f"a cache of layout {request.layout} and an extra cache of {request.extra_layout}"
        return False, f"has no kernel for {caches}"
    version = triton_version(machine)
    if version not in GLUON_TRITON:
        tried = ", ".join(f"{major}.{minor}" for major, minor in GLUON_TRITON)
        return False, f"triton is {machine.triton}, its Gluon kernels were tried with {tried}"
    if request.alignment < 16:
        return False, f"the cache is aligned to {request.alignment} bytes, 16-byte copies need 16"
    return True, "Gluon kernels for Hopper"


def cpu_supports(request: Request, machine: Arch) -> tuple[bool, str]:
    if machine.device != "cpu":
        return False, f"tensors are on {machine.device}"
    ok, reason = reads(request)
    if not ok:
        return False, reason
    return True, "torch on CPU threads, float32 arithmetic"


BACKENDS = (
    Backend("cpu", cpu_supports, "sparse_mla.ops.sparse_decode.cpu", "run"),
    Backend("sm90", sm90_supports, "sparse_mla.ops.sparse_decode.sm90", "run"),
    Backend("triton", triton_supports, "sparse_mla.ops.sparse_decode.triton", "run"),
)
