"""generate() on a patched model: greedy, sampling, beams, assisted; caches that are cut and reused.

What is generated is judged by the unpatched model: at every step it is given the same tokens, and
its logits say whether the choice was right to within the rounding bound.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packaging.version import Version

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")

import transformers
from tiny_models import (
    BF16,
    E4M3,
    KINDS,
    noise,
    padded_batch,
    rel_l2,
    rounding_bound,
    run,
    steady,
    tiny,
)
from transformers import CompileConfig, DynamicCache, StaticCache

from sparse_mla.integrations.transformers import PagedCache, apply, restore
from sparse_mla.integrations.transformers.cache import PagedLayer

PADDING, PROMPT, NEW = [0, 4], 30, 12


class Judge:
    """The unpatched model's own logits for what the patched one generated."""

    def __init__(self, kind: str, latent: float = E4M3, **changes: Any) -> None:
        self.model = steady(kind, **changes)
        self.patched = steady(kind, **changes)
        self.latent = latent
        self.ids, self.mask = padded_batch(PADDING, PROMPT)

    def logits(self, sequences: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logits of the new tokens' positions [b, new, vocabulary], and the bound on each one."""
        added = sequences.shape[1] - mask.shape[1]
        # The same steps as generate()'s: tokens that score almost the same are selected by the last
        # bit, and that depends on the shapes, in transformers too.
        steps = [mask.shape[1], *[1] * added]
        mask = torch.nn.functional.pad(mask, (0, added), value=1)

        def run_model() -> torch.Tensor:
            return run(self.model, sequences, mask, steps)

        want = run_model()
        bound = rounding_bound(run_model, self.model, want, noise(self.latent))
        # A bound on the relative L2 norm, as one on a single logit: errors are spread evenly, and
        # five standard deviations hold for a few thousand of them.
        return want[:, -added - 1 : -1], 5 * bound * float(want.square().mean().sqrt())

    def assert_greedy(self, sequences: torch.Tensor, mask: torch.Tensor) -> None:
        logits, slack = self.logits(sequences, mask)
        new = sequences[:, -logits.shape[1] :]
        lost = logits.amax(-1) - logits.gather(2, new[..., None])[..., 0]
        assert float(lost.max()) <= 2 * slack
        # The slack would pass nothing else: random tokens lose far more.
        other = logits.gather(2, torch.randint_like(new, 2, 97)[..., None])[..., 0]
        assert float((logits.amax(-1) - other).median()) > 2 * slack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["bf16", "v32_fp8"])
def test_greedy(kind: str, layout: str) -> None:
    judge = Judge(kind, BF16 if layout == "bf16" else E4M3)
    model = apply(judge.patched, layout, 16)
    options = {"max_new_tokens": NEW, "do_sample": False}
    got = model.generate(judge.ids, attention_mask=judge.mask, **options)
    judge.assert_greedy(got, judge.mask)
    chunked = model.generate(judge.ids, attention_mask=judge.mask, prefill_chunk_size=7, **options)
    judge.assert_greedy(chunked, judge.mask)
    static = model.generate(
        judge.ids, attention_mask=judge.mask, cache_implementation="static", **options
    )
    judge.assert_greedy(static, judge.mask)
    if layout == "bf16":
        want = judge.model.generate(judge.ids, attention_mask=judge.mask, **options)
        assert torch.equal(got, want)


