"""The cache's writer on CPU: what it checks, skips and compiles to."""

from __future__ import annotations

import pytest
import torch

import tokens
from sparse_mla import LAYOUTS, KVCache
from sparse_mla.kv_quantise import over
from sparse_mla.ops.kv_write.backends import BACKENDS

LAYOUT = LAYOUTS["v4_fp8"]


def test_slots_are_checked_unless_told_otherwise() -> None:
    latent, rope = tokens.draw(LAYOUT, 40, torch.bfloat16)
    slots = torch.arange(40)
    slots[3], slots[4] = -7, 64
    cache = tokens.make_cache(LAYOUT, 64)
    with pytest.raises(ValueError, match=r"slots holds -7, allowed: -1 \(skip\) or 0\.\.63"):
        cache.append(latent, rope, slots)
    assert bool((cache.pages == tokens.POISON).all())
    cache.append(latent, rope, slots, check_slots=False)
    want = tokens.make_cache(LAYOUT, 64)
    want.append(latent, rope, slots.where((slots >= 0) & (slots < 64), -1))
    assert torch.equal(cache.pages, want.pages)


def test_bad_options() -> None:
    latent, rope = tokens.draw(LAYOUT, 40, torch.bfloat16)
    cache, slots = tokens.make_cache(LAYOUT, 64), torch.arange(40)
    with pytest.raises(ValueError, match="check_slots is 1, must be True, False or None"):
        cache.append(latent, rope, slots, check_slots=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'sm90', kv_write has: cpu, triton, torch"):
        cache.append(latent, rope, slots, backend="sm90")


def test_backends_by_name() -> None:
    latent, rope = tokens.draw(LAYOUT, 40, torch.bfloat16)
    slots = torch.arange(40)
    caches = []
    for name in ("cpu", "torch"):
        caches.append(tokens.make_cache(LAYOUT, 64))
        caches[-1].append(latent, rope, slots, backend=name)
    assert torch.equal(caches[0].pages, caches[1].pages)
    assert [b.name for b in BACKENDS] == ["cpu", "triton", "torch"]


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    latent, rope = tokens.draw(LAYOUT, 40, torch.bfloat16)

    def step(cache: KVCache, latent: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        cache.append(latent * 2, rope, slots, scale_rounding="pow2")
        return cache.pages.sum()

    slots = torch.arange(40)
    got, want = tokens.make_cache(LAYOUT, 64), tokens.make_cache(LAYOUT, 64)
    total = torch.compile(step, fullgraph=True)(got, latent, slots)
    assert total == step(want, latent, slots)
    assert torch.equal(got.pages, want.pages)


def test_division_by_a_number_is_ieee() -> None:
    """On CUDA torch multiplies by the reciprocal of a Python number, which differs."""
    x = torch.rand(10000) * 448
    assert torch.equal(over(x, 448.0).double(), (x.double() / 448).float().double())
    assert not torch.equal(over(x, 448.0), x * torch.tensor(1 / 448))


def test_other_defaults_of_torch() -> None:
    """Engines and FlashMLA's tests set bf16 as the default dtype."""
    latent, rope = tokens.draw(LAYOUT, 40, torch.bfloat16)
    want, got = tokens.make_cache(LAYOUT, 64), tokens.make_cache(LAYOUT, 64)
    want.append(latent, rope, torch.arange(40))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got.append(latent, rope, torch.arange(40))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.pages, want.pages)
