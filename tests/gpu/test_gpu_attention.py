"""Every GPU backend of this machine, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

import sparse_mla
from sparse_mla import KVCache, arch, dispatch, reference

pytestmark = pytest.mark.gpu

LAYOUTS = ("v32_fp8", "bf16", "bf16_nope")


@pytest.fixture(params=("sm90", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """A backend's name; skipped where it does not run, with its own reason."""
    machine = arch.of("cuda")
    for answer in dispatch.explain(dispatch.Request("decode", "v32_fp8", 64), machine):
        if answer.backend == request.param and not answer.ok:
            pytest.skip(f"{answer.backend}: {answer.reason}")
    return str(request.param)


def limit(backend: str, layout: str, heads: int) -> float:
    """The error allowed, in multiples of ideal rounding.

    Weights are fp16 over FP8 caches on Hopper; over bf16 caches they are bf16, and alone make an
    error as large as ideal rounding where all weights are alike (1.41x together).
    """
    if backend == "triton" or layout != "v32_fp8":
        return 1.7
    return 1.05 if heads <= 32 else 1.15


def make_cache(layout: str, pages: int, page_size: int, **kwargs: int) -> KVCache:
    """A cache with every second slot written and 0xff (NaN everywhere) in all other bytes."""
    cache = KVCache.empty(pages, page_size, layout, device="cuda", **kwargs)
    cache.pages.fill_(0xFF)
    slots = torch.arange(0, cache.num_slots, 2, device="cuda")
    latent = torch.randn(len(slots), 512, device="cuda")
    latent *= torch.exp(torch.randn(len(slots), 1, device="cuda"))
    rope = torch.randn(len(slots), 64, device="cuda") if cache.layout.rope else None
    cache.append(latent, rope, slots)
    return cache


