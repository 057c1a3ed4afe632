"""Random tiny GLM-5 and DeepSeek-V3.2 models, and what comparing two runs of one needs.

A run makes discrete decisions: the indexer selects tokens, the router experts. Where two candidates
are nearly tied, a rounding anywhere before flips the decision and the outputs differ by more than
rounding, in any two correct implementations. So the selection of one run is recorded and replayed
in the other, and every expert is chosen, unless a test says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

from sparse_mla.kv_layout import LAYOUTS

KINDS = ("glm_moe_dsa", "deepseek_v32")
VOCABULARY = 97

# The largest relative error of rounding to bf16 (8 bits of mantissa, to nearest), and to e4m3 (4
# bits) where it is not subnormal.
BF16 = 2.0**-9
E4M3 = 2.0**-4

_MODELS = {
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 80,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny(kind: str, seed: int = 0, implementation: str = "eager", **changes: Any) -> Any:
    """A random float32 model in eval mode; the same weights for the same arguments."""
    torch.manual_seed(seed)
    config_class, model_class = _MODELS[kind]
    config = config_class(**{**_BASE, **changes})
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        # Norms start at one and would hide a weight that is left out.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return model


def steady(kind: str, layers: int = 3, **changes: Any) -> Any:
    """A model whose selections do not flip: they depend on the embeddings alone.

    The first layer selects before any attention has run; GLM's other layers share its selection,
    and DeepSeek has no other layer. Many index heads: with few, all of a token's products may be
    negative, and tokens that score exactly 0 are tied.
    """
    changes = {"index_n_heads": 32, **changes}
    if kind == "deepseek_v32" or layers == 1:
        return tiny(kind, num_hidden_layers=1, **changes)
    types = ["full", *["shared"] * (layers - 1)]
    return tiny(kind, num_hidden_layers=layers, indexer_types=types, **changes)


def drawn(kind: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """A random configuration's model, and a random way to run it."""
    draw = random.Random(f"{kind} {seed}")
    heads, layers = draw.choice([1, 2, 5, 8]), draw.randint(1, 4)
    changes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "q_lora_rank": draw.choice([16, 48]),
        "qk_nope_head_dim": draw.choice([8, 24, 128]),
        "v_head_dim": draw.choice([8, 32, 128]),
        "index_topk": draw.choice([3, 16, 64]),
        "index_n_heads": draw.choice([1, 4]),
        "index_head_dim": draw.choice([64, 128]),
        "initializer_range": draw.choice([0.03, 0.1, 0.15]),
        "attention_bias": draw.random() < 0.5,
        "first_k_dense_replace": draw.randint(0, layers),
    }
    if kind == "glm_moe_dsa":
        shared = [draw.choice(["full", "shared"]) for _ in range(layers - 1)]
        changes["indexer_types"] = ["full", *shared]
    if draw.random() < 0.4:
        changes["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
        }
    batch = draw.choice([1, 2, 3])
    lengths = [draw.choice([1, 7, 40])]
    while sum(lengths) < 70:
        lengths.append(draw.choice([1, 1, 2, 9, 30]))
    return tiny(kind, seed, **changes), {
        "page_size": draw.choice([1, 2, 16, 53, 64]),
        "padding": [draw.randint(0, lengths[0] - 1) for _ in range(batch)],
        "lengths": lengths,
    }


