"""Decode on the CPU backend against the oracle: the whole of docs/semantics.md."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from drawn import (
    Call,
    assert_exact_but_for_rounding,
    compare,
    decode_call,
    filled_cache,
    generator,
    poison_unselected,
)
from hostile import ALL_LAYOUTS as LAYOUTS
from hostile import DECODE_CALLS
from hostile import LAYOUTS as KERNEL_LAYOUTS
from sparse_mla import KVCache, decode


def run(call: Call, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    return decode(call.q, call.cache, call.indices, backend="cpu", **call.options, **more)


def check(call: Call) -> None:
    assert_exact_but_for_rounding(*run(call), call.oracle())


def test_memory_that_torch_hands_out_is_poisoned() -> None:
    """What the fixture in conftest.py promises."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn):
        assert torch.empty(1000, dtype=dtype).float().isnan().all()
    assert (torch.empty(1000, dtype=torch.uint8) == 0xFF).all()
    assert (torch.empty(1000, dtype=torch.int32) == 2**31 - 1).all()
    some = torch.zeros(10)
    assert torch.empty_like(some).isnan().all()
    assert some.new_empty(7).isnan().all()
    assert torch.empty_strided((3, 4), (4, 1)).isnan().all()
    assert (KVCache.empty(2, 64).pages == 0xFF).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 5, 8, 16, 20, 33, 64, 96, 128])
def test_heads(layout: str, heads: int) -> None:
    check(decode_call(layout, heads=heads))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topk", [0, 1, 2, 63, 64, 65, 100, 2047])
def test_topk(layout: str, topk: int) -> None:
    check(decode_call(layout, heads=3, topk=topk, s_q=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 2, 53, 61, 64, 256])
