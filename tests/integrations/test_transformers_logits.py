"""A patched model's logits against transformers' own eager ones, on random tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")

from tiny_models import (
    BF16,
    E4M3,
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

from sparse_mla.integrations.transformers import PagedCache, apply, restore

CASES = [(kind, seed) for kind in KINDS for seed in range(6)]
PRECISION = {"bf16": BF16, "v32_fp8": E4M3}
LAYOUTS = tuple(PRECISION)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_logits_differ_by_rounding(kind: str, seed: int, layout: str) -> None:
    """Prefill in pieces, decode, padding: within what the cache's roundings do to the model."""
    model, how = drawn(kind, seed)
    ids, mask = padded_batch(how["padding"], sum(how["lengths"]))
    with recorded(model) as tape:
        want = run(model, ids, mask, how["lengths"])

    def again() -> torch.Tensor:
        with replayed(model, tape):
            return run(model, ids, mask, how["lengths"])

    assert torch.equal(again(), want)
    # What the model says of latents that went through the layout: exactly what the cache holds.
    with altered(model, latent=through_layout(layout)):
        stored = again()
    bound = rounding_bound(again, model, stored, rounded_then_stored(layout))
    loose = rounding_bound(again, model, want, noise(PRECISION[layout]))
    apply(model, layout, how["page_size"])
    got = again()
    # The layout's own rounding, known to the byte, and beside it only roundings to bf16.
    error = rel_l2(got, stored)
    assert error <= bound
    # A bound that nothing comes near would hide an error: this one is within a factor of 12.
    assert error > bound / 12
    # The layout's rounding as what it is at most, against the model as it is.
    assert rel_l2(got, want) <= loose
    restore(model)
    assert torch.equal(again(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_model_is_as_accurate_as_eager(kind: str, layout: str) -> None:
    """A model in bf16: against its float32 self, with the selections of that.

    Both are given latents as the layout stores them; for bf16 the eager model has them so anyway.
    """
    model = tiny(kind, seed=5).bfloat16()
    exact = tiny(kind, seed=5)
    exact.load_state_dict(model.state_dict())
    ids, mask = padded_batch([0, 9], 60)
    lengths = [41, 1, 1, 17]
    with recorded(exact) as tape, altered(exact, latent=through_layout(layout)):
        want = run(exact, ids, mask, lengths)

    def error() -> float:
        with replayed(model, tape):
            return rel_l2(run(model, ids, mask, lengths), want)

    with altered(model, latent=through_layout(layout)):
        eager = error()
    apply(model, layout, 16)
    # Eager rounds expanded keys, logits and weights to bf16, which absorbed attention does not.
    # Everything else of the model rounds alike, so the errors are of a size; 1.2 is for luck.
    assert error() <= 1.2 * eager


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_free_running_model_stays_as_close_as_noise(kind: str, layout: str) -> None:
    """Nothing replayed: selections may flip, as they do when the unpatched model is rounded."""
    model = tiny(kind, seed=3, n_routed_experts=8)
    ids, mask = padded_batch([0, 3, 20], 90)
    want = run(model, ids, mask, None)
    latent = noise(PRECISION[layout])
    bound = rounding_bound(lambda: run(model, ids, mask, None), model, want, latent)
    apply(model, layout)
    assert rel_l2(run(model, ids, mask, None), want) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_changes_nothing(kind: str, layout: str) -> None:
    """No cache, one piece, many pieces, static pages: the same quantised keys are attended to."""
    # Only the shapes of the matmuls differ between these, in float32. A value at the boundary
    # between two bf16 numbers is then rounded the other way; a latent at the boundary between two
    # e4m3 numbers moves 32 times as far, so there only the layer whose latents are exact is run.
    model = apply(steady(kind, 3 if layout == "bf16" else 1), layout, 16)
    ids, mask = padded_batch([0, 5], 70)
    want = run(model, ids, mask, None)
    for lengths, max_length in (
        ([70], None),
        ([1] * 70, None),
        ([30, 1, 39], None),
        ([30, 1, 39], 70),
        ([30, 1, 39], 100),
    ):
        past = PagedCache(model, max_length)
        got = run(model, ids, mask, lengths, past_key_values=past)
        assert rel_l2(got, want) <= BF16
        assert past.length == 70


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_what_it_holds_do_not_matter(kind: str) -> None:
    model = apply(steady(kind, 1), "v32_fp8", 4)
    ids, mask = padded_batch([0, 11], 40)
    want = run(model, ids, mask, [25, 1, 14])
    alone = run(model, ids[1:, 11:], mask[1:, 11:], [14, 1, 14])
    assert rel_l2(want[1, 11:], alone[0]) <= BF16
    other = ids.clone()
    other[1, :11] = 50
    assert torch.equal(run(model, other, mask, [25, 1, 14]), want)


def test_float_and_boolean_masks_of_the_caller() -> None:
    """4-D masks go through as they are: True and 0 are seen, False and -inf are not."""
    model = apply(steady("glm_moe_dsa"), "bf16")
    ids, mask = padded_batch([0, 0], 30)
    want = run(model, ids, mask, None)
    causal = torch.ones(30, 30, dtype=torch.bool).tril().expand(2, 1, 30, 30)
    additive = torch.zeros(2, 1, 30, 30).masked_fill(~causal, float("-inf"))
    with torch.no_grad():
        for given in (causal, additive):
            assert torch.equal(model(ids, attention_mask=given).logits, want)


def test_wrong_scales_are_seen() -> None:
    """The comparison has been seen red: scales rounded down to powers of two fail it."""
    import sparse_mla

    model = steady("glm_moe_dsa")
    ids, mask = padded_batch([0, 2], 50)
    with altered(model, latent=through_layout("v32_fp8")):
        stored = run(model, ids, mask, None)
    latent = rounded_then_stored("v32_fp8")
    bound = rounding_bound(lambda: run(model, ids, mask, None), model, stored, latent)

    def faulty(q: torch.Tensor, cache: Any, indices: torch.Tensor, scale: float) -> torch.Tensor:
        pages = cache.pages.clone()
        wrong = sparse_mla.KVCache(pages, cache.page_size, cache.layout, cache.token_stride)
        scales = wrong.rows_view()[..., 512:528].contiguous().view(torch.float32)
        down = torch.exp2(torch.floor(torch.log2(scales)))
        wrong.rows_view()[..., 512:528] = down.view(torch.uint8)
        return sparse_mla.decode(q, wrong, indices, scale=scale)[0]

    apply(model, "v32_fp8")
    assert rel_l2(run(model, ids, mask, None), stored) <= bound
    restore(model)
    apply(model, "v32_fp8", attend=faulty)
    assert rel_l2(run(model, ids, mask, None), stored) > 3 * bound