def padded_batch(padding: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [b, length] and their mask, padded on the left."""
    ids = torch.randint(2, VOCABULARY, (len(padding), length))
    mask = torch.arange(length) >= torch.tensor(padding)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


@torch.no_grad()
def run(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, lengths: list[int] | None, **kwargs: Any
) -> torch.Tensor:
    """Logits [b, length, vocabulary] of real tokens, 0 at padding.

    In pieces of the given lengths over a cache, or without a cache if there are none.
    """
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if lengths is None:
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return logits * mask[..., None]
    past, start, parts = kwargs.pop("past_key_values", None), 0, []
    for length in lengths:
        end = start + length
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=past,
            use_cache=True,
            **kwargs,
        )
        past, start = out.past_key_values, end
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    return logits * mask[:, : logits.shape[1], None]


def rel_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _indexers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("Indexer")]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """The selections of each indexer, call by call."""
    tape: list[list[torch.Tensor]] = []
    handles = []
    for indexer in _indexers(model):
        calls: list[torch.Tensor] = []
        tape.append(calls)

        def keep(module: Any, args: Any, out: Any, calls: list[torch.Tensor] = calls) -> None:
            calls.append(out)

        handles.append(indexer.register_forward_hook(keep))
    yield tape
    for handle in handles:
        handle.remove()


@contextmanager
def replayed(model: nn.Module, tape: list[list[torch.Tensor]]) -> Iterator[None]:
    """Every indexer runs, and answers what it did when it was recorded."""
    handles = []
    for indexer, calls in zip(_indexers(model), tape, strict=True):
        left = iter(calls)

        def answer(module: Any, args: Any, out: Any, left: Any = left) -> torch.Tensor:
            was = next(left)
            assert was.shape == out.shape
            return was

        handles.append(indexer.register_forward_hook(answer))
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def altered(
    model: nn.Module,
    latent: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rope: Callable[[torch.Tensor], torch.Tensor] | None = None,
    query: Callable[[torch.Tensor], torch.Tensor] | None = None,
    out: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[None]:
    """The unpatched model with changed latents, RoPE keys, queries or attention outputs."""
    handles = []
    for module in model.modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        if latent is not None:
            hook = lambda m, a, o: latent(o)  # noqa: E731
            handles.append(module.kv_a_layernorm.register_forward_hook(hook))
        if rope is not None:

            def turn(m: Any, a: Any, o: torch.Tensor) -> torch.Tensor:
                return torch.cat([o[..., :-64], rope(o[..., -64:])], dim=-1)

            handles.append(module.kv_a_proj_with_mqa.register_forward_hook(turn))
        if query is not None:
            hook = lambda m, a, o: query(o)  # noqa: E731
            handles.append(module.q_b_proj.register_forward_hook(hook))
        if out is not None:
            handles.append(module.o_proj.register_forward_pre_hook(lambda m, a: (out(a[0]),)))
    yield
    for handle in handles:
        handle.remove()


def noise(size: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multiplies every value by its own 1 + uniform(-size, size): what a rounding does at most."""
    return lambda x: x * (1 + size * (2 * torch.rand_like(x) - 1))


def rounding_bound(
    run_model: Callable[[], torch.Tensor],
    model: Any,
    want: torch.Tensor,
    latent: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """How far the roundings of attention over a paged cache move the model's logits, relative L2.

    What is rounded to bf16 there: the absorbed query, the cached RoPE keys and the sum of latents;
    `latent` says what happens to the cached latents. These local errors are known; how a model
    passes them on is not, so the unpatched model is asked: the roundings are injected as noise
    where they happen, and its own logits tell. Twice the worst of four draws, because the query is
    rounded after W_UK in the absorbed form and before it here, which gives the attention logits
    the same error on average over random weights, not for each of them.
    """
    moved = []
    for seed in range(4):
        torch.manual_seed(1000 + seed)
        rounded = noise(BF16)
        with altered(model, latent=latent, rope=rounded, query=rounded, out=rounded):
            moved.append(rel_l2(run_model(), want))
    return 2 * max(moved)


def rounded_then_stored(layout: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents with an error like bf16's, as a layout stores them.

    The layers before have moved a latent by about that much; where it lay near the boundary
    between two e4m3 numbers, it is then stored as the other one.
    """
    rounded, stored = noise(BF16), through_layout(layout)
    return lambda latent: stored(rounded(latent))


def through_layout(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents as a layout stores them, read back exactly."""
    layout = LAYOUTS[name]

    def trip(latent: torch.Tensor) -> torch.Tensor:
        flat = latent.reshape(-1, latent.shape[-1])
        rows, footers = layout.pack(flat, flat.new_zeros(flat.shape[0], 64))
        back = layout.unpack(rows, footers)[:, : flat.shape[1]]
        return back.to(latent.dtype).view(latent.shape)

    return trip
