"""The drop-in module: FlashMLA's signatures, shapes and lse conventions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from dense import dense_call
from drawn import Call, assert_exact_but_for_rounding, decode_call, prefill_call
from sparse_mla import LAYOUTS, KVCache
from sparse_mla.compat import flash_mla

REQUIRED = inspect.Parameter.empty

# flash_mla/flash_mla_interface.py of deepseek-ai/FlashMLA at 9241ae3.
SIGNATURES = {
    "flash_mla_with_kvcache": {
        "q": REQUIRED,
        "k_cache": REQUIRED,
        "block_table": REQUIRED,
        "cache_seqlens": REQUIRED,
        "head_dim_v": REQUIRED,
        "tile_scheduler_metadata": REQUIRED,
        "num_splits": None,
        "softmax_scale": None,
        "causal": False,
        "is_fp8_kvcache": False,
        "indices": None,
        "attn_sink": None,
        "extra_k_cache": None,
        "extra_indices_in_kvcache": None,
        "topk_length": None,
        "extra_topk_length": None,
    },
    "flash_mla_sparse_fwd": {
        "q": REQUIRED,
        "kv": REQUIRED,
        "indices": REQUIRED,
        "sm_scale": REQUIRED,
        "d_v": 512,
        "attn_sink": None,
        "topk_length": None,
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = {
        n: p
        for n, p in inspect.signature(getattr(flash_mla, name)).parameters.items()
        if p.kind != inspect.Parameter.KEYWORD_ONLY
    }
    assert list(parameters) == list(SIGNATURES[name])
    assert {n: p.default for n, p in parameters.items()} == SIGNATURES[name]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_what_we_add_is_keyword_only_and_optional() -> None:
    parameters = inspect.signature(flash_mla.flash_mla_with_kvcache).parameters
    ours = {n: p for n, p in parameters.items() if p.kind == inspect.Parameter.KEYWORD_ONLY}
    assert list(ours) == ["kv_format", "extra_kv_format", "kv_scale", "extra_kv_scale"]
    assert {p.default for p in ours.values()} == {None}


def test_get_mla_metadata_takes_anything() -> None:
    parameters = inspect.signature(flash_mla.get_mla_metadata).parameters
    kinds = [p.kind for p in parameters.values()]
    assert kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    metadata, nothing = flash_mla.get_mla_metadata(torch.zeros(3), 64, is_fp8_kvcache=True)
    assert nothing is None and isinstance(metadata, flash_mla.FlashMLASchedMeta)
    assert metadata.have_initialized is False
    assert metadata.tile_scheduler_metadata is None and metadata.num_splits is None
    assert flash_mla.get_mla_metadata()[0] is not metadata


def run_decode(call: Call, metadata: Any = None, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layout = call.cache.layout
    shaped = call.cache.rows_view()[:, :, None]
    if not layout.quantised:
        shaped = shaped.view(torch.bfloat16)
    options = dict(call.options)
    options["softmax_scale"] = options.pop("scale", None)
    return flash_mla.flash_mla_with_kvcache(
        call.q,
        shaped,
        None,
        None,
        512,
        flash_mla.get_mla_metadata()[0] if metadata is None else metadata,
        is_fp8_kvcache=layout.quantised,
        indices=call.indices,
        **options,
        **more,
    )


def check_decode(call: Call, answer: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = answer
    b, s_q, heads, _ = call.q.shape
    assert out.shape == (b, s_q, heads, 512) and out.dtype == torch.bfloat16
    assert lse.shape == (b, heads, s_q) and lse.dtype == torch.float32
    want = call.oracle()
    empty = want.lse == float("-inf")
    assert torch.equal(lse.transpose(1, 2) == float("inf"), empty), "+inf where nothing is valid"
    ours = torch.where(lse == float("inf"), float("-inf"), lse).transpose(1, 2)
    assert_exact_but_for_rounding(out, ours, want)


@pytest.mark.parametrize("layout", ["v32_fp8", "bf16", "bf16_nope"])
def test_decode(layout: str) -> None:
    call = decode_call(layout, b=3, s_q=2, heads=5, lengths=True, sink=True, scale=0.07)
    call.indices[0, 1] = -1
    check_decode(call, run_decode(call))


def test_arguments_by_position() -> None:
    call = decode_call(heads=3)
    cache = call.cache.rows_view()[:, :, None]
    metadata = flash_mla.get_mla_metadata()[0]
    answer = flash_mla.flash_mla_with_kvcache(
        call.q, cache, None, None, 512, metadata, None, 0.05, False, True, call.indices
    )
    call.options["scale"] = 0.05
    check_decode(call, answer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_cache_dtypes(dtype: torch.dtype) -> None:
    call = decode_call(heads=3)
    cache = call.cache.rows_view()[:, :, None].view(dtype)
    metadata = flash_mla.get_mla_metadata()[0]
    answer = flash_mla.flash_mla_with_kvcache(
        call.q, cache, None, None, 512, metadata, is_fp8_kvcache=True, indices=call.indices
    )
    check_decode(call, answer)


def test_metadata_may_be_reused_with_other_lengths_and_shapes() -> None:
    """FlashMLA's own object must not be; engines got that wrong, and here it cannot matter."""
    metadata = flash_mla.get_mla_metadata()[0]
    for seed, b, topk in ((0, 3, 100), (1, 3, 100), (2, 5, 100), (3, 1, 7), (4, 3, 100)):
        call = decode_call(b=b, topk=topk, heads=3, lengths=True, seed=seed)
        check_decode(call, run_decode(call, metadata))


