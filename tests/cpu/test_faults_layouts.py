"""Wrong versions of our own CPU backend: the gate catches them, the diagnosis names them.

The models of the fault library compute as kernels on GPUs do; this backend does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.diagnose import investigate
from sparse_mla.accuracy.gate import FAILED, PASSED, run_case
from sparse_mla.accuracy.providers.ours import Backend
from sparse_mla.kv_cache import KVCache
from sparse_mla.kv_layout import Field
from sparse_mla.ops.sparse_decode import cpu, cpu_rows
from sparse_mla.ops.sparse_decode.source import Source

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
Patch = Callable[[pytest.MonkeyPatch], None]


def nibbles(patch: pytest.MonkeyPatch) -> None:
    right = cpu_rows._e2m1_planes

    def wrong(packed: torch.Tensor) -> torch.Tensor:
        raw = packed.contiguous().view(torch.uint8)
        return right((raw << 4 | raw >> 4).view(torch.int16))

    patch.setattr(cpu_rows, "_e2m1_planes", wrong)


def ue8m0(patch: pytest.MonkeyPatch) -> None:
    right = cpu_rows._numbers

    def wrong(field: Field, words: torch.Tensor) -> torch.Tensor:
        return right(field, words) * (2.0 if field.dtype == "ue8m0" else 1.0)

    patch.setattr(cpu_rows, "_numbers", wrong)


def outer(patch: pytest.MonkeyPatch) -> None:
    right = cpu_rows._numbers

    def wrong(field: Field, words: torch.Tensor) -> torch.Tensor:
        numbers = right(field, words)
        return torch.ones_like(numbers) if field.offset == 292 else numbers

    patch.setattr(cpu_rows, "_numbers", wrong)


def reader(
    patch: pytest.MonkeyPatch, change: Callable[[cpu_rows.RowReader, KVCache], None]
) -> None:
    class Wrong(cpu_rows.RowReader):
        def __init__(self, cache: KVCache) -> None:
            super().__init__(cache)
            change(self, cache)

    patch.setattr(cpu, "RowReader", Wrong)


def padding(patch: pytest.MonkeyPatch) -> None:
    def change(mine: cpu_rows.RowReader, cache: KVCache) -> None:
        if mine.footers is None:
            return
        packed = cache.page_size * cache.layout.bytes_per_token
        for table in (mine.rows, mine.footers):
            items = table.items
            strides = (packed, *items.stride()[1:])
            table.items = items.as_strided(items.shape, strides)
            table.page_stride, table.words = packed, None

    reader(patch, change)


def pad_byte(patch: pytest.MonkeyPatch) -> None:
    def change(mine: cpu_rows.RowReader, cache: KVCache) -> None:
        if mine.footers is None or cache.layout.name != "v4_fp8":
            return
        items = mine.footers.items
        mine.footers.items = items.as_strided(items.shape, (items.stride(0), 7, 1))
        mine.footers.words = None

    reader(patch, change)


def inline(patch: pytest.MonkeyPatch) -> None:
    def change(mine: cpu_rows.RowReader, cache: KVCache) -> None:
        if mine.footers is None:
            return
        layout, width = cache.layout, cache.layout.bytes_per_token
        for table, first in ((mine.rows, 0), (mine.footers, layout.row_bytes)):
            items = table.items
            start = cache.pages.storage_offset() + first
            table.items = items.as_strided(items.shape, (items.stride(0), width, 1), start)
            table.words = None

    reader(patch, change)


def sources(patch: pytest.MonkeyPatch, change: Callable[[list[Source]], list[Source]]) -> None:
    right = cpu.run

    def wrong(q: torch.Tensor, given: list[Source], *rest: Any) -> Any:
        return right(q, change(given) if len(given) > 1 else given, *rest)

    patch.setattr(cpu, "run", wrong)


def no_extra(patch: pytest.MonkeyPatch) -> None:
    sources(patch, lambda given: given[:1])


def in_main(patch: pytest.MonkeyPatch) -> None:
    sources(patch, lambda given: [given[0], replace(given[1], cache=given[0].cache)])


def lengths(patch: pytest.MonkeyPatch) -> None:
    sources(patch, lambda given: [replace(given[0], lengths=given[1].lengths), given[1]])


@pytest.mark.parametrize(
    ("fault", "wrong", "case"),
    [
        ("nibbles_swapped", nibbles, "decode/layout/nvfp4_bf16_rope"),
        ("ue8m0_bias", ue8m0, "decode/layout/v4_fp8"),
        ("outer_scale_forgotten", outer, "decode/layout/glm53_nope_nvfp4"),
        ("planar_as_inline", inline, "decode/layout/v41_fp8_planar"),
        ("page_padding_ignored", padding, "decode/layout/v4_fp8"),
        ("scale_table_off_by_pad", pad_byte, "decode/layout/v4_fp8"),
        ("extra_cache_ignored", no_extra, "decode/extra/v4_fp8+v4_fp8"),
        ("extra_indices_in_main", in_main, "decode/extra/v4_fp8+v4_fp8/full"),
        ("extra_length_on_main", lengths, "decode/extra/v4_fp8+v4_fp8/lengths"),
    ],
)
def test_named(monkeypatch: pytest.MonkeyPatch, fault: str, wrong: Patch, case: str) -> None:
    backend = Backend("cpu")
    assert run_case(backend, BY_NAME[case]).status == PASSED
    wrong(monkeypatch)
    assert run_case(backend, BY_NAME[case]).status == FAILED
    found, _ = investigate(backend, [BY_NAME[case]], CASES, 0, CPU)
    assert found.name == fault, found.text
    monkeypatch.undo()
    assert run_case(backend, BY_NAME[case]).status == PASSED
