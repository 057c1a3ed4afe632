"""What an entry of the fault library is, and the conditions under which a fault can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .case import Inputs, WriteInputs
from .faults_kernel import KERNEL, Arithmetic, EmulatedKernel

AnyInputs = Inputs | WriteInputs

_ARITHMETIC = ("chunk", "splits")


def always(inputs: Inputs) -> bool:
    return True


@dataclass(frozen=True)
class Fault:
    """One wrong kernel that has been seen in this field.

    Attributes:
        name: unique and stable; cases name the faults they are there to show.
        line: its number in the table of docs/faults.md.
        about: what the wrong kernel does, one line.
        model: the emulated kernel with this fault.
        applies: whether the fault can change the answer to these inputs at all; where it says no,
            the model answers exactly as the clean one does.
        op: "attention" or "kv_write".
        variants: settings to try as hypotheses, the first one is put on trial by the gate:
            `chunk` and `splits` of the arithmetic, anything else is an attribute of the model.
        random: the wrong answers move between runs, so no model can reproduce them.
    """

    name: str
    line: int
    about: str
    model: Callable[[Arithmetic], EmulatedKernel]
    applies: Callable[[Any], bool] = always
    op: str = "attention"
    variants: tuple[Mapping[str, Any], ...] = ({},)
    random: bool = False

    def kernel(self, arithmetic: Arithmetic = KERNEL, variant: int = 0) -> EmulatedKernel:
        """The wrong kernel in this arithmetic."""
        settings = self.variants[variant]
        work = {key: value for key, value in settings.items() if key in _ARITHMETIC}
        kernel = self.model(replace(arithmetic, **work))
        for key, value in settings.items():
            if key not in _ARITHMETIC:
                setattr(kernel, key, value)
        kernel.name = self.name
        return kernel

    def can_show(self, inputs: AnyInputs) -> bool:
        """Whether this call can be answered wrongly because of the fault."""
        writes = isinstance(inputs, WriteInputs)
        return writes == (self.op == "kv_write") and self.applies(inputs)


def caches(inputs: Inputs) -> list[Any]:
    return [inputs.cache] + ([] if inputs.extra_cache is None else [inputs.extra_cache])


def quantised(inputs: Inputs) -> bool:
    return any(cache.layout.quantised for cache in caches(inputs))


def has_rope(inputs: Inputs) -> bool:
    return any(cache.layout.rope is not None for cache in caches(inputs))


def has_sink(inputs: Inputs) -> bool:
    return inputs.attn_sink is not None


def has_lengths(inputs: Inputs) -> bool:
    return inputs.topk_length is not None or inputs.extra_topk_length is not None


def many_queries(inputs: Inputs) -> bool:
    return inputs.queries > 1


def dense(inputs: Inputs) -> bool:
    return inputs.op == "dense_decode"


def causal_queries(inputs: Inputs) -> bool:
    return dense(inputs) and inputs.causal


def has_masked(inputs: Inputs) -> bool:
    """Whether some entry is masked: an invalid index, or one beyond its row's length."""
    if has_lengths(inputs):
        return True
    pairs = [(inputs.cache, inputs.indices)]
    if inputs.extra_cache is not None and inputs.extra_indices is not None:
        pairs.append((inputs.extra_cache, inputs.extra_indices))
    return any(bool(((i < 0) | (i >= cache.num_slots)).any()) for cache, i in pairs)
