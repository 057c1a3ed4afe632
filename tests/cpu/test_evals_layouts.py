"""SmolLM2's mapping onto every layout without the model, and its committed results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_mla.accuracy import activations
from sparse_mla.accuracy.faults import get_fault
from sparse_mla.evals.layouts import _Calls, load_found, shows, tables
from sparse_mla.evals.smollm import _calls, append, arrangements, own
from sparse_mla.evals.tasks import problem_set
from sparse_mla.kv_layout import LAYOUTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "reports" / "smollm2-layouts.json"


def drawn(n: int = 70) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(heads, n, 64, generator=g) for heads in (9, 3, 3))  # type: ignore


@pytest.mark.parametrize("arrangement", arrangements(), ids=lambda a: a.name)
def test_every_layout_attends_as_the_model_does(arrangement):
    q, k, v = (x.to(torch.bfloat16).float() for x in drawn())
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), is_causal=True
    ).transpose(0, 1)
    calls = _calls(q, k, v, arrangement, 0.125, append)
    assert len(calls) == 3
    got = torch.cat([activations.from_mla(own(call)[0].float()) for call in calls])
    error = float((got - want).norm() / want.norm())
    formats = {LAYOUTS[name].latent.dtype for name in arrangement.name.split(" + ")}
    # Roundings: 2^-9 of bf16, 2^-4 at most of e4m3, a quarter at most of e2m1.
    assert error < {"bf16": 0.01, "e4m3": 0.07, "e2m1": 0.25}[min(formats)]


def test_a_fault_shows_only_where_it_can():
    where = arrangements()
    q, k, v = drawn()
    calls = {a.layout: _Calls(_calls(q, k, v, a, 0.125, append), []) for a in where[:2]}
    assert shows(get_fault("scale_pow2_down"), calls["v32_fp8"])
    assert not shows(get_fault("scale_pow2_down"), calls["bf16"])
    assert not shows(get_fault("int32_overflow"), calls["v32_fp8"])


def test_committed_results_come_back_and_hold_every_layout(tmp_path):
    found = load_found(RESULTS)
    found.save(tmp_path / "a.json")
    assert load_found(tmp_path / "a.json") == found
    assert [row.layout for row in found.layouts] == [a.name for a in arrangements()]
    assert len(tables(found)[1]) == 2 + len(found.faults)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="format"):
        load_found(tmp_path / "b.json")


def test_problems_keep_their_numbers():
    assert (
        problem_set("problems", start=5, limit=2).asked
        == problem_set("problems", limit=7).asked[5:]
    )
    with pytest.raises(ValueError, match="start is 1319"):
        problem_set("problems", start=1319)
