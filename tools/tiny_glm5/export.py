"""Writes a trained model in the form that AutoModelForCausalLM and AutoTokenizer read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparse_mla.evals.problems.vocabulary import EOS, PAD, PATTERN, UNKNOWN, vocabulary

from .config import write_config
from .model import TinyGlm5

# transformers keeps it in float32 when it loads the model in bf16.
_FLOAT32 = "e_score_correction_bias"


def hub_tensors(model: TinyGlm5) -> dict[str, torch.Tensor]:
    """The weights under the names of the published GLM-5 checkpoints, one tensor per expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        kept = torch.float32 if name.endswith(_FLOAT32) else torch.bfloat16
        weight = weight.detach().to("cpu", kept)
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            for i, both in enumerate(weight):
                gate, up = both.chunk(2)
                tensors[f"{base}{i}.gate_proj.weight"] = gate.clone()
                tensors[f"{base}{i}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            for i, down in enumerate(weight):
                tensors[f"{base}{i}.down_proj.weight"] = down.clone()
        else:
            tensors[name] = weight.contiguous()
    return tensors


def tokenizer_json() -> dict[str, object]:
    """tokenizer.json: whole words are looked up, other text falls apart into characters."""
    ids = vocabulary()
    special = [
        {
            "id": ids[token], "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for token in (PAD, UNKNOWN, EOS)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": ids,
            "merges": [],
        },
    }


def tokenizer_config(length: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "padding_side": "left",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }


def export(model: TinyGlm5, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """model.safetensors, config.json, generation_config.json and the tokenizer's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        hub_tensors(model), folder / "model.safetensors", {"format": "pt", **(metadata or {})}
    )
    write_config(model.shape, folder)
    for name, values in (
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", tokenizer_config(model.shape.max_position_embeddings)),
    ):
        text = json.dumps(values, indent=1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
