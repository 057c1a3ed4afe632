"""LoRA on the attention projections of a patched model: absorbed weights follow the adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")
pytest.importorskip("peft", reason="peft is not installed")

import peft
from tiny_models import BF16, KINDS, noise, padded_batch, rel_l2, rounding_bound, run, steady

from sparse_mla.integrations.transformers import apply, restore

TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def adapted(kind: str, targets: list[str] = TARGETS, **options: Any) -> Any:
    """A model under a random adapter, large enough to matter."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
    model = peft.get_peft_model(steady(kind), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [TARGETS, ["kv_b_proj"]], ids=["all", "kv_b"])
@pytest.mark.parametrize("dora", [False, True])
def test_logits_follow_the_adapter(kind: str, targets: list[str], dora: bool) -> None:
    """On, off, merged, unmerged, changed and switched, patched once: as the unabsorbed model's."""
    model, reference = (adapted(kind, targets, use_dora=dora) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    ids, mask = padded_batch([0, 7], 50)
    lengths = [40, 1, 9]
    apply(model, "bf16", 16)
    seen: list[torch.Tensor] = []

    def compare() -> None:
        def run_reference() -> torch.Tensor:
            return run(reference, ids, mask, lengths)

        want = run_reference()
        # A step that changed nothing would test nothing.
        assert all(rel_l2(want, before) > 10 * BF16 for before in seen)
        bound = rounding_bound(run_reference, reference, want, noise(BF16))
        assert rel_l2(run(model, ids, mask, lengths), want) <= bound
        seen.append(want)

    compare()
    with model.disable_adapter(), reference.disable_adapter():
        compare()
    seen.clear()
    for one in (model, reference):
        one.merge_adapter()
    compare()
    for one in (model, reference):
        one.unmerge_adapter()
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2)
    compare()
    for one in (model, reference):
        torch.manual_seed(4)
        one.add_adapter("other", peft.LoraConfig(r=2, target_modules=targets))
        one.set_adapter("other")
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_B.other" in name:
                    parameter.normal_(std=0.3)
    compare()
    merged, plain = model.merge_and_unload(), reference.merge_and_unload()
    want = run(plain, ids, mask, lengths)
    assert rel_l2(run(merged, ids, mask, lengths), want) <= rounding_bound(
        lambda: run(plain, ids, mask, lengths), plain, want, noise(BF16)
    )
    restore(merged)


@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_biases_of_an_adapter() -> None:
    """A bias of kv_b_proj: the softmax drops the keys', the values' reaches the output."""
    model, reference = (adapted("glm_moe_dsa", lora_bias=True) for _ in range(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    reference.load_state_dict(model.state_dict())
    ids, mask = padded_batch([0, 7], 50)
    want = run(reference, ids, mask, None)
    bound = rounding_bound(lambda: run(reference, ids, mask, None), reference, want, noise(BF16))
    apply(model, "bf16")
    assert rel_l2(run(model, ids, mask, None), want) <= bound


def test_generate_through_an_adapter_that_came_later() -> None:
    reference = adapted("glm_moe_dsa")
    plain = apply(steady("glm_moe_dsa"), "bf16")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = peft.get_peft_model(plain, config).eval()
    model.load_state_dict(reference.state_dict())
    ids, mask = padded_batch([0, 7], 30)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = reference.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, **options), want)
    restore(model)
    assert torch.equal(model.generate(input_ids=ids, **options), want)


def test_a_stale_copy_of_the_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red: absorbed weights from before the adapter miss the bound by far."""
    from sparse_mla.integrations.transformers import attention

    model = adapted("glm_moe_dsa")
    ids, mask = padded_batch([0, 7], 30)
    want = run(model, ids, mask, None)
    bound = rounding_bound(lambda: run(model, ids, mask, None), model, want, noise(BF16))
    apply(model, "bf16")
    right = attention.expansion

    def stale(module: Any, rank: int, dtype: torch.dtype) -> Any:
        kept, module.kv_b_proj = module.kv_b_proj, module.kv_b_proj.base_layer
        parts = right(module, rank, dtype)
        module.kv_b_proj = kept
        return parts

    monkeypatch.setattr(attention, "expansion", stale)
    assert rel_l2(run(model, ids, mask, None), want) > 3 * bound
