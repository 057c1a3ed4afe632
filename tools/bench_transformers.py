"""GLM-5's shape in transformers, with and without the paged latent cache: memory and speed.

    python tools/bench_transformers.py --layers 4 --context 32768 --batch 8

A random model of GLM-5's dimensions is made on the GPU, and its caches are filled with the same
random latents. Before anything is timed, one decode step's logits are compared, with the same
tokens selected and the same experts chosen (in a random model near ties are everywhere, and bf16
flips them); a step that differs by more than FP8's rounding ends the run. Every line that is
printed is a JSON object; --write puts the table of the newest committed rows into
docs/transformers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, GlmMoeDsaConfig, GlmMoeDsaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from sparse_mla.integrations.transformers import DecodeGraph, PagedCache, apply, restore

# transformers 5.17 caches expanded keys and values, later versions the latents.
EXPANDED = Version(transformers.__version__) < Version("5.18")

# e4m3 rounds latents by 2^-4 at most, 0.03 on average, and attention's output is one of a layer's
# two contributions; a wrong slot gives an error of order 1.
MAX_ERROR = 0.06


ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- table: tools/bench_transformers.py --write -->", "<!-- end of table -->"


def main() -> int:
    arguments = parse()
    if arguments.write:
        DOCUMENT.write_text(updated(DOCUMENT.read_text()))
        return 0
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    model = glm5(arguments.layers, arguments.context + 4096)
    shape = {"layers": arguments.layers, "context": arguments.context, "batch": arguments.batch}
    say(what="model", seconds=time.perf_counter() - started, gib=gib(), **shape, **machine())
    if not arguments.no_decode:
        decode(model, arguments)
    if not arguments.no_prefill:
        prefill(model, arguments)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layout", default="v32_fp8")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of its pieces")
    parser.add_argument("--prefill-batch", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="only update docs/transformers.md")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--no-prefill", action="store_true")
    return parser.parse_args()


def glm5(layers: int, positions: int) -> Any:
    """A random model of GLM-5's dimensions, the last layer with experts, the rest dense."""
    config = GlmMoeDsaConfig(
        num_hidden_layers=layers,
        first_k_dense_replace=layers - 1,
        max_position_embeddings=positions,
        eos_token_id=None,
    )
    with torch.device("cuda"):
        model = GlmMoeDsaForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def decode(model: Any, arguments: argparse.Namespace) -> None:
    """Decode steps at the full context: sdpa over both of transformers' caches, then ours."""
    batch, context, steps = arguments.batch, arguments.context, arguments.steps
    room = context + 2 * steps + 8
    tokens = torch.randint(2, 1000, (batch, 1), device="cuda")
    sides: dict[str, Callable[[], Cache]] = {
        "sdpa, dynamic cache": lambda: DynamicCache(config=model.config),
        "paged": lambda: PagedCache(model, room),
        "sdpa, static cache": lambda: StaticCache(config=model.config, max_cache_len=room),
    }
    want: torch.Tensor | None = None
    tape: dict[str, Any] = {}
    for side, make in sides.items():
        if side == "paged":
            apply(model, arguments.layout)
        try:
            cache = make()
            fill(model, cache, batch, context, static=room if "static" in side else None)
            held = held_bytes(cache) / (batch * context * arguments.layers)
            step = eager_step(model, cache)
            with decisions(model, tape):
                logits = step(tokens).float()
            error = None if want is None else rel_l2(logits, want)
            want = logits if want is None else want
            if error is not None and not error < MAX_ERROR:
                raise SystemExit(f"{side}: logits differ by {error}, allowed {MAX_ERROR}")
            row = {"side": side, "bytes_per_token_and_layer": held, "logits_rel_l2": error}
            say(what="decode", how="eager", **row, **timed(step, tokens, steps), gib=gib())
            if side == "paged":
                graph = DecodeGraph(model, cache)
                replay = lambda ids, graph=graph: graph.step(ids).logits  # noqa: E731
                say(what="decode", how="graph", **row, **timed(replay, tokens, steps), gib=gib())
                del graph, replay
        except torch.OutOfMemoryError as error_:
            say(what="decode", side=side, error=str(error_).splitlines()[0])
        cache = step = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
        if side == "paged":
            restore(model)