def test_generate_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a static cache transformers compiles the model, on any device if told to."""

    def compiled(self: Any, config: Any) -> Any:
        raise RuntimeError("compiled")

    model = steady("glm_moe_dsa")
    monkeypatch.setattr(type(model), "get_compiled_call", compiled)
    config = CompileConfig()
    config._compile_all_devices = True
    ids, mask = padded_batch([0], 20)
    options = {"attention_mask": mask, "max_new_tokens": 3, "cache_implementation": "static"}
    options |= {"compile_config": config, "do_sample": False}
    with pytest.raises(RuntimeError, match="compiled"):
        model.generate(ids, **options)
    apply(model, "bf16")
    got = model.generate(ids, **options)
    restore(model)
    with pytest.raises(RuntimeError, match="compiled"):
        model.generate(ids, **options)
    del options["compile_config"], options["cache_implementation"]
    assert torch.equal(model.generate(ids, **options), got)


@pytest.mark.parametrize("kind", KINDS)
def test_a_faulty_cache_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red: with slots that are off by one, what is generated is not greedy."""
    judge = Judge(kind)
    model = apply(judge.patched, "v32_fp8", 16)
    right = PagedLayer.slots
    monkeypatch.setattr(PagedLayer, "slots", lambda self, p, v: right(self, p, v) - 1)
    got = model.generate(judge.ids, attention_mask=judge.mask, max_new_tokens=NEW)
    with pytest.raises(AssertionError):
        judge.assert_greedy(got, judge.mask)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling(kind: str) -> None:
    """Returned logits are the unpatched model's, and several sequences per prompt are right."""
    judge = Judge(kind, BF16)
    model = apply(judge.patched, "bf16", 16)
    out = model.generate(
        judge.ids,
        attention_mask=judge.mask,
        max_new_tokens=NEW,
        do_sample=True,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits, slack = judge.logits(out.sequences, judge.mask.repeat_interleave(3, 0))
    assert out.sequences.shape == (6, PROMPT + NEW)
    got = torch.stack(out.logits, dim=1)
    assert float((got - logits).abs().max()) <= slack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_beams(kind: str, static: bool) -> None:
    """Beam search reorders the cache: the scores it returns are those of the sequences."""
    judge = Judge(kind, BF16)
    model = apply(judge.patched, "bf16", 4)
    out = model.generate(
        judge.ids,
        attention_mask=judge.mask,
        max_new_tokens=NEW,
        num_beams=4,
        num_return_sequences=2,
        output_scores=True,
        return_dict_in_generate=True,
        cache_implementation="static" if static else None,
    )
    beams = torch.stack(list(out.beam_indices))
    assert len(set(beams.flatten().tolist())) > 2, "no beam changed its row, nothing was reordered"
    logits, slack = judge.logits(out.sequences, judge.mask.repeat_interleave(2, 0))
    new = out.sequences[:, -NEW:]
    score = logits.log_softmax(-1).gather(2, new[..., None])[..., 0].mean(1)
    assert float((score - out.sequences_scores).abs().max()) <= 2 * slack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [None, 64])
def test_assisted(kind: str, max_length: int | None) -> None:
    """Draft tokens are rejected and cropped from the cache; s_q is above 1 in every step."""
    judge = Judge(kind)
    model = apply(judge.patched, "v32_fp8", 4)
    draft = tiny(kind, seed=9, num_hidden_layers=1)
    ids, mask = judge.ids[:1], judge.mask[:1]
    cropped: list[int] = []
    crop = PagedLayer.crop

    def counted(self: PagedLayer, tokens: int) -> None:
        cropped.append(tokens)
        crop(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedLayer, "crop", counted)
        cache = PagedCache(model, max_length)
        got = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            assistant_model=draft,
            past_key_values=cache,
        )
    assert any(tokens < 0 for tokens in cropped)
    judge.assert_greedy(got, mask)
    looked_up = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3
    )
    judge.assert_greedy(looked_up, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [None, 64])
def test_crop_forgets(kind: str, max_length: int | None) -> None:
    """What was cropped leaves no trace: the same as if it had never been there."""
    model = apply(steady(kind), "v32_fp8", 16)
    ids, mask = padded_batch([0, 3], 50)
    want = run(model, ids, mask, [40, 1, 9])
    past = PagedCache(model, max_length)
    other = ids.clone()
    other[:, 40:] = 5
    run(model, other, mask, [40, 10], past_key_values=past)
    past.crop(-10)
    assert past.length == 40 == int(past.get_seq_length())
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for start, end in ((40, 41), (41, 50)):
            logits = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
            ).logits
            assert torch.equal(logits, want[:, start:end])
    for wrong in (1, -51):
        with pytest.raises(ValueError, match=f"tokens_to_remove is {wrong}, must be from -50 to 0"):
            past.crop(wrong)
    past.reset()
    again = run(model, ids, mask, [40, 1, 9], past_key_values=past)
    assert torch.equal(again, want)