def make_call(cache: KVCache, b: int, s_q: int, heads: int, topk: int) -> dict[str, torch.Tensor]:
    """Hostile arguments for decode: invalid entries of every kind, lengths, sinks."""
    q = torch.randn(b, s_q, heads, cache.layout.d_qk, device="cuda").to(torch.bfloat16)
    indices = torch.randint(0, cache.num_slots // 2, (b, s_q, topk), device="cuda") * 2
    bad = torch.tensor([-1, -2, cache.num_slots, 2**31 - 1, -(2**31)], device="cuda")
    where = torch.rand(b, s_q, topk, device="cuda") < 0.2
    indices[where] = bad[torch.randint(0, 5, (int(where.sum()),), device="cuda")]
    if topk > 64:
        indices[0, :, :64] = -1
    length = torch.randint(0, topk + 1, (b,), device="cuda")
    length[0] = topk
    sink = torch.randn(heads, device="cuda")
    sink[0] = float("inf") if heads > 1 else 0.0
    return {
        "q": q,
        "indices": indices.to(torch.int32),
        "topk_length": length.to(torch.int32),
        "attn_sink": sink,
    }


def assert_close(
    out: torch.Tensor, lse: torch.Tensor, want: reference.Reference, allowed: float = 1.7
) -> None:
    """Within `allowed` times ideal rounding, and the same rows empty."""
    assert torch.equal(lse == float("-inf"), want.lse == float("-inf"))
    assert torch.isfinite(out).all()
    assert (out[want.lse == float("-inf")] == 0).all()
    some = want.lse > float("-inf")
    if not some.any():
        return
    # float32 logits: rounding grows with their size, which lse follows.
    assert ((lse.double() - want.lse).abs() <= 4e-6 * (10 + want.lse.abs()))[some].all()
    norm = want.out.norm()
    ideal = (want.out.to(torch.bfloat16).double() - want.out).norm() / norm
    assert (out.double() - want.out).norm() / norm <= allowed * ideal


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", (1, 5, 8, 16, 20, 32, 33, 64, 96, 128))
@pytest.mark.parametrize("splits", (None, 1, 2, 7, 16))
def test_decode(backend: str, layout: str, heads: int, splits: int | None) -> None:
    torch.manual_seed(heads)
    cache = make_cache(layout, 40, 61)
    call = make_call(cache, b=3, s_q=2, heads=heads, topk=333)
    out, lse = sparse_mla.decode(
        cache=cache, scale=0.05, num_splits=splits, backend=backend, **call
    )
    # Few values (one head, sink +inf and -inf around it) have an ideal error of their own.
    allowed = limit(backend, layout, heads) if heads >= 8 else 1.7
    assert_close(out, lse, reference.decode(cache=cache, scale=0.05, **call), allowed)


@pytest.mark.parametrize("page_size", (1, 2, 53, 64, 256))
@pytest.mark.parametrize("topk", (0, 1, 63, 64, 65, 100, 2047))
@pytest.mark.parametrize("heads", (16, 64))
def test_page_sizes_and_topk(backend: str, page_size: int, topk: int, heads: int) -> None:
    torch.manual_seed(topk)
    cache = make_cache("v32_fp8", 1024 // page_size, page_size, page_stride=656 * page_size + 656)
    call = make_call(cache, b=2, s_q=1, heads=heads, topk=topk)
    out, lse = sparse_mla.decode(cache=cache, scale=0.05, backend=backend, **call)
    assert_close(out, lse, reference.decode(cache=cache, scale=0.05, **call))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", (8, 32, 64, 128))
def test_prefill(backend: str, layout: str, heads: int) -> None:
    torch.manual_seed(heads)
    cache = make_cache(layout, 500, 1)
    call = make_call(cache, b=70, s_q=1, heads=heads, topk=300)
    call["q"], call["indices"] = call["q"][:, 0], call["indices"][:, 0]
    want = reference.prefill(kv=cache, scale=0.05, **call)
    out, max_logits, lse = sparse_mla.prefill(kv=cache, scale=0.05, backend=backend, **call)
    assert_close(out, lse, want, limit(backend, layout, heads))
    some = want.lse > float("-inf")
    error = (max_logits.double() - want.max_logits).abs()
    assert (error <= 4e-6 * (10 + want.max_logits.abs()))[some].all()
    assert (max_logits[~some] == float("-inf")).all()


@pytest.mark.parametrize("page", (2**31 // (64 * 656), 2**32 // (64 * 656)))
@pytest.mark.parametrize("heads", (16, 64))
def test_slots_past_int32(backend: str, page: int, heads: int) -> None:
    need = (page + 2) * 64 * 656
    if torch.cuda.mem_get_info()[0] < need + (1 << 30):
        pytest.skip(f"needs {need >> 20} MiB of GPU memory")
    cache = KVCache.empty(page + 2, 64, "v32_fp8", device="cuda")
    cache.pages.fill_(0xFF)
    slots = torch.arange((page - 1) * 64, (page + 2) * 64, device="cuda")
    cache.append(
        torch.randn(len(slots), 512, device="cuda"),
        torch.randn(len(slots), 64, device="cuda"),
        slots,
    )
    q = torch.randn(1, 1, heads, 576, device="cuda").to(torch.bfloat16)
    indices = slots.to(torch.int32).view(1, 1, -1)
    out, lse = sparse_mla.decode(q, cache, indices, backend=backend)
    assert_close(out, lse, reference.decode(q, cache, indices))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", (8, 32, 64))
def test_every_length_unsplit(backend: str, layout: str, heads: int) -> None:
    cache = make_cache(layout, 64, 64)
    call = make_call(cache, b=150, s_q=1, heads=heads, topk=1200)
    call["topk_length"] = torch.arange(0, 1200, 8, dtype=torch.int32, device="cuda")
    out, lse = sparse_mla.decode(cache=cache, scale=0.05, num_splits=1, backend=backend, **call)
    assert_close(out, lse, reference.decode(cache=cache, scale=0.05, **call))


def scales_of(cache: KVCache) -> torch.Tensor:
    """The fp32 scales of a v32_fp8 cache, [pages, page_size, 4], a copy."""
    return cache.rows_view()[..., 512:528].contiguous().view(torch.float32)


def set_scales(cache: KVCache, scales: torch.Tensor) -> None:
    cache.rows_view()[..., 512:528] = scales.contiguous().view(torch.uint8)


@pytest.mark.parametrize("heads", (32, 40, 64, 128))
@pytest.mark.parametrize("splits", (1, 3))
def test_scales_of_any_size_in_some_lists(backend: str, heads: int, splits: int) -> None:
    """Five lists of disjoint tokens; the first one's scales are ordinary."""
    torch.manual_seed(heads)
    cache = KVCache.empty(40, 64, "v32_fp8", device="cuda")
    slots = torch.arange(cache.num_slots, device="cuda")
    cache.append(
        torch.randn(len(slots), 512, device="cuda"),
        torch.randn(len(slots), 64, device="cuda"),
        slots,
    )
    scales = scales_of(cache).view(5, 512, 4)
    scales[1, 300, 3] *= 2.0**40
    scales[2][torch.rand(512, 4, device="cuda") < 0.3] = 0.0
    scales[3, :, 1:] *= torch.exp2(torch.empty(512, 3, device="cuda").uniform_(-20, 20))
    scales[4, 400, 2] = float("nan")
    set_scales(cache, scales.view(40, 64, 4))
    q = torch.randn(5, 1, heads, 576, device="cuda").to(torch.bfloat16)
    q[:, :, :, 128:512] = 0.0
    indices = slots.view(5, 1, 512).to(torch.int32)
    call = {"q": q, "cache": cache, "indices": indices, "scale": 0.05}
    out, lse = sparse_mla.decode(num_splits=splits, backend=backend, **call)
    assert torch.isnan(out[4]).all()
    want = reference.decode(**call)
    for i in range(4):
        for group in range(4):
            part = slice(128 * group, 128 * group + 128)
            ref = want._replace(out=want.out[i, ..., part], lse=want.lse[i])
            assert_close(
                out[i, ..., part], lse[i], ref, max(1.15, limit(backend, "v32_fp8", heads))
            )


@pytest.mark.parametrize("mantissa", (1 + 2.0**-11 - 2.0**-22, 1 + 2.0**-11 + 2.0**-22, 1.99999))
@pytest.mark.parametrize("heads", (16, 64))
def test_scales_of_one_mantissa_leave_no_gain(backend: str, heads: int, mantissa: float) -> None:
    """Weights that would all round the same way to fp16; many tokens matter, none by itself."""
    torch.manual_seed(0)
    cache = KVCache.empty(64, 64, "v32_fp8", device="cuda")
    slots = torch.arange(cache.num_slots, device="cuda")
    latent = torch.randn(len(slots), 512, device="cuda")
    cache.append(latent, torch.randn(len(slots), 64, device="cuda"), slots)
    scales = scales_of(cache)
    set_scales(cache, torch.exp2(torch.floor(torch.log2(scales))) * mantissa)
    q = torch.randn(64, 1, heads, 576, device="cuda").to(torch.bfloat16)
    indices = torch.randint(0, cache.num_slots, (64, 1, 1024), device="cuda")
    call = {"q": q, "cache": cache, "indices": indices.to(torch.int32), "scale": 0.02}
    out, _ = sparse_mla.decode(backend=backend, **call)
    ref = reference.decode(**call).out
    gain = ((out.double() - ref) * ref).sum() / ref.square().sum()
    ideal = ((ref.to(torch.bfloat16).double() - ref) * ref).sum() / ref.square().sum()
    assert abs(gain - ideal) <= 5e-5


@pytest.mark.parametrize("layout", ("v32_fp8", "bf16"))
@pytest.mark.parametrize("heads", (16, 32, 64))
def test_same_bits_every_time(backend: str, layout: str, heads: int) -> None:
    cache = make_cache(layout, 64, 64)
    call = make_call(cache, b=4, s_q=1, heads=heads, topk=1000)
    first = sparse_mla.decode(cache=cache, backend=backend, **call)
    for _ in range(50):
        again = sparse_mla.decode(cache=cache, backend=backend, **call)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("layout", ("v32_fp8", "bf16"))
@pytest.mark.parametrize("heads", (16, 64))
def test_batch_invariant(backend: str, layout: str, heads: int) -> None:
    cache = make_cache(layout, 64, 64)
    call = make_call(cache, b=64, s_q=1, heads=heads, topk=1500)
    out, lse = sparse_mla.decode(cache=cache, batch_invariant=True, backend=backend, **call)
    for row in (0, 17, 63):
        one = {k: v if k == "attn_sink" else v[row : row + 1].clone() for k, v in call.items()}
        alone, alone_lse = sparse_mla.decode(
            cache=cache, batch_invariant=True, backend=backend, **one
        )
        assert torch.equal(alone[0], out[row])
        assert torch.equal(alone_lse[0], lse[row])


@pytest.mark.parametrize("heads", (16, 64))
@pytest.mark.parametrize("batch", (1, 200))
def test_graph_replay_with_new_contents_and_lengths(backend: str, batch: int, heads: int) -> None:
    cache = make_cache("v32_fp8", 64, 64)
    call = make_call(cache, b=batch, s_q=1, heads=heads, topk=1024)
    sparse_mla.decode(cache=cache, backend=backend, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sparse_mla.decode(cache=cache, backend=backend, **call)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = make_call(cache, b=batch, s_q=1, heads=heads, topk=1024)
        for name, tensor in call.items():
            tensor.copy_(fresh[name])
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, lse, reference.decode(cache=cache, **call))


def test_torch_compile(backend: str) -> None:
    cache = make_cache("v32_fp8", 64, 64)
    call = make_call(cache, b=4, s_q=1, heads=16, topk=512)

    def step(q: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        out, lse = sparse_mla.decode(q * 2, cache, indices, backend=backend)
        return out.float() * 3 + lse[..., None].clamp_min(-1e4)

    compiled = torch.compile(step, fullgraph=True)
    args = call["q"], call["indices"]
    torch.testing.assert_close(compiled(*args), step(*args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page_stride", (656 * 64 + 4, 656 * 64 + 8))
def test_pool_strides_that_are_not_multiples_of_16(page_stride: int) -> None:
    packed = make_cache("v32_fp8", 20, 64)
    pool = torch.full((20, page_stride), 0xFF, dtype=torch.uint8, device="cuda")
    pool[:, : 656 * 64] = packed.pages
    cache = KVCache(pool[:, : 656 * 64], 64, packed.layout, 656)
    call = make_call(cache, b=2, s_q=1, heads=8, topk=200)
    out, lse = sparse_mla.decode(cache=cache, **call)
    assert_close(out, lse, reference.decode(cache=cache, **call))


@pytest.mark.parametrize("heads", (16, 64))
def test_concurrent_streams_do_not_meet(backend: str, heads: int) -> None:
    cache = make_cache("v32_fp8", 64, 64)
    calls = [make_call(cache, b=2, s_q=1, heads=heads, topk=2000) for _ in range(4)]
    want = [sparse_mla.decode(cache=cache, backend=backend, **call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(10):
        got = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(sparse_mla.decode(cache=cache, backend=backend, **call))
        torch.cuda.synchronize()
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
