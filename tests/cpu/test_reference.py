"""The oracle against a second formulation that shares no code with it.

Here every row of every cache is dequantised, with numpy and from the bytes; a query's weights are
how often its list names a row, times exp(logit), over all rows at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from drawn import Call, decode_call, draw_indices, draw_lengths, filled_cache, prefill_call
from sparse_mla import KVCache, reference

Source = tuple[KVCache, torch.Tensor, torch.Tensor | None]


def e4m3_table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value)


def bf16(raw: np.ndarray) -> np.ndarray:
    """Numbers [n] from bytes [2 n], little-endian bf16: the upper half of a float32."""
    halves = np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16
    return halves.view(np.float32).astype(np.float64)


def dense_rows(cache: KVCache) -> np.ndarray:
    """All rows of a cache, float64; page by page, token by token."""
    pages = cache.pages.numpy()
    table = e4m3_table()
    rows = []
    for page in range(cache.num_pages):
        for offset in range(cache.page_size):
            raw = pages[page, offset * cache.token_stride :]
            if cache.layout.name == "v32_fp8":
                scales = np.ascontiguousarray(raw[512:528]).view("<f4").astype(np.float64)
                latent = table[raw[:512]] * np.repeat(scales, 128)
                rows.append(np.concatenate([latent, bf16(raw[528:656])]))
            else:
                rows.append(bf16(raw[: 2 * cache.layout.d_qk]))
    return np.array(rows).reshape(cache.num_slots, cache.layout.d_qk)


def counts(indices: np.ndarray, length: int | None, num_slots: int) -> np.ndarray:
    """How often a list names each slot."""
    made = np.zeros(num_slots)
    for index in indices[:length] if length is None or length > 0 else []:
        if 0 <= index < num_slots:
            made[index] += 1
    return made


def dense_attend(
    q: torch.Tensor, sources: list[Source], scale: float, sink: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out [n, h, 512], lse [n, h] and max_logits [n, h] of q [n, h, d], lists [n, topk]."""
    keys = np.concatenate([dense_rows(cache) for cache, _, _ in sources])
    n, heads, _ = q.shape
    out = np.zeros((n, heads, 512))
    lse = np.full((n, heads), -math.inf)
    peak = np.full((n, heads), -math.inf)
    for i in range(n):
        times = np.concatenate(
            [
                counts(lists[i].numpy(), None if m is None else int(m[i]), cache.num_slots)
                for cache, lists, m in sources
            ]
        )
        on = times > 0
        if not on.any():
            continue
        # What is not selected may hold NaN: zero times NaN would be NaN.
        safe = np.where(on[:, None], keys, 0.0)
        logits = np.where(on, q[i].double().numpy() @ safe.T * scale, -math.inf)
        peak[i] = logits.max(1)
        weights = times * np.exp(logits - peak[i][:, None])
        total = weights.sum(1)
        lse[i] = peak[i] + np.log(total)
        out[i] = (weights / total[:, None]) @ safe[:, :512]
    if sink is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            out /= 1 + np.exp(sink.double().numpy() - np.maximum(lse, -1e300))[..., None]
        out[lse == -math.inf] = 0.0
    return out, lse, peak


def check(call: Call, got: reference.Reference, sources: list[Source]) -> None:
    d_qk = call.q.shape[-1]
    out, lse, peak = dense_attend(
        call.q.reshape(-1, *call.q.shape[-2:]),
        sources,
        call.options.get("scale", d_qk**-0.5),
        call.options.get("attn_sink"),
    )
    assert got.out.dtype == got.lse.dtype == torch.float64
    assert got.out.shape == (*call.q.shape[:-1], 512) and got.lse.shape == call.q.shape[:-1]
    error = np.linalg.norm(got.out.numpy().reshape(out.shape) - out, axis=-1)
    assert (error <= 1e-12 * np.linalg.norm(out, axis=-1)).all(), error.max()
    for mine, theirs in ((got.lse, lse), (got.max_logits, peak)):
        flat = mine.numpy().reshape(lse.shape)
        some = theirs > -math.inf
        assert (flat[~some] == -math.inf).all()
        far = np.abs(flat[some] - theirs[some]) / (10 + np.abs(theirs[some]))
        assert (far <= 1e-12).all(), far.max()


def flat_sources(call: Call) -> list[Source]:
    per_query = call.q.shape[1] if call.q.dim() == 4 else 1

    def spread(lengths: torch.Tensor | None) -> torch.Tensor | None:
        return None if lengths is None else lengths.repeat_interleave(per_query)

    options = call.options
    made = [(call.cache, call.indices.flatten(0, -2), spread(options.get("topk_length")))]
    if "extra_cache" in options:
        extra = options["extra_indices"].flatten(0, -2)
        made.append((options["extra_cache"], extra, spread(options.get("extra_topk_length"))))
    return made


