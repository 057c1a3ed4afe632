"""What a machine is: the facts that decide which kernels can run on it."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

# Shared memory that one block can opt in to, bytes, by compute capability (CUDA C++ Programming
# Guide, table "Technical Specifications per Compute Capability"); less 1 KB that the driver keeps.
SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}


@dataclass(frozen=True)
class Arch:
    """A device that could run a kernel.

    Attributes:
        device: "cpu" or "cuda".
        name: as the driver or the user calls it.
        capability: CUDA compute capability, or None on CPU.
        multiprocessors: number of SMs, or 0 on CPU.
        triton: triton's version, or None where it is not installed.
        interpret: Triton runs as an interpreter on CPU tensors (TRITON_INTERPRET=1).
        hip: the GPU is AMD's.
    """

    device: str
    name: str
    capability: tuple[int, int] | None
    multiprocessors: int
    triton: str | None
    interpret: bool
    hip: bool = False

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block can have; 0 on CPU."""
        if self.capability is None:
            return 0
        return SHARED_MEMORY.get(self.capability, 99 * 1024)


def triton_version() -> str | None:
    """triton's version without importing it, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _cuda(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    return Arch(
        device="cuda",
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        triton=triton_version(),
        interpret=False,
        hip=torch.version.hip is not None,
    )


@functools.cache
def _cpu() -> Arch:
    interpret = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return Arch("cpu", "CPU", None, 0, triton_version(), interpret)


def of(device: torch.device | str) -> Arch:
    """The facts about a device of this machine; ValueError for device types without a backend."""
    device = parse_device(device)
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu":
        return _cpu()
    raise ValueError(f"device is {device}, allowed: cpu, cuda")


def parse_device(device: torch.device | str) -> torch.device:
    """The device of that name; ValueError where it is none, or a GPU that torch does not see."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, allowed: cpu, cuda, cuda:0, ...") from error
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, torch sees {torch.cuda.device_count()} GPUs here")
    return parsed


def default_device() -> torch.device:
    """The GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse(name: str) -> Arch:
    """A machine by name, to ask about one that is not here: "cpu", or "sm_90" and the like.

    The triton version is this machine's, or the oldest that the kernels support.
    """
    if name == "cpu":
        return _cpu()
    digits = name.removeprefix("sm_").rstrip("a")
    known = {f"{major}{minor}": (major, minor) for major, minor in SHARED_MEMORY}
    if not name.startswith("sm_") or digits not in known:
        names = ", ".join(f"sm_{key}" for key in known)
        raise ValueError(f"arch is {name!r}, allowed: cpu, {names}")
    return Arch("cuda", name, known[digits], 0, triton_version() or "3.6.0", False)