def test_caches_of_the_caller_are_paged_in_place() -> None:
    model = apply(steady("glm_moe_dsa"), "v32_fp8", 16)
    ids, mask = padded_batch([0], 20)
    want = run(model, ids, mask, [15, 5])
    for past in (
        DynamicCache(config=model.config),
        DynamicCache(),
        StaticCache(config=model.config, max_cache_len=33),
    ):
        got = run(model, ids, mask, [15, 5], past_key_values=past)
        assert rel_l2(got, want) <= BF16
        assert all(isinstance(layer, PagedLayer) for layer in past.layers)
        assert past.get_max_length() in (-1, 33)


def test_a_prefix_can_be_copied_and_continued() -> None:
    """copy.deepcopy of a prefilled cache, as transformers' own page on prompt reuse has it."""
    model = apply(steady("glm_moe_dsa"), "v32_fp8", 16)
    ids, mask = padded_batch([0], 40)
    prefix = PagedCache(model)
    run(model, ids[:, :30], mask[:, :30], [30], past_key_values=prefix)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, **options)
    for _ in range(2):
        got = model.generate(ids, past_key_values=copy.deepcopy(prefix), **options)
        assert torch.equal(got, want)
    assert prefix.length == 30


def test_a_cache_can_be_reset_for_another_batch() -> None:
    model = apply(steady("glm_moe_dsa"), "v32_fp8", 16)
    past = PagedCache(model)
    for padding in ([0, 3], [1], [0, 0, 5]):
        ids, mask = padded_batch(padding, 20)
        want = run(model, ids, mask, [15, 5])
        assert torch.equal(run(model, ids, mask, [15, 5], past_key_values=past), want)
        past.reset()
        assert past.length == 0


def test_rows_can_be_repeated_and_selected() -> None:
    model = apply(steady("glm_moe_dsa"), "v32_fp8", 4)
    ids, mask = padded_batch([0, 3], 30)
    rows = torch.tensor([1, 1, 0, 0])
    want = run(model, ids[rows], mask[rows], [21, 9])[:, 21:]
    past = PagedCache(model)
    run(model, ids[:, :21], mask[:, :21], [21], past_key_values=past)
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([2, 3, 0, 1]))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        got = model(
            ids[rows, 21:],
            attention_mask=mask[rows],
            position_ids=positions[rows, 21:],
            past_key_values=past,
        ).logits
    assert rel_l2(got, want) <= BF16


@pytest.mark.parametrize("layout", ["bf16", "v32_fp8"])
def test_memory_in_the_shape_of_glm5(layout: str) -> None:
    """Bytes per token and layer, measured on both sides: GLM-5's heads, few other weights."""
    model = steady(
        "glm_moe_dsa",
        num_attention_heads=64,
        num_key_value_heads=64,
        qk_nope_head_dim=192,
        v_head_dim=256,
    ).bfloat16()
    ids, mask = padded_batch([0, 0], 64)
    tokens = 2 * 64 * model.config.num_hidden_layers
    theirs = DynamicCache(config=model.config)
    run(model, ids, mask, [60, 4], past_key_values=theirs)
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers) / tokens
    apply(model, layout, 16)
    ours = PagedCache(model)
    run(model, ids, mask, [60, 4], past_key_values=ours)
    assert ours.nbytes / tokens == {"bf16": 1152, "v32_fp8": 656}[layout]
    if Version(transformers.__version__) < Version("5.18"):
        assert per_token == 65536
        assert per_token >= 50 * ours.nbytes / tokens
    else:
        # Later versions cache the latents in bf16, and expand all of them at every step.
        assert per_token == 1152