def shape_of(seed: int) -> dict[str, Any]:
    """A random shape; over the seeds of this file every value of every option occurs."""
    rng = np.random.default_rng(seed)
    return {
        "layout": str(rng.choice(["v32_fp8", "bf16", "bf16_nope"])),
        "s_q": int(rng.integers(1, 4)),
        "heads": int(rng.choice([1, 2, 5, 16])),
        "topk": int(rng.choice([0, 1, 7, 40, 100])),
        "page_size": int(rng.choice([1, 2, 53, 61, 64])),
        "pages": int(rng.integers(1, 4)),
        "invalid": float(rng.choice([0.0, 0.2, 1.0], p=[0.3, 0.6, 0.1])),
        "lengths": bool(rng.integers(2)),
        "sink": bool(rng.integers(2)),
        "scale": None if rng.integers(2) else float(rng.uniform(0.01, 0.3)),
        "seed": seed,
    }


@pytest.mark.parametrize("seed", range(30))
def test_decode(seed: int) -> None:
    call = decode_call(b=3, **shape_of(seed))
    check(call, call.oracle(), flat_sources(call))


@pytest.mark.parametrize("seed", range(100, 120))
def test_decode_over_two_caches(seed: int) -> None:
    """The second cache has its own layout, page size, indices and lengths."""
    shape = shape_of(seed)
    if shape["layout"] == "bf16_nope":
        shape["layout"] = "bf16"
    call = decode_call(b=3, **shape)
    other = "bf16" if shape["layout"] == "v32_fp8" else "v32_fp8"
    extra = filled_cache(other, 2, 17, seed=seed + 50)
    call.options["extra_cache"] = extra
    call.options["extra_indices"] = draw_indices((3, shape["s_q"], 23), 34, seed=seed)
    if shape["lengths"]:
        call.options["extra_topk_length"] = draw_lengths(3, 23, seed=seed).flip(0)
    check(call, call.oracle(), flat_sources(call))


@pytest.mark.parametrize("seed", range(200, 215))
def test_prefill(seed: int) -> None:
    shape = shape_of(seed)
    shape["s_q"] = 5
    call = prefill_call(**shape)
    check(call, call.oracle(), flat_sources(call))


def test_a_list_of_one_token_repeated_is_that_token() -> None:
    call = decode_call("bf16", topk=1, invalid=0.0, heads=2)
    once = call.oracle()
    call.indices = call.indices.repeat(1, 1, 9)
    nine = call.oracle()
    assert torch.allclose(nine.out, once.out, rtol=1e-14, atol=0)
    assert torch.allclose(nine.lse - once.lse, torch.tensor(9.0).log().double(), rtol=1e-7)
    assert torch.allclose(nine.weight_power, torch.full_like(nine.weight_power, 1 / 9))


def test_condition_is_the_growth_of_relative_errors_of_the_weights() -> None:
    """Against its definition, sqrt(sum p^2 |v|^2) / |sum p v|, on two tokens that nearly cancel."""
    cache = KVCache.empty(1, 2, "bf16")
    v = torch.zeros(2, 512)
    v[0, 0], v[1, 0] = 1.0, -0.5
    cache.append(v, torch.zeros(2, 64), torch.arange(2))
    q = torch.zeros(1, 1, 1, 576, dtype=torch.bfloat16)
    got = reference.decode(q, cache, torch.tensor([[[0, 1]]], dtype=torch.int32))
    assert got.out[0, 0, 0, 0] == 0.25
    want = math.sqrt(0.25 * 1 + 0.25 * 0.25) / 0.25
    assert got.condition.item() == pytest.approx(want, rel=1e-14)
    assert got.weight_power.item() == pytest.approx(0.5, rel=1e-14)


def test_bounds_beyond_int32() -> None:
    """More slots than int32 can count: the bound must not wrap around to a small number."""
    indices = torch.tensor([[5, -1, 2**31 - 1]], dtype=torch.int32)
    for num_slots in (2**31, 2**32 + 3, 2**33):
        valid = reference.valid_indices(indices, num_slots, None)
        assert valid.tolist() == [[True, False, True]]
    assert reference.valid_indices(indices, 2**31 - 1, None).tolist() == [[True, False, False]]
    assert not reference.valid_indices(indices, 0, None).any()
