"""Wrong arguments: ValueError that names the argument and the value, before anything runs."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drawn import scale_of
from sparse_mla import KVCache, decode, dispatch, prefill
from sparse_mla.compat import flash_mla
from sparse_mla.kv_layout import LAYOUTS

B, S_Q, HEADS, TOPK, PAGES, PAGE_SIZE = 2, 1, 4, 6, 3, 8
BF16, I32, U8 = torch.bfloat16, torch.int32, torch.uint8
SETTINGS = settings(
    max_examples=80,
    deadline=None,
    # CI draws the same examples every time; at a desk they are fresh.
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, BF16, torch.float8_e4m3fn,
    torch.int64, I32, torch.int16, torch.int8, U8, torch.bool, torch.complex64,
]  # fmt: skip
NOT_TENSORS = [None, 3, 2.5, "q", [1, 2], (), {}, object()]


def good_decode() -> dict[str, Any]:
    return {
        "q": torch.zeros(B, S_Q, HEADS, 576, dtype=BF16),
        "cache": KVCache(torch.zeros(PAGES, PAGE_SIZE * 656, dtype=U8), PAGE_SIZE, *_v32()),
        "indices": torch.zeros(B, S_Q, TOPK, dtype=I32),
        "topk_length": torch.ones(B, dtype=I32),
        "attn_sink": torch.zeros(HEADS),
    }


def _v32() -> tuple[Any, int]:
    return LAYOUTS["v32_fp8"], 656


def good_prefill() -> dict[str, Any]:
    return {
        "q": torch.zeros(B, HEADS, 576, dtype=BF16),
        "kv": torch.zeros(20, 576, dtype=BF16),
        "indices": torch.zeros(B, TOPK, dtype=I32),
        "topk_length": torch.ones(B, dtype=I32),
        "attn_sink": torch.zeros(HEADS),
    }


def good_flash_decode() -> dict[str, Any]:
    call = good_decode()
    del call["cache"]
    return {
        **call,
        "k_cache": torch.zeros(PAGES, PAGE_SIZE, 1, 656, dtype=U8),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        "is_fp8_kvcache": True,
    }


def good_flash_prefill() -> dict[str, Any]:
    call = good_prefill()
    call["kv"], call["indices"] = call["kv"][:, None], call["indices"][:, None]
    return {**call, "sm_scale": 0.05}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "decode": (decode, good_decode),
    "prefill": (prefill, good_prefill),
    "flash_mla_with_kvcache": (flash_mla.flash_mla_with_kvcache, good_flash_decode),
    "flash_mla_sparse_fwd": (flash_mla.flash_mla_sparse_fwd, good_flash_prefill),
}
TENSORS = {
    name: [key for key, value in make().items() if isinstance(value, torch.Tensor)]
    for name, (_, make) in FUNCTIONS.items()
}
CASES = [(name, key) for name, keys in TENSORS.items() for key in keys]
OPTIONAL = ("topk_length", "attn_sink")


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend may be reached."""

    def reached(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a backend was started")

    monkeypatch.setattr("sparse_mla.ops.sparse_decode.cpu.run", reached)
    monkeypatch.setattr("sparse_mla.ops.sparse_prefill.cpu.run", reached)


def refused(function: str, call: dict[str, Any], naming: str, *values: object) -> None:
    """The call raises ValueError; the message holds the argument's name and the values given."""
    with pytest.raises(ValueError) as caught:
        FUNCTIONS[function][0](**call)
    message = str(caught.value)
    assert re.search(rf"\b(?:{naming})\b", message), message
    for value in values:
        assert str(value) in message, (value, message)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_good_calls_are_good(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run, make = FUNCTIONS[function]
    assert len(run(**make())) >= 2


def none_is_allowed(function: str, key: str) -> bool:
    return key in OPTIONAL or (function, key) == ("flash_mla_with_kvcache", "indices")


@pytest.mark.parametrize(
    ("function", "key", "value"),
    [
        (f, k, v)
        for f, k in CASES
        for v in NOT_TENSORS
        if v is not None or not none_is_allowed(f, k)
    ],
)
def test_not_a_tensor(function: str, key: str, value: object) -> None:
    call = FUNCTIONS[function][1]()
    call[key] = value
    refused(function, call, key, type(value).__name__)


ALLOWED = {
    "q": [BF16], "kv": [BF16], "indices": [I32], "topk_length": [I32],
    "attn_sink": [torch.float32], "k_cache": [U8, torch.int8, torch.float8_e4m3fn],
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "key", "dtype"),
    [(f, k, dtype) for f, k in CASES for dtype in DTYPES if dtype not in ALLOWED[k]],
)
def test_dtype(function: str, key: str, dtype: torch.dtype) -> None:
    call = FUNCTIONS[function][1]()
    call[key] = torch.zeros(call[key].shape).to(dtype)
    refused(function, call, key, dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@SETTINGS
@given(data=st.data())
def test_shape(function: str, data: st.DataObject) -> None:
    """Any other shape of one tensor, empty ones among them, is refused or does fit after all."""
    call = FUNCTIONS[function][1]()
    key = data.draw(st.sampled_from(TENSORS[function]))
    old = call[key]
    sizes = st.sampled_from([0, 1, 2, 3, 4, 6, 7, 8, 20, 129, 512, 576, 656])
    if data.draw(st.booleans()):  # another number of dims
        shape = tuple(data.draw(st.lists(sizes, max_size=5)))
    else:  # one dim changed
        shape_list = list(old.shape)
        shape_list[data.draw(st.integers(0, old.dim() - 1))] = data.draw(sizes)
        shape = tuple(shape_list)
    if torch.Size(shape).numel() > 2**22 or fits(function, key, shape, tuple(old.shape)):
        return
    call[key] = torch.zeros(shape, dtype=old.dtype)
    # A q of other dims makes what must match it wrong instead, and so does a kv 512 wide.
    naming = {"q": "(q|k_cache|indices|topk_length|attn_sink)", "kv": "(kv|q)"}.get(key, key)
    refused(function, call, naming)


def fits(function: str, key: str, shape: tuple[int, ...], old: tuple[int, ...]) -> bool:
    """Shapes that are right although they differ from the example's."""
    same_but = [i for i, (a, b) in enumerate(zip(shape, old, strict=False)) if a != b]
    if len(shape) != len(old):
        lists = key == "indices" and function == "prefill"
        rows = key == "kv" and function == "prefill"
        if lists and len(shape) == 3:
            return shape[:2] == (B, 1)
        return rows and len(shape) == 3 and shape[1:] == (1, 576)
    if not same_but:
        return True
    if key == "indices":
        return same_but == [len(old) - 1]
    if key == "k_cache":
        return shape[1] > 0 and shape[2:] == (1, 656)
    if key == "kv":
        return same_but == [0]
    return False


@pytest.mark.parametrize(("function", "key"), CASES)
def test_last_dim_not_contiguous(function: str, key: str) -> None:
    call = FUNCTIONS[function][1]()
    old = call[key]
    call[key] = torch.zeros(*old.shape[:-1], 2 * old.shape[-1], dtype=old.dtype)[..., ::2]
    refused(function, call, key, "contiguous")


@pytest.mark.parametrize(("function", "key"), CASES)
def test_device(function: str, key: str) -> None:
    call = FUNCTIONS[function][1]()
    call[key] = call[key].to("meta")
    naming = key if key not in ("kv", "k_cache") else "(q|cache|kv|k_cache)"
    refused(function, call, naming, "meta")


@pytest.mark.parametrize("function", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("scale", "1"),
        ("scale", torch.tensor(1.0)),
        ("scale", True),  # causal=True, one place too early
        ("scale", 1e39),  # infinite in float32
        pytest.param("scale", 10**400, id="10**400"),
        ("backend", "cuda"),
        ("backend", ""),
        ("backend", 3),
    ],
)
def test_options(function: str, key: str, value: object) -> None:
    refused(function, {**FUNCTIONS[function][1](), key: value}, key, repr(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_splits", 0),
        ("num_splits", -1),
        ("num_splits", 1.5),
        ("num_splits", True),
        ("num_splits", "2"),
        ("num_splits", 1025),
        ("num_splits", 2**63),
        ("batch_invariant", None),
        ("batch_invariant", 1),
    ],
)
def test_decode_options(key: str, value: object) -> None:
    refused("decode", {**good_decode(), key: value}, key, repr(value))


def good_extra() -> dict[str, Any]:
    return {
        "extra_cache": KVCache(torch.zeros(2, 3 * 1152, dtype=U8), 3, LAYOUTS["bf16"], 1152),
        "extra_indices": torch.zeros(B, S_Q, 9, dtype=I32),
        "extra_topk_length": torch.ones(B, dtype=I32),
    }


def test_a_good_extra_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    decode(**good_decode(), **good_extra())
    extra = {**good_extra(), "extra_topk_length": None}
    decode(**good_decode(), **extra)


@pytest.mark.parametrize(
    ("changes", "naming", "values"),
    [
        ({"extra_cache": None}, "extra_indices", ["extra_cache is None"]),
        ({"extra_cache": None, "extra_indices": None}, "extra_topk_length", ["extra_cache is"]),
        ({"extra_indices": None}, "extra_indices", ["None"]),
        ({"extra_cache": torch.zeros(2, 4, 656, dtype=U8)}, "extra_cache", ["Tensor"]),
        ({"extra_cache": "v4_fp8"}, "extra_cache", ["str"]),
        ({"extra_indices": torch.zeros(B, S_Q, 9)}, "extra_indices", ["torch.float32"]),
        ({"extra_indices": torch.zeros(B, S_Q, 9).long()}, "extra_indices", ["torch.int64"]),
        ({"extra_indices": torch.zeros(B + 1, S_Q, 9, dtype=I32)}, "extra_indices", [B + 1]),
        ({"extra_indices": torch.zeros(B, 9, dtype=I32)}, "extra_indices", ["topk"]),
        ({"extra_indices": torch.zeros(B, S_Q, 9, 2, dtype=I32)[..., 0]}, "extra_indices", []),
        ({"extra_indices": torch.zeros(B, S_Q, 9, dtype=I32, device="meta")}, "extra_indices", []),
        ({"extra_indices": [[[1]]]}, "extra_indices", ["list"]),
        ({"extra_topk_length": torch.ones(B)}, "extra_topk_length", ["torch.float32"]),
        ({"extra_topk_length": torch.ones(B + 1, dtype=I32)}, "extra_topk_length", [B + 1]),
        ({"extra_topk_length": 3}, "extra_topk_length", ["int"]),
    ],
)
def test_extra_arguments(changes: dict[str, Any], naming: str, values: list[object]) -> None:
    refused("decode", {**good_decode(), **good_extra(), **changes}, naming, *values)


def test_an_extra_cache_of_another_width_or_device() -> None:
    call = {**good_decode(), **good_extra()}
    call["extra_cache"] = KVCache.empty(2, 3, "v4_fp8")
    refused("decode", call, "extra_cache", "v4_fp8", "d_qk 512", "v32_fp8", 576)
    call["extra_cache"] = KVCache.empty(2, 3, "bf16", device="meta")
    refused("decode", call, "extra_cache", "meta")


@pytest.mark.parametrize("layout", ["v41_fp4_planar", "v41_fp4_inline"])
def test_layouts_of_extra_caches_only(layout: str) -> None:
    call = good_decode()
    call["cache"] = KVCache.empty(2, 3, layout)
    refused("decode", call, "cache", layout, "extra cache")
    call = good_prefill()
    call["kv"] = KVCache.empty(2, 3, layout)
    refused("prefill", call, "kv", layout, "extra cache")


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "name",
    ["extra_indices_in_kvcache", "extra_topk_length", "extra_kv_format", "extra_kv_scale"],
)
def test_flash_mla_extra_arguments_without_a_cache(name: str, sparse: bool) -> None:
    """None of them may be ignored."""
    call = {**good_flash_decode(), name: torch.zeros(B, S_Q, 9, dtype=I32)}
    if not sparse:
        call |= {"indices": None, "topk_length": None, "attn_sink": None}
    refused("flash_mla_with_kvcache", call, name, "indices is None" if not sparse else "None")