def test_page_size(layout: str, page_size: int) -> None:
    check(decode_call(layout, heads=3, page_size=page_size, pages=5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [-0.06, 0.0])
def test_scales_of_the_other_sign(layout: str, scale: float) -> None:
    """The largest logit is then that of the smallest product."""
    check(decode_call(layout, heads=5, lengths=True, sink=True, scale=scale))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("b", [1, 7, 8, 9, 20])
def test_batch(layout: str, b: int) -> None:
    check(decode_call(layout, b=b, heads=2, topk=300, lengths=True, sink=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("s_q", [2, 3, 8])
def test_several_queries_per_sequence(layout: str, s_q: int) -> None:
    """A list per query, a length per sequence."""
    check(decode_call(layout, b=4, s_q=s_q, heads=3, lengths=True, sink=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DECODE_CALLS)
def test_hostile(layout: str, name: str) -> None:
    check(DECODE_CALLS[name](layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_misaligned_pool(layout: str, offset: int) -> None:
    """Page stride not a multiple of 4, storage starting anywhere: slow, but answered."""
    call = decode_call(layout, heads=3)
    pages, size = call.cache.pages.shape
    stride = size + 1001
    pool = torch.full((offset + pages * stride,), 0xFF, dtype=torch.uint8)
    view = pool.as_strided((pages, size), (stride, 1), offset)
    view.copy_(call.cache.pages)
    size, scale = call.cache.page_size, call.cache.tensor_scale
    cache = KVCache.from_tensor(view, layout, page_size=size, tensor_scale=scale)
    check(Call(call.q, cache, call.indices))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_do(layout: str) -> None:
    for b, s_q in ((0, 1), (3, 0), (0, 0)):
        call = decode_call(layout, b=b, s_q=s_q, sink=True)
        out, lse = run(call)
        assert out.shape == (b, s_q, 16, 512) and out.dtype == torch.bfloat16
        assert lse.shape == (b, s_q, 16) and lse.dtype == torch.float32
    check(decode_call(layout, pages=0))


@pytest.mark.parametrize("slot", [3_273_603, 6_547_206, 6_553_599])
def test_offsets_past_2_31_and_2_32_bytes(slot: int) -> None:
    try:
        cache = KVCache.empty(102_400, 64)
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of virtual memory cannot be had: {error}")
    made = generator(3)
    chosen = torch.tensor([slot, slot - 1, slot - 70, 1])
    cache.append(torch.randn(4, 512, generator=made), torch.randn(4, 64, generator=made), chosen)
    q = torch.randn(1, 1, 4, 576, generator=made).to(torch.bfloat16)
    check(Call(q, cache, chosen.to(torch.int32).view(1, 1, 4)))


def test_more_slots_than_int32_can_count() -> None:
    """The same page 2^31 + 5 times (page stride 0): slot 2^31 - 1 is valid and must be read."""
    one = filled_cache("v32_fp8", 1, 1)
    cache = KVCache(one.pages.expand(2**31 + 5, -1), 1, one.layout, one.token_stride)
    q = torch.randn(1, 1, 2, 576, generator=generator(4)).to(torch.bfloat16)
    call = Call(q, cache, torch.tensor([[[2**31 - 1, 7, -1]]], dtype=torch.int32))
    out, lse = run(call)
    want = Call(q, one, torch.tensor([[[0, 0, -1]]], dtype=torch.int32)).oracle()
    assert_exact_but_for_rounding(out, lse, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_every_time(layout: str) -> None:
    call = decode_call(layout, b=9, heads=20, topk=700, lengths=True, sink=True)
    first = run(call)
    for _ in range(3):
        again = run(call)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("layout", "heads", "threads"),
    [
        *(
            (layout, heads, 1)
            for layout in KERNEL_LAYOUTS
            for heads in (1, 2, 3, 5, 8, 16, 33, 128)
        ),
        *((layout, heads, 2) for layout in KERNEL_LAYOUTS for heads in (1, 16, 64)),
        *((layout, 5, 1) for layout in LAYOUTS if layout not in KERNEL_LAYOUTS),
    ],
    indirect=["threads"],
)
def test_batch_invariant(layout: str, heads: int, threads: int) -> None:
    """A row alone has the bits that it has in a batch, at any place in it."""
    call = decode_call(layout, b=19, heads=heads, topk=700, lengths=True)
    lengths = call.options["topk_length"]
    out, lse = run(call, batch_invariant=True)
    assert torch.get_num_threads() == threads
    assert_exact_but_for_rounding(out, lse, call.oracle())
    for part in (slice(0, 1), slice(7, 8), slice(5, 18), slice(18, 19)):
        alone = Call(call.q[part], call.cache, call.indices[part], {"topk_length": lengths[part]})
        out1, lse1 = run(alone, batch_invariant=True)
        assert torch.equal(out[part], out1) and torch.equal(lse[part], lse1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_query_spoils_itself_only(layout: str, bad: float) -> None:
    call = decode_call(layout, b=3, s_q=2, heads=4, topk=300)
    out, lse = run(call)
    call.q[1, 0, 2, 17] = bad
    out2, lse2 = run(call)
    assert out2[1, 0, 2].isnan().any(), "the poison must stay visible"
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(out[others], out2[others]) and torch.equal(lse[others], lse2[others])


def write_bad(cache: KVCache, slot: int, where: str) -> None:
    """Put a NaN or Inf into one field of a token's bytes."""
    at = {
        "e4m3 0x7f": (300, [0x7F]),
        "e4m3 0xff": (301, [0xFF]),
        "scale NaN": (516, [0x00, 0x00, 0xC0, 0x7F]),
        "scale Inf": (520, [0x00, 0x00, 0x80, 0x7F]),
        "rope NaN": (560, [0xC0, 0x7F]),
        "bf16 NaN": (560, [0xC0, 0x7F]),
        "bf16 Inf": (562, [0x80, 0x7F]),
        "ue8m0 0xff in row": (515, [0xFF]),
        "ue8m0 0xff in footer": (3, [0xFF]),
        "e4m3 scale in row": (270, [0xFF]),
        "outer NaN": (292, [0x00, 0x00, 0xC0, 0x7F]),
        "outer Inf": (292, [0x00, 0x00, 0x80, 0x7F]),
        "rope NaN, v4": (470, [0xC0, 0x7F]),
        "rope NaN, nvfp4": (300, [0xC0, 0x7F]),
    }
    offset, value = at[where]
    page, token = divmod(slot, cache.page_size)
    row = (cache.footers_view() if "footer" in where else cache.rows_view())[page, token]
    row[offset : offset + len(value)] = torch.tensor(value, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        ("v32_fp8", "e4m3 0x7f"),
        ("v32_fp8", "e4m3 0xff"),
        ("v32_fp8", "scale NaN"),
        ("v32_fp8", "scale Inf"),
        ("v32_fp8", "rope NaN"),
        ("bf16", "bf16 NaN"),
        ("bf16", "bf16 Inf"),
        ("bf16_nope", "bf16 NaN"),
        ("v4_fp8", "e4m3 0xff"),
        ("v4_fp8", "ue8m0 0xff in footer"),
        ("v4_fp8", "rope NaN, v4"),
        ("v41_fp8_planar", "e4m3 0x7f"),
        ("v41_fp8_planar", "ue8m0 0xff in footer"),
        ("v41_fp8_inline", "ue8m0 0xff in row"),
        ("glm53_nope_fp8", "scale Inf"),
        ("glm53_nope_nvfp4", "e4m3 scale in row"),
        ("glm53_nope_nvfp4", "outer NaN"),
        ("glm53_nope_nvfp4", "outer Inf"),
        ("nvfp4_bf16_rope", "e4m3 scale in row"),
        ("nvfp4_bf16_rope", "rope NaN, nvfp4"),
        ("fp8_tensor", "e4m3 0x7f"),
    ],
)
@pytest.mark.parametrize("selected", [True, False])
def test_a_bad_token_spoils_those_who_select_it(layout: str, where: str, selected: bool) -> None:
    call = decode_call(layout, b=3, s_q=2, heads=4, topk=300)
    slot = 200
    call.indices[call.indices == slot] = -1
    if selected:
        call.indices[1, 0, 77] = slot
        call.indices[1, 0, 78] = slot
    cache = filled_cache(layout, call.cache.num_pages, call.cache.page_size)
    call = Call(call.q, cache, call.indices)
    out, lse = run(call)
    write_bad(cache, slot, where)
    out2, lse2 = run(call)
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = not selected
    assert torch.equal(out[others], out2[others]) and torch.equal(lse[others], lse2[others])
    if selected:
        wrong = ~out2[1, 0].isfinite().all(-1)
        assert wrong.any(), "the poison must stay visible"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_merge_to_the_whole(layout: str) -> None:
    """Two partial results weighted by exp(lse) give the answer over both lists."""
    call = decode_call(layout, b=5, heads=8, topk=120)
    call.indices[3, :, :60] = -1  # one half empty: lse -inf must have weight 0
    call.indices[4] = -1  # both halves empty
    whole = call.oracle()
    halves = [
        run(Call(call.q, call.cache, part.contiguous())) for part in call.indices.split(60, dim=-1)
    ]
    lses = torch.stack([lse for _, lse in halves]).double()
    merged_lse = torch.logsumexp(lses, 0)
    weight = torch.where(lses == -math.inf, 0.0, torch.exp(lses - merged_lse))
    merged = sum(w[..., None] * out.double() for w, (out, _) in zip(weight, halves, strict=True))
    # Each half is rounded once, the sum again: two roundings, sqrt(2) of one.
    error = compare(merged.to(torch.bfloat16), merged_lse.float(), whole)
    assert error.multiple <= 1.5 and error.lse <= 2e-6, error


def test_splits_and_batch_mean_nothing_to_the_answer() -> None:
    call = decode_call(heads=3, topk=300)
    out, lse = run(call)
    for splits in (1, 2, 7, 16, 1000):
        again = run(call, num_splits=splits)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_nothing_is_written_to_the_inputs() -> None:
    call = decode_call(lengths=True, sink=True, s_q=2)
    kept = [t.clone() for t in (call.q, call.cache.pages, call.indices, *call.options.values())]
    run(call)
    now = [call.q, call.cache.pages, call.indices, *call.options.values()]
    for before, after in zip(kept, now, strict=True):
        raw = before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8)
        assert torch.equal(*raw)


def test_the_default_scale() -> None:
    call = decode_call("bf16", heads=2)
    out, lse = run(call)
    call.options["scale"] = 576**-0.5
    again = run(call)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_what_the_oracle_comparison_sees() -> None:
    """The comparison itself: a shrink of 1/100, a wrong row, a wrong lse and NaN are errors."""
    call = decode_call("bf16", b=4, heads=8)
    poison_unselected(call)
    ref = call.oracle()
    out, lse = run(call)
    assert compare(out, lse, ref).multiple == pytest.approx(1.0, abs=1e-3)
    shrunk = (ref.out * 0.99).to(torch.bfloat16)
    assert compare(shrunk, lse, ref).gain == pytest.approx(-1e-2, rel=0.1)
    wrong = out.clone()
    wrong[2, 0, 3] *= 1.01
    assert compare(wrong, lse, ref).worst_row > 3
    assert compare(out, lse + 1e-3, ref).lse > 2e-5
    wrong[0, 0, 0, 0] = math.nan
    with pytest.raises(AssertionError, match="NaN or Inf"):
        compare(wrong, lse, ref)