@pytest.mark.parametrize("width", [576, 512])
def test_sparse_fwd(width: int) -> None:
    call = prefill_call(
        {576: "bf16", 512: "bf16_nope"}[width], s_q=5, heads=3, page_size=1, pages=300,
        lengths=True, sink=True, scale=0.06,
    )  # fmt: skip
    kv = call.cache.rows_view().view(torch.bfloat16)
    assert kv.shape == (300, 1, width)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
        call.q, kv, call.indices[:, None], 0.06, 512,
        call.options["attn_sink"], call.options["topk_length"],
    )  # fmt: skip
    assert max_logits.shape == lse.shape == (5, 3)
    want = call.oracle()
    empty = want.lse == float("-inf")
    assert empty.any() and torch.equal(lse == float("inf"), empty)
    assert torch.equal(max_logits == float("-inf"), empty)
    assert torch.allclose(max_logits.double(), want.max_logits, rtol=2e-6, atol=2e-5)
    assert_exact_but_for_rounding(out, torch.where(empty, float("-inf"), lse), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_dense(kv_heads: int, causal: bool) -> None:
    """Each KV head serves its own query heads; the sequences' pages are shared."""
    calls = [
        dense_call(lengths=(0, 3, 100), s_q=2, heads=4, seed=i, causal=causal, scale=0.05)
        for i in range(kv_heads)
    ]
    tables = calls[0].block_table
    cache = torch.full((9, 64, kv_heads, 576), float("nan"), dtype=torch.bfloat16)
    for head, call in enumerate(calls):
        for i, count in enumerate((0, 1, 2)):
            own = call.cache.rows_view().view(torch.bfloat16)[call.block_table[i, :count].long()]
            cache[tables[i, :count].long(), :, head] = own
    out, lse = flash_mla.flash_mla_with_kvcache(
        torch.cat([call.q for call in calls], dim=2), cache, tables, calls[0].cache_seqlens, 512,
        flash_mla.get_mla_metadata()[0], softmax_scale=0.05, causal=causal,
    )  # fmt: skip
    assert lse.shape == (3, 4 * kv_heads, 2)
    for head, call in enumerate(calls):
        own = slice(4 * head, 4 * head + 4)
        want = call.oracle()
        empty = want.lse == float("-inf")
        ours = lse[:, own].transpose(1, 2)
        assert torch.equal(ours == float("inf"), empty) and empty.any()
        assert_exact_but_for_rounding(out[:, :, own], torch.where(empty, float("-inf"), ours), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": None}, "block_table is None"),
        ({"cache_seqlens": None}, "cache_seqlens is None"),
        ({"head_dim_v": 256}, "head_dim_v is 256"),
        ({"k_cache": torch.zeros(3, 64, 3, 576, dtype=torch.bfloat16)}, "3 heads, q has 4"),
        ({"k_cache": torch.zeros(3, 64, 1, 576)}, "k_cache: dtype is torch.float32"),
        ({"attn_sink": torch.zeros(4)}, "attn_sink is given, must be None when indices is None"),
        ({"topk_length": torch.zeros(2)}, "topk_length is given"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf"),
    ],
)
def test_dense_refuses(change: dict[str, Any], message: str) -> None:
    call = dense_call(lengths=(3, 70), heads=4, spare=0)
    arguments = {
        "q": call.q,
        "k_cache": call.cache.rows_view().view(torch.bfloat16)[:, :, None],
        "block_table": call.block_table,
        "cache_seqlens": call.cache_seqlens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
    }
    flash_mla.flash_mla_with_kvcache(**arguments)
    with pytest.raises(ValueError, match=message):
        flash_mla.flash_mla_with_kvcache(**{**arguments, **change})


def test_dense_over_fp8_rows() -> None:
    call = dense_call("fp8_tensor", lengths=(3, 70), heads=4, scale=0.05)
    out, lse = flash_mla.flash_mla_with_kvcache(
        call.q, call.cache.rows_view()[:, :, None], call.block_table, call.cache_seqlens, 512,
        flash_mla.get_mla_metadata()[0], softmax_scale=0.05, is_fp8_kvcache=True,
        kv_format="fp8_tensor", kv_scale=call.cache.tensor_scale,
    )  # fmt: skip
    assert_exact_but_for_rounding(out, lse.transpose(1, 2), call.oracle())


FP8_LAYOUTS = [name for name, layout in LAYOUTS.items() if layout.quantised]


def shaped_as_flash_mla(cache: KVCache) -> torch.Tensor:
    """Pages as FlashMLA's callers shape them: padded storage, cut, viewed as tokens."""
    width = cache.layout.bytes_per_token
    storage = torch.full((cache.num_pages, cache.layout.page_bytes(cache.page_size)), 0xFF)
    storage = storage.to(torch.uint8)
    size = cache.page_size * width
    pages = storage[:, :size].view(cache.num_pages, cache.page_size, 1, width)
    pages.view(cache.num_pages, size).copy_(cache.pages[:, :size])
    return pages.view(torch.float8_e4m3fn)


def ask(call: Call, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = dict(call.options)
    scale = options.pop("scale", None)
    extra = options.pop("extra_cache", None)
    if extra is not None:
        more["extra_k_cache"] = shaped_as_flash_mla(extra)
        more["extra_kv_scale"] = extra.tensor_scale
        more["extra_indices_in_kvcache"] = options.pop("extra_indices")
    return flash_mla.flash_mla_with_kvcache(
        call.q, shaped_as_flash_mla(call.cache), None, None, 512,
        flash_mla.get_mla_metadata()[0], softmax_scale=scale, is_fp8_kvcache=True,
        indices=call.indices, kv_scale=call.cache.tensor_scale, **options, **more,
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 53, 64])
@pytest.mark.parametrize("layout", ["v32_fp8", "v4_fp8"])
def test_flash_mla_tells_its_two_layouts_by_width(layout: str, page_size: int) -> None:
    call = decode_call(
        layout, b=3, s_q=2, heads=5, page_size=page_size, lengths=True, sink=True,
        extra_layout=layout,
    )  # fmt: skip
    check_decode(call, ask(call))


@pytest.mark.parametrize("layout", FP8_LAYOUTS)
def test_layouts_by_name(layout: str) -> None:
    if LAYOUTS[layout].extra_only:
        main = "v41_fp8_planar" if LAYOUTS[layout].planar else "v41_fp8_inline"
        call = decode_call(main, heads=3, extra_layout=layout)
        check_decode(call, ask(call, kv_format=main, extra_kv_format=layout))
        with pytest.raises(ValueError, match=f"layout {layout}, which models use for an extra"):
            ask(Call(call.q, call.options["extra_cache"], call.indices), kv_format=layout)
    else:
        call = decode_call(layout, heads=3)
        check_decode(call, ask(call, kv_format=layout))


def test_rows_of_glm53_may_be_as_wide_as_v32() -> None:
    call = decode_call("glm53_nope_fp8", heads=3)
    wide = torch.full((call.cache.num_pages, call.cache.page_size, 1, 656), 0xFF, dtype=torch.uint8)
    wide[..., :528] = call.cache.rows_view()[:, :, None]
    answer = flash_mla.flash_mla_with_kvcache(
        call.q, wide, None, None, 512, flash_mla.get_mla_metadata()[0], is_fp8_kvcache=True,
        indices=call.indices, kv_format="glm53_nope_fp8",
    )  # fmt: skip
    check_decode(call, answer)


@pytest.mark.parametrize(
    ("width", "bytes_per_token", "message"),
    [
        (512, 528, "528: v41_fp8_planar, v41_fp8_inline, glm53_nope_fp8. Name one by kv_format"),
        (512, 656, "656: v32_fp8, glm53_nope_fp8. Name one by kv_format"),
        (576, 584, "v32_fp8 has 656; layouts with 584: v4_fp8."),
        (576, 576, "layouts with 576: fp8_tensor."),
        (512, 288, "layouts with 288: v41_fp4_planar, v41_fp4_inline."),
        (576, 100, "layouts with 100: none."),
        (640, 656, "q is 640 wide"),
    ],
)
@pytest.mark.parametrize("name", ["k_cache", "extra_k_cache"])
def test_a_width_without_a_name(name: str, width: int, bytes_per_token: int, message: str) -> None:
    call = decode_call("v32_fp8" if width == 576 else "v4_fp8", heads=2)
    caches = {"k_cache": shaped_as_flash_mla(call.cache)}
    if name == "extra_k_cache" and width == 640:
        return
    caches[name] = torch.zeros(2, 4, 1, bytes_per_token, dtype=torch.uint8)
    q = torch.zeros(2, 1, 2, width, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        flash_mla.flash_mla_with_kvcache(
            q, block_table=None, cache_seqlens=None, head_dim_v=512,
            tile_scheduler_metadata=flash_mla.get_mla_metadata()[0], is_fp8_kvcache=True,
            indices=call.indices, extra_indices_in_kvcache=call.indices, **caches,
        )  # fmt: skip
