"""Bad input to apply, restore and the caches: one clear error, and nothing half-patched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")

from tiny_models import KINDS, padded_batch, run, steady, tiny
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sparse_mla.integrations import transformers as integration
from sparse_mla.integrations.transformers import DecodeGraph, PagedCache, apply, restore


def state(model: nn.Module) -> list[Any]:
    """Everything that a patch could leave behind."""
    found: list[Any] = []
    for name, module in model.named_modules():
        own = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
        extra = sorted(k for k in module.__dict__ if "sparse_mla" in k)
        hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
        config = getattr(module, "config", None)
        how = getattr(config, "_attn_implementation", None)
        found.append((name, sorted(own), extra, hooks, how, "forward" in module.__dict__))
    return found


def refused(model: nn.Module, match: str, **arguments: Any) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=match):
        apply(model, **arguments)
    assert state(model) == before


def test_nothing_is_patched_at_import() -> None:
    assert integration.apply is apply
    assert "sparse_mla" not in str(state(tiny("glm_moe_dsa")))


@pytest.mark.parametrize("kind", KINDS)
def test_restore_leaves_nothing_behind(kind: str) -> None:
    model = tiny(kind, implementation="sdpa")
    before = state(model)
    ids, mask = padded_batch([0], 20)
    want = run(model, ids, mask, None)
    apply(model)
    assert state(model) != before
    run(model, ids, mask, [20])
    restore(model)
    assert state(model) == before
    assert torch.equal(run(model, ids, mask, None), want)


def test_unsupported_architecture() -> None:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    refused(LlamaForCausalLM(config), "LlamaForCausalLM and contains 0 supported decoders")
    refused(nn.Linear(2, 2), "Linear and contains 0 supported decoders")
    pair = nn.ModuleList([tiny("glm_moe_dsa"), tiny("deepseek_v32")])
    refused(pair, "contains 2 supported decoders")
    with pytest.raises(ValueError, match=r"model is str, must be a torch\.nn\.Module"):
        apply("zai-org/GLM-5")  # type: ignore[arg-type]


def test_dimensions() -> None:
    refused(tiny("glm_moe_dsa", kv_lora_rank=256), "kv_lora_rank is 256, layout v32_fp8 has 512")
    rope = tiny("glm_moe_dsa", qk_rope_head_dim=32)
    refused(rope, "qk_rope_head_dim is 32, layout v32_fp8 has 64")
    many = tiny("deepseek_v32", num_attention_heads=129, num_key_value_heads=129)
    refused(many, r"num_attention_heads is 129, must be 1\.\.128")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_layers(kind: str) -> None:
    model = tiny(kind)
    last = model.model.layers[-1]
    del model.model.layers[-1]
    refused(model, "has 2 layers, its config says num_hidden_layers is 3")
    model.model.layers.append(last)
    kept, last.self_attn = last.self_attn, nn.Identity()
    refused(model, r"layers\[2\]\.self_attn is Identity, must be")
    last.self_attn = kept
    restore(apply(model))


def test_arguments() -> None:
    model = tiny("glm_moe_dsa")
    refused(model, "layout is 'fp8', allowed: v32_fp8", layout="fp8")
    refused(model, "layout is 'bf16_nope', allowed: v32_fp8, bf16", layout="bf16_nope")
    for size in (0, -1, 2.5, True, "64"):
        refused(model, "page_size is .*, must be an integer >= 1", page_size=size)
    refused(model, "attend is 'cpu', must be callable", attend="cpu")
    refused(model.to("meta"), "on the meta device")


def test_twice_and_never() -> None:
    model = tiny("glm_moe_dsa")
    with pytest.raises(ValueError, match="not patched: there is nothing to restore"):
        restore(model)
    with pytest.raises(ValueError, match=r"GlmMoeDsaModel is not patched: call .*apply"):
        PagedCache(model)
    apply(model)
    refused(model, "patched already: restore")
    restore(model)


def test_an_error_while_patching_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("glm_moe_dsa")
    before = state(model)
    kind = type(model.model)
    right = kind.set_attn_implementation

    def failing(self: Any, name: str) -> None:
        if name == "sparse_mla":
            raise RuntimeError("no")
        right(self, name)

    monkeypatch.setattr(kind, "set_attn_implementation", failing)
    with pytest.raises(RuntimeError, match="no"):
        apply(model)
    assert state(model) == before


def test_a_copy_is_patched_on_its_own() -> None:
    model = steady("glm_moe_dsa")
    before = state(model)
    ids, mask = padded_batch([0], 20)
    plain = run(model, ids, mask, None)
    paged = run(apply(model), ids, mask, None)
    twin = copy.deepcopy(model)
    restore(twin)
    assert state(twin) == before
    assert torch.equal(run(twin, ids, mask, [20]), plain)
    assert torch.equal(run(model, ids, mask, [20]), paged)
    restore(model)
    assert state(model) == before


def test_no_gradient_is_made_up() -> None:
    model = apply(steady("glm_moe_dsa"))
    ids, _ = padded_batch([0], 8)
    loss = model(ids, labels=ids, use_cache=False).loss
    with pytest.raises(NotImplementedError, match=r"sparse_mla\.decode has no backward pass"):
        loss.backward()


def test_context_past_the_cache() -> None:
    model = apply(steady("glm_moe_dsa"), "v32_fp8", 16)
    ids, mask = padded_batch([0, 0], 40)
    past = PagedCache(model, 30)
    run(model, ids, mask, [29], past_key_values=past)
    pages = [layer.pool.pages.clone() for layer in past.layers]
    with pytest.raises(ValueError, match="the context would be 31 tokens, the cache holds 30"):
        model(ids[:, 29:31], attention_mask=mask[:, :31], past_key_values=past)
    assert past.length == 29
    for layer, was in zip(past.layers, pages, strict=True):
        assert torch.equal(layer.pool.pages, was)
        assert layer.length == 29
    want = run(model, ids, mask, [29, 1])[:, 29]
    with torch.no_grad():
        got = model(ids[:, 29:30], attention_mask=mask[:, :30], past_key_values=past).logits
    torch.testing.assert_close(got[:, 0], want)
    for length in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match=r"max_length is .*, must be None or an integer >= 1"):
            PagedCache(model, length)


def test_caches_that_do_not_fit() -> None:
    model = steady("glm_moe_dsa")
    ids, mask = padded_batch([0, 0], 20)
    full = DynamicCache(config=model.config)
    run(model, ids, mask, [20], past_key_values=full)
    apply(model, "v32_fp8", 16)
    with pytest.raises(ValueError, match="holds tokens that the unpatched model cached"):
        model(ids, past_key_values=full)
    with pytest.raises(ValueError, match="past_key_values is list, must be a transformers Cache"):
        model.model(ids, past_key_values=[])
    paged = PagedCache(model)
    run(model, ids, mask, [20], past_key_values=paged)
    with pytest.raises(ValueError, match="the batch is 1, the cache holds 2 sequences"):
        model(ids[:1], past_key_values=paged)
    restore(model)
    apply(model, "bf16", 16)
    with pytest.raises(ValueError, match="has v32_fp8 in pages of 16 tokens, the model bf16"):
        model(ids, past_key_values=paged)
    restore(model)
    with pytest.raises(ValueError, match="belongs to a model that was restored"):
        model(ids, past_key_values=paged)


def test_attention_weights_that_are_never_formed() -> None:
    model = apply(steady("glm_moe_dsa", attention_dropout=0.5)).train()
    ids, mask = padded_batch([0], 8)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.5, must be 0"):
        run(model, ids, mask, None)
    run(model.eval(), ids, mask, None)


def test_graphs_need_a_fixed_cache_on_a_gpu() -> None:
    model = apply(steady("glm_moe_dsa"))
    ids, mask = padded_batch([0], 8)
    with pytest.raises(ValueError, match="cache is NoneType, must be a PagedCache"):
        DecodeGraph(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache must have a max_length, and tokens in it"):
        DecodeGraph(model, PagedCache(model, 20))
    past = PagedCache(model, 20)
    run(model, ids, mask, [8], past_key_values=past)
    with pytest.raises(ValueError, match="the cache is on cpu, CUDA graphs need a GPU"):
        DecodeGraph(model, past)
