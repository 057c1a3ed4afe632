"""What all tests share: poisoned allocations, seeds, and which folders run where."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent

# Larger allocations stay as they are: they are virtual memory until they are written.
POISON_LIMIT = 256 * 2**20

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# triton decides at import whether it interprets: these tests need a process of their own, which
# cpu/test_triton_interpreted.py starts.
collect_ignore = [] if INTERPRETED else ["interpreted"]

pytest.register_assert_rewrite("drawn", "hostile")

# Files that take minutes start first, so that no process is left alone with one at the end.
FIRST = ("test_triton_interpreted.py", "test_faults.py", "test_bump_story.py")

# The tests' tensors are small: on a busy machine threads would wait for each other at every
# operation. Tests of threads set their own number.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    how = "interpreted" if INTERPRETED else "compiled"
    return f"torch {torch.__version__}, GPU: {gpu}, triton kernels: {how}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; tests/gpu needs a GPU, and says so where there is none."""
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))
    missing = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if HERE / "gpu" in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or with the largest number of an integer type."""
    plain = type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda")
    if not plain or tensor.numel() * tensor.element_size() > POISON_LIMIT:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out uninitialised holds NaN, 0xFF bytes or the largest integer."""

    def patched(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                return poison(allocate(*args, **kwargs))

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, patched(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, patched(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same seed."""
    torch.manual_seed(0)
    yield
