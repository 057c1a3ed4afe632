"""FlashMLA as vLLM builds it: the interface file is vendored, the kernels are vllm._flashmla_C."""

from __future__ import annotations

import importlib

from ..case import Implementation
from . import flash_mla
from .module import FLASH_MLA_NAMES, ModuleProvider

TITLE = "FlashMLA (vLLM's build)"
PACKAGE = "vllm"
DISTRIBUTIONS = ("vllm",)
ARCHITECTURES = ("sm_90", "sm_100")

# The vendored interface first; the module with vLLM's checks around it in older releases.
MODULES = (
    "vllm.third_party.flashmla.flash_mla_interface",
    "vllm.v1.attention.ops.flashmla",
    "vllm.attention.ops.flashmla",
)


def load(name: str) -> Implementation:
    reasons = []
    for place in MODULES:
        try:
            made = importlib.import_module(place)
        except Exception as error:  # foreign code: a missing kernel library is an OSError too
            reasons.append(f"{place}: {type(error).__name__}: {error}")
            continue
        if any(hasattr(made, function) for function in FLASH_MLA_NAMES):
            provider = ModuleProvider(place)
            provider.name = "vllm"
            return provider
        reasons.append(f"{place}: has none of {', '.join(FLASH_MLA_NAMES)}")
    raise ImportError("; ".join(reasons))


supports = flash_mla.supports

__all__ = ["ARCHITECTURES", "DISTRIBUTIONS", "PACKAGE", "TITLE", "load", "supports"]