def test_a_layout_of_the_callers_own() -> None:
    """The ops look layouts up by name: one of a known name with other fields was read as that."""
    for change in ({"tile": 64}, {"name": "mine"}):
        layout = replace(LAYOUTS["v32_fp8"], **change)  # type: ignore[arg-type]
        cache = KVCache(torch.zeros(PAGES, PAGE_SIZE * 656, dtype=U8), PAGE_SIZE, layout, 656)
        for call in (
            lambda cache=cache: decode(**{**good_decode(), "cache": cache}),
            lambda cache=cache: decode(
                **good_decode(), extra_cache=cache, extra_indices=good_decode()["indices"]
            ),
            lambda cache=cache: prefill(**{**good_prefill(), "kv": cache}),
        ):
            with pytest.raises(NotImplementedError, match=layout.name):
                call()


def test_an_equal_layout_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may have come from another process."""
    monkeypatch.undo()
    cache = good_decode()["cache"]
    same = KVCache(cache.pages, PAGE_SIZE, copy.deepcopy(cache.layout), 656)
    assert same.layout is not cache.layout
    decode(**{**good_decode(), "cache": same})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_queries_that_want_a_gradient(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass runs, the backward pass says that there is none."""
    monkeypatch.undo()
    run, make = FUNCTIONS[function]
    call = make()
    want = run(**call)
    call["q"].requires_grad_()
    got = run(**call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    name = "prefill" if "kv" in call else "decode"
    with pytest.raises(NotImplementedError, match=rf"sparse_mla\.{name} has no backward pass"):
        got[0].float().sum().backward()


@pytest.mark.parametrize("backend", ["sm90", "triton"])
def test_a_backend_without_the_layout_says_so(backend: str) -> None:
    """Asked for by name it must not fall back."""
    call = {**good_decode(), **good_extra(), "backend": backend}
    with pytest.raises(NotImplementedError, match=f"{backend}: "):
        decode(**call)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_dim_v", 576),
        ("head_dim_v", None),
        ("head_dim_v", torch.zeros(2)),
        ("is_fp8_kvcache", None),
        ("causal", torch.ones(2)),
        ("num_splits", torch.zeros(3)),
        ("num_splits", 4),
        ("causal", True),
        ("softmax_scale", float("nan")),
        ("softmax_scale", "1"),
        ("is_fp8_kvcache", False),  # the cache is bytes
    ],
)
def test_flash_mla_options(key: str, value: object) -> None:
    refused("flash_mla_with_kvcache", {**good_flash_decode(), key: value}, key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_v", 576),
        ("d_v", None),
        ("sm_scale", None),
        ("sm_scale", float("inf")),
        ("sm_scale", "x"),
    ],
)
def test_flash_mla_sparse_fwd_options(key: str, value: object) -> None:
    refused("flash_mla_sparse_fwd", {**good_flash_prefill(), key: value}, key, value)


