"""The story in docs/story-power-of-two-scales.md: its claims, and that its numbers are current."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from sparse_mla.accuracy import activations
from sparse_mla.accuracy.budgets import expect
from sparse_mla.accuracy.diagnose import Call, Trial, diagnose, verdict
from sparse_mla.accuracy.faults import CleanKernel, get_fault
from sparse_mla.accuracy.metrics import compare

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "power_of_two_scales.py"
DOCUMENT = ROOT / "docs" / "story-power-of-two-scales.md"
LAYERS = range(len(activations.load()))


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("scales", "kernel", "passes"),
    [
        ("amax", "clean", True),
        ("amax", "scale_pow2_down", False),
        ("pow2", "clean", True),
        ("pow2", "scale_pow2_down", True),
    ],
)
def test_gate_on_real_activations(
    example: dict[str, Any], layer: int, scales: str, kernel: str, passes: bool
) -> None:
    inputs = example["real_inputs"](activations.load()[layer], scales)
    model = CleanKernel() if kernel == "clean" else get_fault(kernel).kernel()
    output = model.run(inputs, model.new_state())
    metrics = compare(output, expect(inputs))
    assert metrics.passed is passes, metrics.problem
    if not passes:
        found = verdict(diagnose([Trial((Call(inputs, (output,)),))]))
        assert found.name == kernel, found.text


def test_numbers_in_the_document(
    example: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Words must be equal; numbers may differ in their last digit between machines."""
    example["main"]()
    printed = capsys.readouterr().out.split()
    text = DOCUMENT.read_text(encoding="utf-8")
    block = re.search(r"<!-- output: .*? -->\n```\n(.*?)```\n<!-- end of output -->", text, re.S)
    assert block is not None
    written = block[1].split()
    assert len(written) == len(printed)
    for now, then in zip(printed, written, strict=True):
        number = re.fullmatch(r"([+-]?\d+\.\d)(%?)", now)
        if number is None:
            assert then == now
        else:
            assert then.endswith(number[2])
            assert float(then.rstrip("%")) == pytest.approx(float(number[1]), rel=0.01, abs=0.11)
