"""The TileLang kernel that SGLang ships: sparse prefill over bf16 rows, 2048 entries a list."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from ...arch import Arch
from ..case import Implementation, Inputs, NotOffered, Output, WriteInputs
from .base import bf16_rows, built_for

TITLE = "TileLang (SGLang's tilelang_sparse_fwd)"
PACKAGE = "tilelang"
DISTRIBUTIONS = ("tilelang",)
ARCHITECTURES = ("sm_90",)
TOPK = 2048

MODULES = (
    "sglang.srt.layers.attention.dsa.tilelang_kernel",
    "sglang.srt.layers.attention.nsa.tilelang_kernel",
)


class TileLangSparse:
    """Lists are padded to 2048 with -1; it answers the output only, no lse."""

    name = "tilelang"

    def __init__(self) -> None:
        reasons = []
        for place in MODULES:
            try:
                self.module: ModuleType = importlib.import_module(place)
                self.forward: Any = self.module.tilelang_sparse_fwd
                return
            except Exception as error:  # foreign code
                reasons.append(f"{place}: {type(error).__name__}: {error}")
        raise ImportError("; ".join(reasons))

    def new_state(self) -> None:
        return None

    def run(self, inputs: Inputs, state: Any) -> Output:
        if inputs.op != "prefill":
            raise NotOffered(inputs.op)
        for what in ("attn_sink", "topk_length"):
            if getattr(inputs, what) is not None:
                raise NotOffered(what)
        kv = bf16_rows(inputs)
        if kv is None or inputs.cache.layout.name != "bf16":
            raise NotOffered(f"prefill over {inputs.cache.layout.name}")
        topk = inputs.indices.shape[-1]
        if topk > TOPK:
            raise NotOffered(f"topk {topk}, it takes {TOPK}")
        indices = torch.nn.functional.pad(inputs.indices, (0, TOPK - topk), value=-1)
        out = self.forward(inputs.q, kv, indices.unsqueeze(1).contiguous(), inputs.scale)
        padded = ("topk",) if topk < TOPK else ()
        note = f"topk padded to {TOPK}, all it takes" if padded else ""
        return Output(out.view((*inputs.q.shape[:-1], 512)), None, padded=padded, note=note)

    def write(self, inputs: WriteInputs) -> None:
        raise NotOffered("no writer")


def load(name: str) -> Implementation:
    return TileLangSparse()


def supports(
    provider: TileLangSparse | None, op: str, layout: str, machine: Arch
) -> tuple[bool, str]:
    if (op, layout) != ("prefill", "bf16"):
        return False, "sparse prefill over 576 bf16 values only"
    ok, why = built_for(ARCHITECTURES, machine)
    return ok, f"tilelang_sparse_fwd, {why}" if ok else why