@pytest.mark.parametrize("heads", [0, 129, 1000])
def test_heads(heads: int) -> None:
    for function, (_, make) in FUNCTIONS.items():
        call = make()
        call["q"] = torch.zeros(*call["q"].shape[:-2], heads, 576, dtype=BF16)
        call["attn_sink"] = torch.zeros(heads)
        refused(function, call, "q", heads, "1..128")


def test_a_cache_of_another_width() -> None:
    call = good_decode()
    call["cache"] = KVCache.empty(2, 4, "bf16_nope")
    refused("decode", call, "q", "d_qk 512")
    call["cache"] = torch.zeros(2, 4, 656, dtype=U8)
    refused("decode", call, "cache", "Tensor")


@SETTINGS
@given(
    pages=st.one_of(st.integers(-3, 2), st.sampled_from([1.5, None, "2", True])),
    page_size=st.one_of(st.integers(-3, 2), st.sampled_from([2.0, None, False])),
    layout=st.sampled_from([*LAYOUTS, "", "fp8", "V32_FP8", None, 656, ("bf16",)]),
    page_stride=st.one_of(st.none(), st.integers(-64, 4096), st.sampled_from([4096.0, "4096"])),
)
def test_kv_cache_empty(pages: Any, page_size: Any, layout: Any, page_stride: Any) -> None:
    right = (
        layout in LAYOUTS
        and type(pages) is int and pages >= 0
        and type(page_size) is int and page_size >= 1
    )  # fmt: skip
    if right and page_stride is not None:
        need = LAYOUTS[layout].page_bytes(page_size)
        right = type(page_stride) is int and page_stride >= need and page_stride % 16 == 0
    if right:
        scale = scale_of(LAYOUTS[layout])
        cache = KVCache.empty(pages, page_size, layout, page_stride=page_stride, tensor_scale=scale)
        assert cache.num_slots == pages * page_size
        return
    with pytest.raises(ValueError, match=r"^(pages|page_size|layout|page_stride) is "):
        KVCache.empty(pages, page_size, layout, page_stride=page_stride)


