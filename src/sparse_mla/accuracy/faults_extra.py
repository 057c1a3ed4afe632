"""Faults with a second cache: left out, its lengths or its indices at the wrong place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .case import Inputs
from .faults_fault import Fault
from .faults_kernel import EmulatedKernel, Source


class ExtraIgnored(EmulatedKernel):
    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        return super().sources(inputs, state)[:1]


class ExtraIndicesInMain(EmulatedKernel):
    """The extra list is resolved with the main cache's pages, or the other way round."""

    which = "extra in main"

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        made = super().sources(inputs, state)
        if len(made) == 1:
            return made
        main, extra = made
        if self.which == "main in extra":
            return [replace(main, cache=extra.cache), extra]
        return [main, replace(extra, cache=main.cache)]


class ExtraLengthOnMain(EmulatedKernel):
    """Lengths reach the wrong list: the extra one's the main list, both swapped, one for both."""

    which = "the extra one's for both"

    def sources(self, inputs: Inputs, state: Any) -> list[Source]:
        made = super().sources(inputs, state)
        if len(made) == 1:
            return made
        main, extra = made
        if self.which == "the main one's for both":
            return [main, replace(extra, lengths=main.lengths)]
        if self.which == "swapped":
            return [replace(main, lengths=extra.lengths), replace(extra, lengths=main.lengths)]
        return [replace(main, lengths=extra.lengths), extra]


def _has_extra(inputs: Inputs) -> bool:
    return inputs.extra_cache is not None


def _has_extra_lengths(inputs: Inputs) -> bool:
    given = inputs.topk_length is not None or inputs.extra_topk_length is not None
    return _has_extra(inputs) and given


EXTRA_FAULTS = (
    Fault(
        "extra_cache_ignored",
        26,
        "attends to the main cache only",
        ExtraIgnored,
        _has_extra,
    ),
    Fault(
        "extra_indices_in_main",
        26,
        "looks up the extra list's slots in the main cache, or the main list's in the extra one",
        ExtraIndicesInMain,
        _has_extra,
        variants=({}, {"which": "main in extra"}),
    ),
    Fault(
        "extra_length_on_main",
        26,
        "applies the extra list's lengths to the main list, or the main list's to the extra one",
        ExtraLengthOnMain,
        _has_extra_lengths,
        variants=(
            {},
            {"which": "swapped"},
            {"which": "the main one's for both"},
        ),
    ),
)
