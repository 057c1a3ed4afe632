"""The paged cache: slots, strides, wrapping an engine's tensor, offsets past 2^31 bytes."""

from __future__ import annotations

import pytest
import torch
from test_kv_layout import planar_layout

from drawn import generator, scale_of
from sparse_mla import KVCache
from sparse_mla.kv_layout import LAYOUTS, KVLayout

V32 = LAYOUTS["v32_fp8"]
PAGE_SIZES = [1, 2, 53, 61, 64, 256]


def tokens(
    n: int, layout: KVLayout = V32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    made = generator(seed)
    rope = torch.randn(n, layout.rope.count, generator=made) if layout.rope else None
    return torch.randn(n, layout.latent.count, generator=made), rope


def packed(
    layout: KVLayout, latent: torch.Tensor, rope: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return layout.pack(latent, rope, tensor_scale=scale_of(layout))


def unpacked(layout: KVLayout, latent: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    return layout.unpack(*packed(layout, latent, rope), tensor_scale=scale_of(layout))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "planar"])
def test_append_then_read(layout: str, page_size: int) -> None:
    kind = planar_layout() if layout == "planar" else LAYOUTS[layout]
    cache = KVCache.empty(3, page_size, kind, tensor_scale=scale_of(kind))
    assert cache.num_pages == 3 and cache.num_slots == 3 * page_size
    latent, rope = tokens(cache.num_slots, kind)
    order = torch.randperm(cache.num_slots, generator=generator(1))
    cache.append(latent, rope, order)
    assert torch.equal(cache.read(order), unpacked(kind, latent, rope))
    back = order.flip(0).to(torch.int32)
    assert torch.equal(cache.read(back), unpacked(kind, latent, rope).flip(0))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "planar"])