@SETTINGS
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 4, 512, 576, 656, 1152, 2624]), max_size=5),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([*LAYOUTS, "nope"]),
    page_size=st.sampled_from([None, -1, 0, 1, 2, 4, 2.0]),
)
def test_kv_cache_from_tensor(
    shape: list[int], dtype: torch.dtype, layout: str, page_size: Any
) -> None:
    """Whatever is given: a cache that can be read to its last slot, or ValueError."""
    if torch.Size(shape).numel() > 2**22:
        return
    tensor = torch.zeros(shape).to(dtype)
    scale = scale_of(LAYOUTS[layout]) if layout in LAYOUTS else None
    try:
        cache = KVCache.from_tensor(tensor, layout, page_size, tensor_scale=scale)
    except ValueError as error:
        assert re.match(r"(tensor|layout|page_size) ", str(error))
        return
    if cache.num_slots:
        last = torch.tensor([cache.num_slots - 1])
        assert cache.read(last).shape == (1, cache.layout.d_qk)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 656), 1, *_v32()), "pages is a tensor .* of torch.float32"),
        ((torch.zeros(656, dtype=U8), 1, *_v32()), "pages is a tensor"),
        ((None, 1, *_v32()), "pages is NoneType"),
        ((torch.zeros(656, 2, dtype=U8).T, 1, *_v32()), "pages has strides"),
        ((torch.zeros(2, 655, dtype=U8), 1, *_v32()), "pages has 655 bytes a page.*span 656"),
        ((torch.zeros(2, 656, dtype=U8), 2, *_v32()), "pages has 656 bytes a page.*span 1312"),
        ((torch.zeros(2, 656, dtype=U8), 0, *_v32()), "page_size is 0"),
        ((torch.zeros(2, 656, dtype=U8), 1, _v32()[0], 655), "token_stride is 655"),
        ((torch.zeros(2, 656, dtype=U8), 1, "v32_fp8", 656), "layout is 'v32_fp8', must be a KV"),
        ((torch.zeros(2, 656, dtype=U8), 1, None, 656), "layout is None"),
    ],
)
def test_kv_cache_itself(arguments: tuple[Any, ...], message: str) -> None:
    """The constructor too: a kernel would read past the end of such pages."""
    with pytest.raises(ValueError, match=message):
        KVCache(*arguments)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_a_device_that_is_not_there(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device is {device!r}"):
        KVCache.empty(2, 4, device=device)
    with pytest.raises(ValueError, match=f"device is {device!r}"):
        dispatch.available_backends(device)


def test_a_cache_shows_what_it_is_not_its_bytes() -> None:
    cache = KVCache.empty(2, 4)
    assert repr(cache) == "KVCache(2 pages of 4 tokens, v32_fp8, cpu)"
    assert cache == cache and cache != KVCache.empty(2, 4)


@pytest.mark.parametrize("page_size", ["16", 16.0, True])
def test_page_size_beside_a_shape_that_says_it(page_size: Any) -> None:
    with pytest.raises(ValueError, match=f"page_size is {page_size!r}, must be an integer"):
        KVCache.from_tensor(torch.zeros(2, 16, 656, dtype=U8), "v32_fp8", page_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, None])
