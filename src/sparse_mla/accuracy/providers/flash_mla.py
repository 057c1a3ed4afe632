"""FlashMLA as deepseek-ai packages it: the module flash_mla."""

from __future__ import annotations

from ...arch import Arch
from ..case import Implementation
from . import module
from .base import built_for
from .module import ModuleProvider

TITLE = "FlashMLA (deepseek-ai)"
PACKAGE = "flash_mla"
DISTRIBUTIONS = ("flash_mla", "flash-mla")
ARCHITECTURES = ("sm_90", "sm_100")


def load(name: str) -> Implementation:
    return ModuleProvider("flash_mla")


def supports(
    provider: ModuleProvider | None, op: str, layout: str, machine: Arch
) -> tuple[bool, str]:
    ok, reason = module.supports(provider, op, layout, machine)
    if not ok:
        return ok, reason
    built, why = built_for(ARCHITECTURES, machine)
    return (True, f"{reason}, {why}") if built else (False, why)
