"""Activations of a real language model in the form the ops take: sparse MLA rows.

The package holds queries, keys and values of three layers of SmolLM2-135M-Instruct, taken while
it read GSM8K (data/README.md says how, tools/capture_activations.py is the program). The model
has 9 query heads on 3 KV heads of 64, and that is MQA over one latent row: keys and values of
the three KV heads lie in disjoint slots of the row, and a query head is zero outside its own
group's key slots. Logits are then the model's own, and head h's output lies in the value slots
of its group.

    latent  [0, 64)    keys of KV head 1        |  tile 0 of 128: keys (up to about 20)
            [64, 128)  values of KV head 0      |  beside values (often below 1)
            [128, 192) keys of KV head 2        |  tile 1, likewise
            [192, 256) values of KV head 1      |
            [256, 384) zero                     |  tile 2: an all-zero tile is legal
            [384, 448) values of KV head 2      |  tile 3, likewise
            [448, 512) keys of KV head 0        |
    rope    [0, 64)    keys of KV head 0

Keys of KV head 0 lie in the row twice, so that the same latent serves both widths: with
d_qk = 576 heads 0 to 2 read the RoPE part (bf16, not quantised), with d_qk = 512 they read the
last 64 latent dims, which the V4 layout keeps in bf16 as its RoPE part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

FORMAT = "sparse_mla.activations/1"

KV_HEADS = 3
GROUP = 3  # query heads per KV head
Q_HEADS = KV_HEADS * GROUP
HEAD_DIM = 64

D_LATENT = 512
D_ROPE = 64

LATENT_KEY_SLOTS = (slice(448, 512), slice(0, 64), slice(128, 192))  # by KV head
VALUE_SLOTS = (slice(64, 128), slice(192, 256), slice(384, 448))  # by KV head
ROPE_KV_HEAD = 0  # the KV head whose keys also fill the RoPE part

# Where a query of each KV head's group goes in a 576-wide query.
QUERY_SLOTS_576 = (slice(D_LATENT, D_LATENT + D_ROPE), *LATENT_KEY_SLOTS[1:])


@dataclass(frozen=True, eq=False)
class Capture:
    """One layer: n tokens of one text, and the queries of m of them.

    The query at position p attends to tokens 0..p. `attn_out` is what the model's own attention
    function returned for exactly these q, k and v.

    q [m, 9, 64] bf16 and k [n, 3, 64] bf16, both after RoPE; v [n, 3, 64] bf16;
    positions [m] int64; attn_out [m, 9, 64] float32; scale multiplies q.k.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    attn_out: torch.Tensor
    scale: float


_TENSORS = {
    "q": (torch.bfloat16, ("m", Q_HEADS, HEAD_DIM)),
    "k": (torch.bfloat16, ("n", KV_HEADS, HEAD_DIM)),
    "v": (torch.bfloat16, ("n", KV_HEADS, HEAD_DIM)),
    "positions": (torch.int64, ("m",)),
    "attn_out": (torch.float32, ("m", Q_HEADS, HEAD_DIM)),
}


def load(path: str | Path | None = None) -> list[Capture]:
    """The captures in `path`, or those the package carries, ordered by layer.

    Raises ValueError for a file that is truncated or is not a capture.
    """
    return _read(path)[0]


def provenance(path: str | Path | None = None) -> dict[str, str]:
    """Where the captures come from: model, licences, checksums, question lines, versions."""
    return _read(path)[1]


def save(path: str | Path, captures: Sequence[Capture], provenance: Mapping[str, str]) -> None:
    """Write captures as a file that `load` reads."""
    from safetensors.torch import save_file

    tensors = {
        _key(c.layer, name): getattr(c, name).contiguous() for c in captures for name in _TENSORS
    }
    metadata = {
        **provenance,
        "format": FORMAT,
        "layers": ",".join(str(c.layer) for c in captures),
        "scales": ",".join(repr(c.scale) for c in captures),
    }
    save_file(tensors, path, metadata)


def to_mla(capture: Capture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [m, 9, 576], latent [n, 512], rope [n, 64]), all bf16, for layouts with a RoPE part."""
    return (
        _queries(capture.q, QUERY_SLOTS_576, D_LATENT + D_ROPE),
        _latent(capture),
        capture.k[:, ROPE_KV_HEAD].contiguous(),
    )


def to_mla_without_rope(capture: Capture) -> tuple[torch.Tensor, torch.Tensor]:
    """(q [m, 9, 512], latent [n, 512]), both bf16, for layouts of width 512."""
    return _queries(capture.q, LATENT_KEY_SLOTS, D_LATENT), _latent(capture)


def from_mla(out: torch.Tensor) -> torch.Tensor:
    """The model's attention output [..., 9, 64] inside an MLA output [..., 9, 512]."""
    if out.shape[-2:] != (Q_HEADS, D_LATENT):
        raise ValueError(f"out must be [..., {Q_HEADS}, {D_LATENT}], got {tuple(out.shape)}")
    groups = [
        out[..., head * GROUP : (head + 1) * GROUP, slot] for head, slot in enumerate(VALUE_SLOTS)
    ]
    return torch.cat(groups, dim=-2)


def _queries(q: torch.Tensor, slots: Sequence[slice], width: int) -> torch.Tensor:
    wide = q.new_zeros(q.shape[0], KV_HEADS, GROUP, width)
    for head, slot in enumerate(slots):
        wide[:, head, :, slot] = q[:, head * GROUP : (head + 1) * GROUP]
    return wide.flatten(1, 2)


def _latent(capture: Capture) -> torch.Tensor:
    latent = capture.k.new_zeros(capture.k.shape[0], D_LATENT)
    for head in range(KV_HEADS):
        latent[:, LATENT_KEY_SLOTS[head]] = capture.k[:, head]
        latent[:, VALUE_SLOTS[head]] = capture.v[:, head]
    return latent


def _key(layer: int, name: str) -> str:
    return f"layer.{layer}.{name}"


def _read(path: str | Path | None) -> tuple[list[Capture], dict[str, str]]:
    if path is not None:
        return _read_file(Path(path))
    packaged = resources.files(__package__) / "data" / "smollm2_gsm8k.safetensors"
    with resources.as_file(packaged) as file:
        return _read_file(file)


def _read_file(path: Path) -> tuple[list[Capture], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        layers = [int(x) for x in metadata["layers"].split(",")]
        scales = [float(x) for x in metadata["scales"].split(",")]
        captures = [
            Capture(layer, **{name: tensors[_key(layer, name)] for name in _TENSORS}, scale=scale)
            for layer, scale in zip(layers, scales, strict=True)
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} lacks part of a capture: {error}") from error
    for capture in captures:
        _check(path, capture)
    return captures, metadata


def _check(path: Path, capture: Capture) -> None:
    sizes = {"m": capture.q.shape[0], "n": capture.k.shape[0]}
    for name, (dtype, dims) in _TENSORS.items():
        tensor = getattr(capture, name)
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in dims)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{path}: {_key(capture.layer, name)} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {dtype} {shape}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {_key(capture.layer, name)} has values that are not finite")
    if not ((capture.positions >= 0) & (capture.positions < sizes["n"])).all():
        raise ValueError(
            f"{path}: {_key(capture.layer, 'positions')} must lie in [0, {sizes['n']}), "
            f"got {capture.positions.tolist()}"
        )
