"""Every cache layout, alone and beside an extra cache, on every GPU backend that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gpu_attention import assert_close

import sparse_mla
from sparse_mla import KVCache, arch, dispatch, reference
from sparse_mla.kv_layout import LAYOUTS, get_layout

pytestmark = pytest.mark.gpu

BACKENDS = ("sm90", "triton")
ALONE = [name for name, layout in LAYOUTS.items() if not layout.extra_only]
# What models use together, and what no model does: every kind of scale beside another.
PAIRS = [
    ("v4_fp8", "v4_fp8"),
    ("v41_fp8_planar", "v41_fp4_planar"),
    ("v41_fp8_inline", "v41_fp4_inline"),
    ("v41_fp8_inline", "v41_fp8_inline"),
    ("bf16_nope", "v4_fp8"),
    ("v4_fp8", "glm53_nope_fp8"),
    ("glm53_nope_fp8", "glm53_nope_nvfp4"),
    ("bf16", "v32_fp8"),
    ("v32_fp8", "nvfp4_bf16_rope"),
    ("fp8_tensor", "nvfp4_bf16_rope"),
]


def need(backend: str, layout: str, extra: str = "") -> None:
    """Skip what the backend does not claim to read, with its own reason."""
    request = dispatch.Request("decode", layout, 64, extra_layout=extra)
    for answer in dispatch.explain(request, arch.of("cuda")):
        if answer.backend == backend and not answer.ok:
            pytest.skip(f"{backend}: {answer.reason}")


def make_cache(layout: str, pages: int, page_size: int, pad: int = 0, scale: float = 0.02) -> Any:
    """A cache with every second slot written and 0xff, NaN everywhere, in all other bytes."""
    kind = get_layout(layout)
    cache = KVCache.empty(
        pages,
        page_size,
        kind,
        device="cuda",
        page_stride=-(-kind.page_bytes(page_size) // 16) * 16 + pad,
        tensor_scale=torch.tensor([scale], device="cuda") if kind.tensor_scale else None,
    )
    cache.pages.fill_(0xFF)
    fill(cache, torch.arange(0, cache.num_slots, 2, device="cuda"))
    return cache


def fill(cache: KVCache, slots: torch.Tensor) -> None:
    """Write tokens whose 64-wide tiles differ in magnitude."""
    layout, n = cache.layout, len(slots)
    tiles = torch.randn(n, layout.latent.count // 64, 64, device="cuda")
    tiles *= torch.exp(torch.randn(n, layout.latent.count // 64, 1, device="cuda"))
    rope = torch.randn(n, 64, device="cuda") if layout.rope else None
    cache.append(tiles.flatten(1), rope, slots)


def make_list(cache: KVCache, b: int, s_q: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices with invalid entries of every kind, and lengths."""
    indices = torch.randint(0, max(1, cache.num_slots // 2), (b, s_q, topk), device="cuda") * 2
    bad = torch.tensor([-1, -2, cache.num_slots, 2**31 - 1, -(2**31)], device="cuda")
    where = torch.rand(b, s_q, topk, device="cuda") < 0.2
    indices[where] = bad[torch.randint(0, 5, (int(where.sum()),), device="cuda")]
    if topk > 64:
        indices[0, :, :64] = -1
    length = torch.randint(-1, topk + 3, (b,), device="cuda")
    length[0] = topk
    return indices.to(torch.int32), length.to(torch.int32)


def make_call(
    cache: KVCache,
    extra: KVCache | None = None,
    *,
    b: int = 3,
    s_q: int = 2,
    heads: int = 16,
    topk: int = 333,
    extra_topk: int = 200,
) -> dict[str, Any]:
    """Hostile arguments for decode."""
    q = torch.randn(b, s_q, heads, cache.layout.d_qk, device="cuda").to(torch.bfloat16)
    indices, length = make_list(cache, b, s_q, topk)
    sink = torch.randn(heads, device="cuda")
    sink[0] = float("inf") if heads > 1 else 0.0
    call = {
        "q": q,
        "cache": cache,
        "indices": indices,
        "topk_length": length,
        "attn_sink": sink,
        "scale": 0.05,
    }
    if extra is not None:
        more, more_length = make_list(extra, b, s_q, extra_topk)
        call |= {"extra_cache": extra, "extra_indices": more}
        call["extra_topk_length"] = more_length.flip(0)
    return call


def check(backend: str, call: dict[str, Any], **options: Any) -> None:
    out, lse = sparse_mla.decode(backend=backend, **call, **options)
    assert_close(out, lse, reference.decode(**call))


@pytest.mark.parametrize("heads", (1, 8, 16, 20, 64, 128))
@pytest.mark.parametrize("layout", ALONE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alone(backend: str, layout: str, heads: int) -> None:
    need(backend, layout)
    call = make_call(make_cache(layout, 40, 61), heads=heads)
    for splits in (None, 1, 3):
        check(backend, call, num_splits=splits)


@pytest.mark.parametrize("heads", (8, 64))
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_an_extra_cache(backend: str, pair: tuple[str, str], heads: int) -> None:
    """Page sizes, lengths, lists and scales of the whole tensor differ between the two."""
    need(backend, *pair)
    extra = make_cache(pair[1], 70, 17, pad=64, scale=0.0007)
    call = make_call(make_cache(pair[0], 20, 64), extra, heads=heads)
    for splits in (None, 1, 3, 9):
        check(backend, call, num_splits=splits)


@pytest.mark.parametrize("topk", ((0, 0), (0, 70), (70, 0), (1, 1), (64, 512), (65, 63)))
@pytest.mark.parametrize("heads", (8, 64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_two_lengths(backend: str, heads: int, topk: tuple[int, int]) -> None:
    need(backend, "v4_fp8", "v4_fp8")
    cache, extra = make_cache("v4_fp8", 20, 64), make_cache("v4_fp8", 300, 2)
    call = make_call(cache, extra, heads=heads, topk=topk[0], extra_topk=topk[1])
    for splits in (None, 1, 2):
        check(backend, call, num_splits=splits)
    for rows in ("indices", "extra_indices"):
        check(backend, {**call, rows: torch.full_like(call[rows], -1)})


@pytest.mark.parametrize("page_size", (1, 2, 53, 64, 256))
@pytest.mark.parametrize("layout", ("v4_fp8", "v41_fp8_planar", "glm53_nope_nvfp4"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_page_sizes(backend: str, layout: str, page_size: int) -> None:
    need(backend, layout)
    for pad in (0, 2320):
        check(backend, make_call(make_cache(layout, 1024 // page_size, page_size, pad)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_wider_than_the_layout(backend: str) -> None:
    need(backend, "glm53_nope_fp8")
    packed = make_cache("glm53_nope_fp8", 20, 64)
    pool = torch.full((20, 64, 656), 0xFF, dtype=torch.uint8, device="cuda")
    pool[:, :, :528] = packed.rows_view()
    check(backend, make_call(KVCache.from_tensor(pool, "glm53_nope_fp8")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_queries_per_sequence(backend: str) -> None:
    need(backend, "v4_fp8", "v4_fp8")
    cache, extra = make_cache("v4_fp8", 64, 64), make_cache("v4_fp8", 64, 64)
    check(backend, make_call(cache, extra, b=1, s_q=3000, heads=16, topk=64, extra_topk=70))


@pytest.mark.parametrize("heads", (16, 64))
@pytest.mark.parametrize("b", (75, 120, 300, 600))
@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_many_lengths(backend: str, b: int, heads: int) -> None:
    """How such lists are shared out depends on how many there are."""
    need(backend, "v4_fp8", "v4_fp8")
    cache, extra = make_cache("v4_fp8", 64, 64), make_cache("v4_fp8", 64, 64)
    check(backend, make_call(cache, extra, b=b, heads=heads, topk=70, extra_topk=300))


@pytest.mark.parametrize("size", (2**31, 2**32))
@pytest.mark.parametrize("layout", ("v4_fp8", "glm53_nope_nvfp4"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_past_int32(backend: str, layout: str, size: int) -> None:
    """Rows, and in v4_fp8 scales, at both sides of the boundary."""
    need(backend, layout, layout)
    bytes_of_page = get_layout(layout).page_bytes(64)
    page = size // bytes_of_page
    if torch.cuda.mem_get_info()[0] < (page + 2) * bytes_of_page + (1 << 30):
        pytest.skip(f"needs {(page + 2) * bytes_of_page >> 20} MiB of GPU memory")
    cache = KVCache.empty(page + 2, 64, layout, device="cuda")
    slots = torch.arange((page - 1) * 64, (page + 2) * 64, device="cuda")
    cache.pages[page - 1 :].fill_(0xFF)
    fill(cache, slots)
    call = make_call(cache, cache, heads=16)
    call["indices"] = slots.to(torch.int32).expand(3, 2, -1)
    call["extra_indices"] = slots.flip(0).to(torch.int32).expand(3, 2, -1)
    check(backend, call)


@pytest.mark.parametrize("heads", (16, 64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_and_every_time_the_same(backend: str, heads: int) -> None:
    need(backend, "v4_fp8", "v4_fp8")
    cache, extra = make_cache("v4_fp8", 64, 64), make_cache("v4_fp8", 200, 2)
    shape = {"b": 40, "s_q": 1, "heads": heads, "topk": 128, "extra_topk": 1500}
    call = make_call(cache, extra, **shape)
    out, lse = sparse_mla.decode(batch_invariant=True, backend=backend, **call)
    for _ in range(20):
        again = sparse_mla.decode(batch_invariant=True, backend=backend, **call)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    rows = ("q", "indices", "topk_length", "extra_indices", "extra_topk_length")
    for row in (0, 17, 39):
        one = {k: v[row : row + 1].clone() if k in rows else v for k, v in call.items()}
        alone = sparse_mla.decode(batch_invariant=True, backend=backend, **one)
        assert torch.equal(alone[0][0], out[row]) and torch.equal(alone[1][0], lse[row])


@pytest.mark.parametrize("batch", (1, 200))
@pytest.mark.parametrize("pair", (("v4_fp8", "v4_fp8"), ("fp8_tensor", "nvfp4_bf16_rope")))
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replay(backend: str, pair: tuple[str, str], batch: int) -> None:
    """New contents, lengths and scales of the whole tensor in a captured graph."""
    need(backend, *pair)
    cache, extra = make_cache(pair[0], 64, 64), make_cache(pair[1], 64, 64)
    shape = {"b": batch, "s_q": 1, "heads": 16, "topk": 128, "extra_topk": 512}
    call = make_call(cache, extra, **shape)
    sparse_mla.decode(backend=backend, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sparse_mla.decode(backend=backend, **call)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = make_call(cache, extra, **shape)
        for name, value in call.items():
            if isinstance(value, torch.Tensor):
                value.copy_(fresh[name])
        for one in (cache, extra):
            fill(one, torch.arange(0, one.num_slots, 2, device="cuda"))
            if one.tensor_scale is not None:
                one.tensor_scale.mul_(1.5)
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, lse, reference.decode(**call))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_scale_of_v4(backend: str) -> None:
    """A tile's ue8m0 scale, every code that float32 sums can hold; NaN arrives as NaN."""
    need(backend, "v4_fp8")
    cache = KVCache.empty(1, 64, "v4_fp8", device="cuda")
    fill(cache, torch.arange(64, device="cuda"))
    codes = torch.arange(64, device="cuda").to(torch.uint8) + 0x30  # 0.5 to 120
    cache.rows_view()[0, :, 64:128] = codes
    q = torch.randn(1, 1, 4, 512, device="cuda").to(torch.bfloat16)
    q[..., 64:128] = 0
    indices = torch.arange(64, dtype=torch.int32, device="cuda").view(1, 1, -1)
    for code in range(240):
        cache.footers_view()[0, :, 1] = code
        out, lse = sparse_mla.decode(q, cache, indices, backend=backend)
        want = reference.decode(q, cache, indices)
        assert_close(out, lse, want)
        error = out.double()[..., 64:128] - want.out[..., 64:128]
        # The smallest scales lose bits below 2^-133.
        assert error.norm() <= 0.01 * want.out[..., 64:128].norm() + 2.0**-130
    cache.footers_view()[0, 5, 1] = 255
    out, _ = sparse_mla.decode(q, cache, indices, backend=backend)
    assert out[..., 64:128].isnan().all()
