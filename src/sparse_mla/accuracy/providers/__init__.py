"""Providers: what the gate can put on trial, behind one interface (`case.Implementation`).

One file per adapter (`base.py` says what it holds), and none is imported until it is asked for.
A provider is named by its adapter, by one of our backends, or by any importable module; `@` adds
where it lives: `flash_mla@/path/to/venv`.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from ... import arch
from ...kv_layout import LAYOUTS
from ..case import Implementation
from .base import OPS, Description, Offer, origin

ADAPTERS = ("sparse_mla", "flash_mla", "sglang", "vllm", "flashinfer", "tilelang")

_FILES = {name: name for name in ADAPTERS} | {
    "sparse_mla": "ours",
    "sgl_kernel.flash_mla": "sglang",
}


def adapter(name: str) -> ModuleType:
    """The adapter's file for a provider; any other name is a module with FlashMLA's functions."""
    from ... import dispatch

    file = _FILES.get(name)
    if file is None:
        backends = {backend.name for backend in dispatch.backends_of("decode")}
        ours = name in backends or name.startswith("sparse_mla:")
        file = "ours" if ours else "module"
    return importlib.import_module(f".{file}", __name__)


def load(name: str) -> Implementation:
    """Import a provider into this process; whatever its import raises passes through."""
    made: Implementation = adapter(name).load(name)
    return made


def installed(name: str) -> tuple[bool, str]:
    """Whether an adapter's package can be found, without importing it."""
    package = adapter(name).PACKAGE or name.split(".")[0]
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    return (True, "installed") if found is not None else (False, f"{package} is not installed")


def describe(name: str, provider: Implementation | None) -> Description:
    """Version, commit, architectures and (ok, reason) per op and layout on this machine.

    Args:
        provider: from `load`; None describes without importing anything.
    """
    file = adapter(name)
    ok, reason = installed(name)
    if not ok:
        return Description(name, file.TITLE, False, reason, architectures=file.ARCHITECTURES)
    machine = arch.of(arch.default_device())
    package = file.PACKAGE or name
    offers = tuple(
        Offer(op, layout, *file.supports(provider, op, layout, machine))
        for op in OPS
        for layout in LAYOUTS
    )
    where = origin((package, *file.DISTRIBUTIONS), _location(provider, package))
    built_for = getattr(provider, "architectures", file.ARCHITECTURES)
    return Description(name, file.TITLE, True, "imported", where, built_for, offers)


def _location(provider: Any, package: str) -> str | None:
    module = getattr(provider, "module", None)
    if module is not None and getattr(module, "__file__", None):
        return str(module.__file__)
    spec = importlib.util.find_spec(package.split(".")[0])
    return None if spec is None else spec.origin


def __getattr__(name: str) -> Any:
    """`Backend`, `ModuleProvider` and `pad`, from the files they live in."""
    homes = {"Backend": ".ours", "ModuleProvider": ".module", "pad": ".module"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name], __name__), name)