def test_read_as_no_float(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"dtype is {dtype}, allowed: torch.float64"):
        KVCache.empty(2, 4).read(torch.tensor([0]), dtype)


def good_append() -> dict[str, Any]:
    return {"latent": torch.zeros(3, 512), "rope": torch.zeros(3, 64), "slots": torch.arange(3)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("latent", None, "latent is None"),
        ("latent", [1.0], "latent is list"),
        ("latent", torch.zeros(3, 511), r"latent has shape \(3, 511\)"),
        ("latent", torch.zeros(2, 512), r"latent has shape \(2, 512\)"),
        ("latent", torch.zeros(3, 512, dtype=torch.int32), "latent has dtype torch.int32"),
        ("latent", torch.zeros(3, 512, device="meta"), "latent is on meta"),
        ("rope", None, "rope is None"),
        ("rope", torch.zeros(3, 65), r"rope has shape \(3, 65\)"),
        ("slots", None, "slots is NoneType"),
        ("slots", [0, 1, 2], "slots is list"),
        ("slots", torch.zeros(3), "slots is a tensor .* of torch.float32"),
        ("slots", torch.arange(4), r"latent has shape \(3, 512\), must be \(4, 512\)"),
        ("slots", torch.arange(3)[:, None], r"slots is a tensor \(3, 1\)"),
        ("slots", torch.tensor([0, 1, -2]), "slots holds -2"),
        ("slots", torch.tensor([0, 1, 24]), "slots holds 24, allowed: -1 .skip. or 0..23"),
        ("slots", torch.tensor([2**31, 0, 1]), f"slots holds {2**31}"),
        ("slots", torch.arange(3, device="meta"), "slots is on meta"),
        ("scale_rounding", "down", "scale_rounding is 'down'"),
        ("scale_rounding", None, "scale_rounding is None"),
    ],
)
@pytest.mark.parametrize("layout", ["v32_fp8", "bf16"])
def test_append(layout: str, key: str, value: object, message: str) -> None:
    cache = KVCache.empty(3, 8, layout)
    before = cache.pages.clone()
    with pytest.raises(ValueError, match=message):
        cache.append(**{**good_append(), key: value})
    assert torch.equal(cache.pages, before), "something was written all the same"


def test_append_rope_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="rope is given, layout bf16_nope stores no RoPE"):
        KVCache.empty(3, 8, "bf16_nope").append(**good_append())


@pytest.mark.parametrize("slot", [-1, -24, 24, 2**31, -(2**31)])
def test_read_outside_the_cache(slot: int) -> None:
    with pytest.raises(ValueError, match=f"slots holds {slot}, allowed: 0..23"):
        KVCache.empty(3, 8).read(torch.tensor([0, slot]))
