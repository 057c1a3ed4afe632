"""Isolated providers on a GPU: a lost CUDA context is a result, and the tool's own survives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))

from story_repository import EXACT, kernel

from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.check import make_provider
from sparse_mla.accuracy.gate import CRASHED, PASSED, run_catalogue
from sparse_mla.bench.registry import Workload
from sparse_mla.bump.speed import compare_speed
from sparse_mla.isolate.host import IsolatedProvider

GPU = torch.device("cuda")
BY_NAME = {case.name: case for case in CASES}

ILLEGAL = """
import torch
from toy_mla import *
from toy_mla import flash_mla_with_kvcache as right

def flash_mla_with_kvcache(q, *rest, **more):
    if q.shape[2] == 5:
        q.flatten()[torch.tensor([1 << 40], device=q.device)]
    return right(q, *rest, **more)
"""


def start(name: str, place: Path) -> IsolatedProvider:
    made = make_provider(f"{name}@{place}", GPU, limit=120.0)
    assert isinstance(made, IsolatedProvider)
    return made


def test_a_lost_context_is_one_crash(tmp_path: Path) -> None:
    (tmp_path / "toy_mla.py").write_text(kernel(EXACT))
    (tmp_path / "illegal_mla.py").write_text(ILLEGAL)
    mine = torch.arange(1000, device=GPU)
    names = ("decode/gaussian", "decode/heads/5", "decode/gaussian", "decode/heads/5_strided")
    with start("illegal_mla", tmp_path) as provider:
        results = run_catalogue([provider], [BY_NAME[name] for name in names], device=GPU)
    assert [r.status for r in results] == [PASSED, CRASHED, PASSED, CRASHED]
    assert "CUDA context lost" in results[1].detail
    torch.cuda.synchronize()
    assert int(mine.sum()) == 499500


@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: c.name)
def test_triton_answers_the_same_from_another_process(
    case: object, isolated_triton: IsolatedProvider
) -> None:
    (result,) = run_catalogue([isolated_triton], [case], device=GPU)  # type: ignore[list-item]
    assert result.status == PASSED, result.detail


@pytest.fixture(scope="module")
def isolated_triton() -> IsolatedProvider:
    made = make_provider("triton", GPU, isolate=True)
    assert isinstance(made, IsolatedProvider)
    return made


def test_both_sides_are_timed_in_cuda_graphs(isolated_triton: IsolatedProvider) -> None:
    workload = Workload("decode", "v32_fp8", 4, 1, 16, 512, 4 * 4096)
    other = make_provider("triton", GPU, isolate=True)
    assert isinstance(other, IsolatedProvider)
    with other:
        (row,) = compare_speed(isolated_triton, other, [workload], GPU, 10)
    assert row["base_how"] == row["candidate_how"] == "CUDA graph, L2 flushed"
    assert 0.8 < row["ratio"] < 1.25