def test_append_touches_its_slots_and_nothing_else(layout: str, page_size: int) -> None:
    kind = planar_layout() if layout == "planar" else LAYOUTS[layout]
    stride = -(-kind.page_bytes(page_size) // 16) * 16 + 48
    scale = scale_of(kind)
    cache = KVCache.empty(4, page_size, kind, page_stride=stride, tensor_scale=scale)
    pool = cache.pages.as_strided((4, stride), (stride, 1))
    pool.copy_(torch.randint(0, 256, pool.shape, generator=generator(2)))
    before = pool.clone()
    n = cache.num_slots
    slots = torch.randperm(n, generator=generator(3))[: max(2, n // 3)]
    slots[1] = -1
    latent, rope = tokens(len(slots), kind, seed=4)
    cache.append(latent, rope, slots)

    # The same writes with byte offsets worked out by hand.
    rows, footers = packed(kind, latent, rope)
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        at = offset * kind.row_bytes
        before[page, at : at + kind.row_bytes] = rows[i]
        at = page_size * kind.row_bytes + offset * kind.footer_bytes
        before[page, at : at + kind.footer_bytes] = footers[i]
    assert torch.equal(pool, before)


def test_nothing_but_skipped_slots_changes_nothing() -> None:
    cache = KVCache.empty(2, 4)
    before = cache.pages.clone()
    cache.append(*tokens(3), torch.full((3,), -1))
    cache.append(*tokens(0), torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache.pages, before)


def test_append_passes_the_scale_rounding_on() -> None:
    cache = KVCache.empty(1, 8)
    latent, rope = tokens(8)
    cache.append(latent, rope, torch.arange(8), scale_rounding="pow2")
    scales = V32.scales.read(cache.rows_view()[0])
    assert (torch.frexp(scales)[0] == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_append_takes_any_float(dtype: torch.dtype) -> None:
    latent, rope = tokens(4)
    latent, rope = latent.to(torch.bfloat16).to(dtype), rope.to(torch.bfloat16).to(dtype)
    cache = KVCache.empty(1, 4)
    cache.append(latent, rope, torch.arange(4))
    assert torch.equal(cache.read(torch.arange(4)), unpacked(V32, latent.float(), rope.float()))


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_a_planar_page_is_rows_then_footers(page_size: int) -> None:
    kind = planar_layout()
    cache = KVCache.empty(2, page_size, kind)
    latent, rope = tokens(cache.num_slots, kind)
    cache.append(latent, rope, torch.arange(cache.num_slots))
    rows, footers = kind.pack(latent, rope)
    page = cache.pages[1]
    split = page_size * kind.row_bytes
    assert cache.pages.shape[1] == kind.page_bytes(page_size)
    assert torch.equal(page[:split].view(page_size, -1), rows[page_size:])
    end = split + page_size * kind.footer_bytes
    assert torch.equal(page[split:end].view(page_size, -1), footers[page_size:])


def test_default_page_stride_suits_any_layout() -> None:
    """Packed pages of a planar layout need not be multiples of 16 bytes; strides are."""
    cache = KVCache.empty(3, 1, planar_layout(page_multiple=1))
    assert cache.pages.shape[1] == 664 and cache.pages.stride(0) == 672


V32_DTYPES = [torch.uint8, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", V32_DTYPES)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_wrapping_a_packed_v32_tensor(dtype: torch.dtype, dims: int) -> None:
    source = KVCache.empty(3, 5)
    source.append(*tokens(15), torch.arange(15))
    tensor = source.pages.view(dtype)
    if dims > 2:
        tensor = tensor.view(3, 5, *[1] * (dims - 3), 656)
    cache = KVCache.from_tensor(tensor, "v32_fp8", page_size=5 if dims == 2 else None)
    assert (cache.page_size, cache.num_slots, cache.token_stride) == (5, 15, 656)
    assert cache.pages.data_ptr() == tensor.data_ptr()
    assert torch.equal(cache.read(torch.arange(15)), source.read(torch.arange(15)))


@pytest.mark.parametrize(("layout", "width"), [("bf16", 576), ("bf16_nope", 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_wrapping_a_bf16_tensor(layout: str, width: int, dtype: torch.dtype) -> None:
    values = torch.randn(4, 6, 1, width, generator=generator(5)).to(torch.bfloat16)
    cache = KVCache.from_tensor(values.view(dtype), layout)
    assert torch.equal(cache.read(torch.arange(24)), values.view(24, width).double())


@pytest.mark.parametrize("layout", ["v32_fp8", "bf16"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_wrapping_a_strided_pool(layout: str, offset: int) -> None:
    """Pages between other layers' pages, rows padded, the storage starting anywhere."""
    kind = LAYOUTS[layout]
    width = kind.row_bytes
    pool = torch.empty(offset + 4 * 3 * 7 * (width + 10), dtype=torch.uint8)
    view = pool.as_strided((4, 7, width), (3 * 7 * (width + 10), width + 10, 1), offset)
    cache = KVCache.from_tensor(view, layout)
    assert cache.token_stride == width + 10
    latent, rope = tokens(28, kind)
    cache.append(latent, rope, torch.arange(28))
    assert torch.equal(cache.read(torch.arange(28)), unpacked(kind, latent, rope))
    assert torch.equal(view.reshape(28, width), kind.pack(latent, rope)[0])
    view.zero_()
    assert (pool != 0).sum() == pool.numel() - 28 * width, "bytes between rows were written"


def test_wrapping_a_planar_tensor() -> None:
    kind = planar_layout(page_multiple=1)
    source = KVCache.empty(3, 16, kind)
    source.append(*tokens(48, kind), torch.arange(48))
    shaped = source.pages.unflatten(1, (16, 664))
    cache = KVCache.from_tensor(shaped, kind)
    assert torch.equal(cache.read(torch.arange(48)), source.read(torch.arange(48)))


@pytest.mark.parametrize(
    ("tensor", "layout", "page_size", "message"),
    [
        (torch.zeros(2, 4, 656), "v32_fp8", None, "dtype torch.float32, layout v32_fp8 takes"),
        (torch.zeros(2, 4, 1152).to(torch.int8), "bf16", None, "dtype torch.int8"),
        (torch.zeros(2, 4, 576).to(torch.float16), "bf16", None, "dtype torch.float16"),
        (torch.zeros(2, 4, 576).to(torch.bfloat16), "v32_fp8", None, "dtype torch.bfloat16"),
        (torch.zeros(2, 4, 528, dtype=torch.uint8), "v32_fp8", None, "528 bytes per token"),
        (torch.zeros(2, 4, 576).to(torch.bfloat16), "bf16_nope", None, "1152 bytes per token"),
        (torch.zeros(2, 4, 2, 656, dtype=torch.uint8), "v32_fp8", None, "dim 2 .* must be 1"),
        (torch.zeros(2, 4, 1, 1, 656, dtype=torch.uint8), "v32_fp8", None, "5 dims"),
        (torch.zeros(656, dtype=torch.uint8), "v32_fp8", 1, r"shape \(656,\)"),
        (torch.zeros(2, 0, 656, dtype=torch.uint8), "v32_fp8", None, "page size must be >= 1"),
        (torch.zeros(2, 4, 656, dtype=torch.uint8), "v32_fp8", 5, "page_size is 5"),
        (torch.zeros(2, 656, dtype=torch.uint8), "v32_fp8", None, "page_size is None"),
        (torch.zeros(2, 656, dtype=torch.uint8), "v32_fp8", 0, "page_size is 0"),
        (torch.zeros(2, 656, dtype=torch.uint8), "v32_fp8", 2, "pages of 656 bytes"),
        (torch.zeros(2, 656, 4, dtype=torch.uint8).mT, "v32_fp8", None, "strides"),
        (torch.zeros(2, 1, 656, dtype=torch.uint8).expand(2, 4, 656), "v32_fp8", None, "stride 0"),
        (torch.zeros(1, 4, 656, dtype=torch.uint8).expand(2, 4, 656), "v32_fp8", None, "stride 0"),
        (torch.zeros(2, 4, 656, dtype=torch.uint8), "v32", None, "layout is 'v32'"),
        ([1, 2, 3], "v32_fp8", None, "tensor is list"),
    ],
)
def test_what_cannot_be_wrapped(
    tensor: torch.Tensor, layout: str, page_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache.from_tensor(tensor, layout, page_size)


def test_a_planar_tensor_must_be_packed() -> None:
    kind = planar_layout(page_multiple=1)
    padded = torch.zeros(2, 4, 700, dtype=torch.uint8)[..., :664]
    with pytest.raises(ValueError, match=r"token stride 700.*needs packed pages"):
        KVCache.from_tensor(padded, kind)


@pytest.mark.parametrize("page_size", [1, 2, 53, 64, 256])
@pytest.mark.parametrize("layout", ["v4_fp8", "v41_fp8_planar", "v41_fp4_planar"])
def test_planar_pages_as_engines_hold_them(layout: str, page_size: int) -> None:
    """FlashMLA's tests/quant.py: padded pages, cut, viewed as tokens. Scales lie after all rows."""
    kind = LAYOUTS[layout]
    width = kind.bytes_per_token
    padded = -(-page_size * width // kind.page_multiple) * kind.page_multiple
    assert kind.page_bytes(page_size) == padded and padded % kind.page_multiple == 0
    storage = torch.full((3, padded), 0xFF, dtype=torch.uint8)
    shaped = storage[:, : page_size * width].view(3, page_size, 1, width)
    cache = KVCache.from_tensor(shaped.view(torch.float8_e4m3fn), layout)
    assert cache.pages.stride(0) == padded and cache.token_stride == kind.row_bytes
    latent, rope = tokens(3 * page_size, kind)
    slots = torch.arange(3 * page_size)
    cache.append(latent, rope, slots)
    rows, footers = packed(kind, latent, rope)
    for slot in (0, page_size - 1, page_size, 3 * page_size - 1):
        page, offset = divmod(slot, page_size)
        at = offset * kind.row_bytes
        assert torch.equal(storage[page, at : at + kind.row_bytes], rows[slot])
        at = page_size * kind.row_bytes + offset * kind.footer_bytes
        assert torch.equal(storage[page, at : at + kind.footer_bytes], footers[slot])
    assert (storage[:, page_size * width :] == 0xFF).all(), "the padding was written"
    assert torch.equal(cache.read(slots), unpacked(kind, latent, rope))
    flat = KVCache.from_tensor(storage, layout, page_size)
    assert torch.equal(flat.read(slots), cache.read(slots))
    same = cache.tensor()
    assert same.shape == shaped.shape and same.stride(0) == padded
    assert torch.equal(same, shaped)


def test_rows_wider_than_the_layout() -> None:
    """GLM-5.3's 528 bytes in rows of 656: the tail is neither read nor written."""
    kind = LAYOUTS["glm53_nope_fp8"]
    wide = torch.full((3, 8, 1, 656), 0xFF, dtype=torch.uint8)
    cache = KVCache.from_tensor(wide, "glm53_nope_fp8")
    assert cache.token_stride == 656 and cache.pages.stride(0) == 8 * 656
    latent, _ = tokens(24, kind)
    cache.append(latent, None, torch.arange(24))
    assert torch.equal(cache.read(torch.arange(24)), unpacked(kind, latent, None))
    assert (wide[..., 528:] == 0xFF).all()
    one = KVCache.from_tensor(wide[:, :1], "glm53_nope_fp8")
    assert torch.equal(one.read(torch.arange(3)), cache.read(torch.tensor([0, 8, 16])))
    with pytest.raises(ValueError, match="656 bytes per token, layout v41_fp8_inline has 528"):
        KVCache.from_tensor(wide, "v41_fp8_inline")
    with pytest.raises(ValueError, match=r"500 bytes per token.* has 528 or 656"):
        KVCache.from_tensor(wide[..., :500], "glm53_nope_fp8")


def test_a_planar_token_stride_is_the_row() -> None:
    pages = torch.zeros(2, 4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match="token_stride is 584, the planar layout v4_fp8 needs 576"):
        KVCache(pages, 4, LAYOUTS["v4_fp8"], 584)


def test_the_scale_of_a_tensor_is_read_when_it_is_needed() -> None:
    scale = torch.tensor([0.5])
    cache = KVCache.empty(1, 4, "fp8_tensor", tensor_scale=scale)
    latent = torch.randn(4, 576, generator=generator(12))
    cache.append(latent, None, torch.arange(4))
    once = cache.read(torch.arange(4))
    scale.fill_(1.0)
    assert torch.equal(cache.read(torch.arange(4)), 2 * once)
    for make in (
        lambda: KVCache.empty(1, 4, "fp8_tensor"),
        lambda: KVCache.from_tensor(cache.tensor(), "fp8_tensor"),
        lambda: KVCache(cache.pages, 4, cache.layout, 576, torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"layout fp8_tensor needs a tensor \[1\]"):
            make()
    with pytest.raises(ValueError, match="tensor_scale is given, layout bf16 has none"):
        KVCache.empty(1, 4, "bf16", tensor_scale=scale)


@pytest.mark.parametrize("slot", [3000, 3_273_603, 6_547_206, 6_553_599])
def test_offsets_past_2_31_and_2_32_bytes(slot: int) -> None:
    """3,273,603 * 656 is just past 2^31 and 6,547,206 * 656 just past 2^32.

    The pool is virtual memory: only the pages that are written or read become real.
    """
    try:
        cache = KVCache.empty(102_400, 64)  # 4.3 GB
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of virtual memory cannot be had: {error}")
    assert cache.num_slots == 6_553_600
    latent, rope = tokens(2)
    slots = torch.tensor([slot, 5], dtype=torch.int32)
    cache.append(latent, rope, slots)
    assert torch.equal(cache.read(slots), unpacked(V32, latent, rope))
    # The row lies where the slot says, and not 2^31 or 2^32 bytes before it.
    flat = cache.pages.view(-1)
    at = slot * 656
    assert torch.equal(flat[at : at + 656], V32.pack(latent, rope)[0][0])
    for wrap in (2**31, 2**32):
        if at >= wrap:
            assert (flat[at - wrap : at - wrap + 656] == 0).all()