def prefill(model: Any, arguments: argparse.Namespace) -> None:
    """A prompt in pieces, from empty: the indexer's work is the same on both sides."""
    ids = torch.randint(2, 1000, (arguments.prefill_batch, arguments.prefill), device="cuda")
    for side in ("sdpa", "paged"):
        if side == "paged":
            apply(model, arguments.layout)
        seconds = []
        for _ in range(2):
            cache = PagedCache(model) if side == "paged" else DynamicCache(config=model.config)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for piece in ids.split(arguments.chunk, dim=1):
                model(piece, past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        # The first round compiles kernels.
        row = {"batch": arguments.prefill_batch, "tokens": arguments.prefill}
        say(what="prefill", side=side, seconds=seconds[-1], first=seconds[0], gib=gib(), **row)
        del cache
        torch.cuda.empty_cache()
    restore(model)


def fill(model: Any, cache: Cache, batch: int, context: int, static: int | None) -> None:
    """Give every layer the same random tokens, whatever the cache keeps of them."""
    config = model.config
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    paged = isinstance(cache, PagedCache)
    for i, layer in enumerate(cache.layers):
        latent = random(batch, 1, context, config.kv_lora_rank)
        rope = random(batch, 1, context, config.qk_rope_head_dim)
        if paged or not EXPANDED:
            cache.update(latent, rope, i)
        else:
            keep_expanded(layer, model.model.layers[i].self_attn, latent, rope, static)
        cache.update_indexer(random(batch, context, config.index_head_dim), i)


def keep_expanded(
    layer: Any, attention: Any, latent: torch.Tensor, rope: torch.Tensor, static: int | None
) -> None:
    """Expanded keys and values, a sequence at a time: all at once would not fit beside the rest."""
    batch, _, context, _ = latent.shape
    keys = values = None
    for b in range(batch):
        key, value = attention.expand_kv(latent[b : b + 1], rope[b : b + 1])
        if b == 0:
            length = static or context
            shape = (batch, key.shape[1], length)
            keys, values = (
                key.new_zeros(*shape, key.shape[3]),
                key.new_zeros(*shape, value.shape[3]),
            )
        keys[b, :, :context], values[b, :, :context] = key[0], value[0]
        del key, value
    if static is None:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    else:
        empty = keys[:, :, :0]
        layer.max_cache_len, kept = 0, layer.max_cache_len
        layer.lazy_initialization(empty, values[:, :, :0])
        layer.max_cache_len, layer.keys, layer.values = kept, keys, values
        layer.cumulative_length.fill_(context)


@contextmanager
def decisions(model: Any, tape: dict[str, Any]) -> Iterator[None]:
    """Keep what indexers and routers decide; once kept, they decide the same again."""

    def hook(name: str) -> Callable[..., Any]:
        return lambda module, args, out: tape.setdefault(name, out)

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Indexer", "TopkRouter"))
    ]
    yield
    for handle in handles:
        handle.remove()


def held_bytes(cache: Cache) -> int:
    """What the cache holds of tokens, without the indexer's keys, which are the same everywhere."""
    if isinstance(cache, PagedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def eager_step(model: Any, cache: Cache) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: model(ids, past_key_values=cache, use_cache=True).logits


def timed(
    step: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, steps: int
) -> dict[str, float]:
    """Milliseconds of a decode step, the median of `steps`, each fed the last one's choice."""
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        tokens = step(tokens)[:, -1:].argmax(-1)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    median = sorted(times)[len(times) // 2]
    return {"ms": median, "tokens_per_s": tokens.shape[0] * 1000 / median}


def rel_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def gib() -> float:
    return torch.cuda.memory_allocated() / 2**30


def machine() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """Of the tree that runs; the environment may say it where there is no repository."""
    named = os.environ.get("SPARSE_MLA_COMMIT")
    if named:
        return named[:7]
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def updated(text: str) -> str:
    """The document with the table of the newest rows between its two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{DOCUMENT.name} must hold {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    newest = max((ROOT / "benchmarks" / "transformers").glob("*.jsonl"))
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def table(rows: list[dict[str, Any]]) -> str:
    """A run's rows as Markdown."""
    made = next(row for row in rows if row["what"] == "model")
    steps = [row for row in rows if row["what"] == "decode" and "ms" in row]
    base = steps[0]["tokens_per_s"]
    lines = [
        f"{made['gpu']}, torch {made['torch']}, transformers {made['transformers']}, commit "
        f"{made['commit']}" + (f"; {made['note']}" if "note" in made else "") + ":",
        "",
        "| attention and cache | bytes per token and layer | decode step | tokens/s | beside the "
        "first line |",
        "|---|---|---|---|---|",
    ]
    for row in steps:
        name = f"{row['side']}, {row['how']}"
        lines.append(
            f"| {name} | {row['bytes_per_token_and_layer']:.0f} | {row['ms']:.1f} ms | "
            f"{row['tokens_per_s']:.0f} | {row['tokens_per_s'] / base:.1f}x |"
        )
    for row in rows:
        if row["what"] == "prefill":
            size = f"{row['batch']} x {row['tokens']} tokens"
            lines += ["", f"Prefill of {size}, {row['side']}: {row['seconds']:.2f} s."]
    return "\n".join(lines)


def say(**row: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
