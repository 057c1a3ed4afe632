"""transformers models on a GPU: logits, generation, a decode step as a CUDA graph."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

from tiny_models import (
    KINDS,
    altered,
    drawn,
    noise,
    padded_batch,
    recorded,
    rel_l2,
    replayed,
    rounded_then_stored,
    rounding_bound,
    run,
    steady,
    through_layout,
    tiny,
)

from sparse_mla.integrations.transformers import DecodeGraph, PagedCache, apply, restore

LAYOUTS = ("bf16", "v32_fp8")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_differ_by_rounding(kind: str, seed: int, layout: str) -> None:
    """As on the CPU. The kernels round weights to bf16 too, which is of the output's size."""
    model, how = drawn(kind, seed)
    model.cuda()
    ids, mask = (x.cuda() for x in padded_batch(how["padding"], sum(how["lengths"])))
    with recorded(model) as tape, altered(model, latent=through_layout(layout)):
        stored = run(model, ids, mask, how["lengths"])

    def again() -> torch.Tensor:
        with replayed(model, tape):
            return run(model, ids, mask, how["lengths"])

    bound = rounding_bound(again, model, stored, rounded_then_stored(layout))
    apply(model, layout, how["page_size"])
    assert rel_l2(again(), stored) <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_model_is_as_accurate_as_eager(kind: str, layout: str) -> None:
    """A longer context, a model in bf16, both against its float32 self."""
    sizes: dict[str, Any] = {"index_topk": 128, "num_attention_heads": 16, "hidden_size": 256}
    sizes |= {"num_key_value_heads": 16, "max_position_embeddings": 2048}
    model, exact = (tiny(kind, seed=5, **sizes).cuda() for _ in range(2))
    exact.load_state_dict(model.bfloat16().state_dict())
    ids, mask = (x.cuda() for x in padded_batch([0, 90], 700))
    lengths = [600, 1, 1, 98]
    with recorded(exact) as tape, altered(exact, latent=through_layout(layout)):
        want = run(exact, ids, mask, lengths)

    def error() -> float:
        with replayed(model, tape):
            return rel_l2(run(model, ids, mask, lengths), want)

    with altered(model, latent=through_layout(layout)):
        eager = error()
    apply(model, layout, 64)
    assert error() <= 1.2 * eager


@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind: str) -> None:
    model = steady(kind).cuda()
    ids, mask = (x.cuda() for x in padded_batch([0, 4], 60))
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    apply(model, "bf16")
    assert torch.equal(model.generate(ids, **options), want)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)
    beams = model.generate(ids, num_beams=3, **options)
    restore(model)
    assert torch.equal(model.generate(ids, num_beams=3, **options), beams)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_captured_step_equals_eager(
    kind: str, layout: str, tokens: int, dtype: torch.dtype
) -> None:
    """Captured once, replayed while the context grows over page borders: the same bits."""
    model = apply(tiny(kind, n_routed_experts=8).to(dtype).cuda(), layout, 16)
    if dtype == torch.float32:
        # torch's grouped matmul of float32 copies the groups' sizes to the host.
        model.set_experts_implementation("batched_mm")
    prompt, steps, chosen = 45, 12, (0, 2, 3)
    length = prompt + steps * tokens
    ids, mask = (x.cuda() for x in padded_batch([0, 9], length))
    eager, captured = (PagedCache(model, length) for _ in range(2))
    for cache in (eager, captured):
        run(model, ids[:, :prompt], mask[:, :prompt], [prompt], past_key_values=cache)
    graph = DecodeGraph(model, captured, mask[:, :prompt], tokens=tokens, hidden_layers=chosen)
    full = torch.nn.functional.pad(mask[:, :prompt], (0, length - prompt), value=1)
    positions = full.cumsum(1) - 1
    for start in range(prompt, length, tokens):
        piece = slice(start, start + tokens)
        got = graph.step(ids[:, piece])
        with torch.no_grad():
            want = model(
                ids[:, piece],
                attention_mask=full,
                position_ids=positions[:, piece],
                past_key_values=eager,
                output_hidden_states=True,
            )
        assert torch.equal(got.logits, want.logits)
        assert set(got.hidden_states) == set(chosen)
        for i in chosen:
            assert torch.equal(got.hidden_states[i], want.hidden_states[i])
    assert captured.length == eager.length == length
    for ours, theirs in zip(captured.layers, eager.layers, strict=True):
        slots = ours.table.get(2, ours.pages, ours.device)[:, :length].flatten()
        assert torch.equal(ours.pool.read(slots), theirs.pool.read(slots))
    with pytest.raises(ValueError, match=f"would be {length + tokens} tokens, the cache holds"):
        graph.step(ids[:, :tokens])
    with pytest.raises(ValueError, match="the graph was captured with"):
        graph.step(ids[:1, :tokens])


def test_a_cropped_step_is_taken_again() -> None:
    """Rejected draft tokens: the cache is cropped between replays."""
    model = apply(tiny("glm_moe_dsa").bfloat16().cuda(), "v32_fp8", 16)
    ids, mask = (x.cuda() for x in padded_batch([0, 0], 30))
    cache = PagedCache(model, 40)
    run(model, ids, mask, [30], past_key_values=cache)
    graph = DecodeGraph(model, cache, tokens=2)
    draft, kept = (torch.randint(2, 97, (2, 2), device="cuda") for _ in range(2))
    want = graph.step(kept).logits.clone()
    cache.crop(-2)
    other = graph.step(draft).logits.clone()
    cache.crop(-2)
    assert not torch.equal(other, want)
    assert torch.equal(graph.step(kept).logits, want)


def test_full_size_layer_of_glm5() -> None:
    """GLM-5's own attention dimensions, one layer in bf16, against eager in float32."""
    sizes: dict[str, Any] = {
        "hidden_size": 6144,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "index_topk": 512,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
    }
    exact = tiny("glm_moe_dsa", **sizes).cuda()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids, mask = (x.cuda() for x in padded_batch([0, 300], 1200))
    lengths = [1150, 1, 49]
    with recorded(exact) as tape, altered(exact, latent=through_layout("v32_fp8")):
        want = run(exact, ids, mask, lengths)
    with replayed(model, tape), altered(model, latent=through_layout("v32_fp8")):
        eager = rel_l2(run(model, ids, mask, lengths), want)
    apply(model)
    with replayed(model, tape):
        assert rel_l2(run(model, ids, mask, lengths), want) <= 1.2 * eager


def test_noise_is_drawn_on_the_device() -> None:
    assert noise(0.5)(torch.ones(4, device="cuda")).device.type == "cuda"
