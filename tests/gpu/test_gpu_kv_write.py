"""The cache writer's kernel on a GPU: the very bytes that torch packs, there and on the CPU."""

from __future__ import annotations

import pytest
import torch

import tokens
from sparse_mla import LAYOUTS, KVCache

pytestmark = pytest.mark.gpu

N = 300


def on_gpu(part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part.cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes(layout: str, dtype: torch.dtype) -> None:
    """Every layout, pages of 64 and 3 tokens, int32 and int64 slots, some skipped."""
    chosen = LAYOUTS[layout]
    latent, rope = tokens.draw(chosen, N, dtype)
    for page_size, slot_dtype, rounding, gap in (
        (64, torch.int64, "amax", 0),
        (3, torch.int32, "pow2", 144),
    ):
        here = tokens.make_cache(chosen, N + 20, page_size, gap)
        slots = torch.randperm(here.num_slots)[:N].to(slot_dtype)
        slots[3] = -1
        here.append(latent, rope, slots, scale_rounding=rounding)
        for backend in ("triton", "torch"):
            there = tokens.make_cache(chosen, N + 20, page_size, gap, device="cuda")
            there.append(
                latent.cuda(), on_gpu(rope), slots.cuda(), scale_rounding=rounding, backend=backend
            )
            assert torch.equal(there.pages.cpu(), here.pages), backend


@pytest.mark.parametrize("layout", ["v32_fp8", "v4_fp8", "bf16"])
def test_many_tokens_of_every_magnitude(layout: str) -> None:
    """Quotients by an inverse and its corrections are those of the division."""
    chosen = LAYOUTS[layout]
    n = 20000
    latent = torch.randn(n, chosen.latent.count, device="cuda")
    latent *= 2.0 ** torch.randint(-130, 110, (n, 1), device="cuda")
    # Multiples of what the scale's own ulps are: many quotients are ties or next to one.
    latent[::2] = (latent[::2].to(torch.float8_e5m2).float()).nan_to_num(0.0, 0.0, 0.0)
    rope = torch.randn(n, 64, device="cuda")
    slots = torch.randperm(n, device="cuda")
    got = tokens.make_cache(chosen, n, device="cuda")
    want = tokens.make_cache(chosen, n, device="cuda")
    got.append(latent, rope, slots, backend="triton")
    want.append(latent, rope, slots, backend="torch")
    assert torch.equal(got.pages, want.pages)


def test_slots_outside_the_cache_are_skipped_without_a_sync() -> None:
    cache = tokens.make_cache(LAYOUTS["v32_fp8"], 256, device="cuda")
    latent, rope = torch.randn(6, 512, device="cuda"), torch.randn(6, 64, device="cuda")
    slots = torch.tensor([-2, 256, 2**31 - 1, -(2**31), -1, 5], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.append(latent, rope, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    written = (cache.rows_view().view(-1, 656) != tokens.POISON).any(1).nonzero()
    assert written.flatten().tolist() == [5]
    with pytest.raises(ValueError, match=r"slots holds -2, allowed: -1 \(skip\) or 0\.\.255"):
        cache.append(latent, rope, slots, check_slots=True)


def test_graph_replays_with_other_tokens_and_slots() -> None:
    cache = tokens.make_cache(LAYOUTS["v4_fp8"], 256, device="cuda")
    latent = torch.randn(9, 448, device="cuda", dtype=torch.bfloat16)
    rope = torch.randn(9, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(9, device="cuda")
    cache.append(latent, rope, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(latent, rope, slots)
    cache.pages.fill_(tokens.POISON)
    latent.normal_(std=30)
    slots.mul_(20)
    slots[4] = -1
    graph.replay()
    want = tokens.make_cache(LAYOUTS["v4_fp8"], 256, device="cuda")
    want.append(latent, rope, slots, backend="torch")
    assert torch.equal(cache.pages, want.pages)


def test_compiles_into_one_graph() -> None:
    layout = LAYOUTS["v32_fp8"]
    latent, rope = torch.randn(9, 512, device="cuda"), torch.randn(9, 64, device="cuda")

    def step(cache: KVCache, latent: torch.Tensor, slots: torch.Tensor) -> None:
        cache.append(latent * 2, rope, slots)

    slots = torch.arange(9, device="cuda")
    got, want = (tokens.make_cache(layout, 64, device="cuda") for _ in range(2))
    torch.compile(step, fullgraph=True)(got, latent, slots)
    want.append(latent * 2, rope, slots, backend="torch")
    assert torch.equal(got.pages, want.pages)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["v32_fp8", "v41_fp8_planar"])
def test_past_four_gigabytes(layout: str) -> None:
    """Slots either side of 2^31 and 2^32 bytes, and the last one."""
    chosen = LAYOUTS[layout]
    width = chosen.bytes_per_token
    if torch.cuda.mem_get_info()[0] < 11 * 2**30:
        pytest.skip("needs 11 GiB of free GPU memory")
    pages = 9 * 2**30 // (64 * width)
    cache = KVCache.empty(pages, 64, chosen, device="cuda")
    edges = [2**bits // width + step for bits in (31, 32) for step in (-1, 0, 1)]
    slots = torch.tensor([0, *edges, cache.num_slots - 1], device="cuda")
    latent = torch.randn(len(slots), 512, device="cuda")
    rope = torch.randn(len(slots), 64, device="cuda") if chosen.rope else None
    cache.append(latent, rope, slots)
    rows, footers = chosen.pack(latent, rope)
    page, offset = slots // 64, slots % 64
    assert torch.equal(cache.rows_view()[page, offset], rows)
    if chosen.planar:
        assert torch.equal(cache.footers_view()[page, offset], footers)
