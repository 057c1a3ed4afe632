"""The small model's shape: GLM-5's architecture, each width cut down but the cache's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_mla.evals.problems.vocabulary import EOS, PAD, vocabulary


@dataclass(frozen=True)
class Shape:
    """Names as in transformers' GlmMoeDsaConfig.

    The latent's width and RoPE's are GLM-5's own (the cache rows are what this model is for);
    index_topk is an eighth of what a prompt with six worked problems needs, and more.
    """

    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    index_topk: int = 128
    index_head_dim: int = 128
    index_n_heads: int = 4
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def vocab_size(self) -> int:
        return -(-len(vocabulary()) // 16) * 16

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_dense(self, layer: int) -> bool:
        """Whether the layer has a plain MLP in place of experts."""
        return layer < self.first_k_dense_replace


TINY = Shape()

# Seconds on a CPU: for tests of the whole path.
SMALLEST = replace(
    TINY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    moe_intermediate_size=32,
    n_routed_experts=4,
    kv_lora_rank=512,
    q_lora_rank=64,
    index_head_dim=64,
    index_n_heads=2,
)


def config_json(shape: Shape) -> dict[str, object]:
    """What AutoModelForCausalLM reads."""
    ids = vocabulary()
    own = {
        name: getattr(shape, name) for name in Shape.__dataclass_fields__ if name != "rope_theta"
    }
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        **own,
        "vocab_size": shape.vocab_size,
        "num_key_value_heads": shape.num_attention_heads,
        "indexer_types": ["full"] * shape.num_hidden_layers,
        "mlp_layer_types": [
            "dense" if shape.is_dense(i) else "sparse" for i in range(shape.num_hidden_layers)
        ],
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "pad_token_id": ids[PAD],
        "bos_token_id": None,
        "eos_token_id": ids[EOS],
        "use_cache": True,
        "dtype": "bfloat16",
    }


def write_config(shape: Shape, folder: Path) -> None:
    """config.json and generation_config.json."""
    from sparse_mla.evals.problems.vocabulary import end_id

    ids = vocabulary()
    generation = {
        "pad_token_id": ids[PAD],
        "eos_token_id": [ids[EOS], end_id()],
        "do_sample": False,
    }
    for name, values in (
        ("config.json", config_json(shape)),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
