"""Which backend runs, and why the others do not, on machines that are not here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import sparse_mla
from drawn import decode_call, prefill_call
from sparse_mla import arch, dispatch
from sparse_mla.arch import Arch
from sparse_mla.dispatch import Request
from sparse_mla.kv_layout import LAYOUTS, KVLayout, get_layout
from sparse_mla.ops.sparse_decode.config import launch_for

# The Hopper kernels run with Triton 3.6, the portable ones with anything newer too.
H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, "3.6.0", False)
MACHINES = {
    "sm_80": replace(H200, name="A100", capability=(8, 0), multiprocessors=108),
    "sm_86": replace(H200, name="A10", capability=(8, 6), multiprocessors=72),
    "sm_89": replace(H200, name="L4", capability=(8, 9)),
    "sm_90": H200,
    "sm_100": replace(H200, name="B200", capability=(10, 0)),
    "sm_120": replace(H200, name="RTX 5090", capability=(12, 0)),
}
CPU = Arch("cpu", "CPU", None, 0, "3.9.0", False)
REQUEST = Request(op="decode", layout="v32_fp8", heads=64)


def chosen(request: Request, machine: Arch) -> list[str]:
    return [a.backend for a in dispatch.explain(request, machine) if a.chosen]


# The ops with a kernel of their own for Hopper.
ATTENTION = ("decode", "prefill", "dense_decode")


def answer(backend: str, request: Request, machine: Arch) -> tuple[bool, str]:
    return next(
        (a.ok, a.reason) for a in dispatch.explain(request, machine) if a.backend == backend
    )


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("layout", ["v32_fp8", "bf16", "bf16_nope"])
@pytest.mark.parametrize("name", MACHINES)
def test_every_claimed_gpu_has_a_kernel(name: str, layout: str, op: str) -> None:
    if op == "dense_decode" and layout == "v32_fp8":
        layout = "bf16"
    request = replace(REQUEST, op=op, layout=layout)
    best = "sm90" if name == "sm_90" and op in ATTENTION else "triton"
    assert chosen(request, MACHINES[name]) == [best]
    assert answer("triton", request, MACHINES[name])[0]
    ok, reason = answer("cpu", request, MACHINES[name])
    assert not ok and "cuda" in reason


@pytest.mark.parametrize("op", dispatch.OPS)
def test_cpu(op: str) -> None:
    request = replace(REQUEST, op=op, layout="bf16")
    assert chosen(request, CPU) == ["cpu"]
    ok, reason = answer("triton", request, CPU)
    assert not ok and "needs a GPU" in reason
    # The interpreter is there to be asked for, never to be chosen.
    assert answer("triton", request, replace(CPU, interpret=True))[0]
    assert chosen(request, replace(CPU, interpret=True)) == ["cpu"]


@pytest.mark.parametrize(
    ("request_", "machine", "reason"),
    [
        (REQUEST, replace(H200, triton="3.9.0"), "triton is 3.9.0"),
        (replace(REQUEST, alignment=4), H200, "aligned to 4 bytes"),
        (replace(REQUEST, layout="v41_fp8_planar"), H200, "no kernel for layout v41_fp8_planar"),
        (REQUEST, MACHINES["sm_100"], "Hopper"),
        (REQUEST, replace(H200, hip=True), "Hopper"),
        (REQUEST, replace(H200, triton=None), "triton is not installed"),
        (REQUEST, CPU, "Hopper"),
    ],
)
@pytest.mark.parametrize("op", ATTENTION)
def test_reasons_of_sm90(op: str, request_: Request, machine: Arch, reason: str) -> None:
    asked = replace(request_, op=op)
    ok, said = answer("sm90", asked, machine)
    assert not ok and reason in said
    assert "sm90" not in chosen(asked, machine)
    with pytest.raises(NotImplementedError, match=re.escape(said)):
        dispatch.choose(asked, machine, "sm90")


def test_extra_caches_on_sm90() -> None:
    v4 = replace(REQUEST, layout="v4_fp8")
    assert chosen(v4, H200) == ["sm90"]
    assert chosen(replace(v4, extra_layout="v4_fp8"), H200) == ["sm90"]
    for layout, extra in (("v4_fp8", "v32_fp8"), ("v32_fp8", "v32_fp8"), ("bf16", "v4_fp8")):
        ok, said = answer("sm90", replace(REQUEST, layout=layout, extra_layout=extra), H200)
        assert not ok and layout in said and extra in said


@pytest.mark.parametrize(
    ("offset", "page_stride", "want"),
    [(0, 1968, 16), (8, 1968, 8), (4, 1968, 4), (0, 1972, 4), (2, 1976, 2), (0, 2001, 1)],
)
def test_alignment_of_a_cache(offset: int, page_stride: int, want: int) -> None:
    storage = torch.zeros(64 + 10 * page_stride, dtype=torch.uint8)
    start = -storage.data_ptr() % 16 + offset
    pages = storage.as_strided((10, 3 * 656), (page_stride, 1), start)
    assert sparse_mla.KVCache(pages, 3, get_layout("v32_fp8"), 656).alignment == want


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (replace(H200, triton=None), "triton is not installed"),
        (replace(H200, triton="3.5.1"), "triton is 3.5.1, needs 3.6"),
        (replace(H200, triton="2.3"), "triton is 2.3, needs 3.6"),
        (replace(H200, hip=True, name="AMD MI300X"), "NVIDIA"),
        (replace(H200, capability=(7, 5), name="T4"), "(7, 5), needs 8.0"),
        (replace(H200, capability=None), "None, needs 8.0"),
    ],
)
def test_reasons(machine: Arch, reason: str) -> None:
    ok, said = answer("triton", REQUEST, machine)
    assert not ok and reason in said
    assert chosen(REQUEST, machine) == []
    with pytest.raises(NotImplementedError) as caught:
        dispatch.choose(REQUEST, machine)
    assert said in str(caught.value) and machine.name in str(caught.value)
    with pytest.raises(NotImplementedError) as caught:
        dispatch.choose(REQUEST, machine, "triton")
    assert said in str(caught.value)


def test_the_cache_writer_falls_back_to_torch() -> None:
    request = replace(REQUEST, op="kv_write", alignment=2)
    ok, said = answer("triton", request, H200)
    assert not ok and said == "the cache is aligned to 2 bytes, needs 4"
    for machine in (H200, replace(H200, hip=True), replace(H200, triton=None)):
        assert chosen(request, machine) == ["torch"]


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0", "3.10.0", "4.0", "3.7.1+git1a2b3c"])
def test_new_enough_triton(version: str) -> None:
    assert answer("triton", REQUEST, replace(H200, triton=version))[0]


@pytest.mark.parametrize("machine", [H200, CPU])
def test_a_layout_without_a_kernel(machine: Arch) -> None:
    for backend in ("cpu", "sm90", "triton"):
        ok, reason = answer(backend, replace(REQUEST, layout="v5_fp8"), machine)
        assert not ok and reason
    assert answer("cpu", replace(REQUEST, layout="v5_fp8"), CPU)[1] == "has no code for v5_fp8"
    beside = replace(REQUEST, extra_layout="v5_fp8")
    assert answer("cpu", beside, CPU) == (False, "has no code for v5_fp8")


def test_a_layout_of_extra_caches_only_stands_beside_another() -> None:
    for name, layout in LAYOUTS.items():
        for op in ("decode", "prefill", "dense_decode"):
            request = replace(REQUEST, op=op, layout=name)
            assert answer("cpu", request, CPU)[0] != layout.extra_only
        main = "v32_fp8" if layout.d_qk == 576 else "v4_fp8"
        assert answer("cpu", replace(REQUEST, layout=main, extra_layout=name), CPU)[0]


def test_caches_side_by_side_are_equally_wide() -> None:
    """As the interface demands it; `explain` must not promise more."""
    for layout, extra in (("v4_fp8", "v32_fp8"), ("bf16", "bf16_nope")):
        request = replace(REQUEST, layout=layout, extra_layout=extra)
        for backend, machine in (("cpu", CPU), ("triton", H200), ("sm90", H200)):
            assert not answer(backend, request, machine)[0]
        assert "d_qk" in answer("cpu", request, CPU)[1]


def test_launches_by_machine_and_rows() -> None:
    v32, v4, nvfp4, bf16 = (
        LAYOUTS[name] for name in ("v32_fp8", "v4_fp8", "nvfp4_bf16_rope", "bf16")
    )
    ampere, small = MACHINES["sm_80"], MACHINES["sm_86"]
    assert launch_for(H200, 64, [v32]).tokens_first
    assert not launch_for(H200, 64, [v32, bf16]).tokens_first
    assert launch_for(H200, 64, [v4, v4]) == launch_for(H200, 128, [nvfp4])
    assert launch_for(H200, 64, [v4, v4]).block_h == 64
    # Two programs over the output take tiles in two orders, and v4's last tile is of two kinds.
    assert launch_for(ampere, 64, [v32]).value_blocks == 2
    assert launch_for(ampere, 64, [nvfp4, v32]).value_blocks == 2
    assert launch_for(ampere, 64, [v4, v32]).value_blocks == 1
    assert launch_for(small, 64, [v32]).value_blocks == 1
    for machine in MACHINES.values():
        for heads in (1, 16, 17, 33, 64, 128):
            for rows in ([v32], [v4], [v4, v4], [bf16, nvfp4]):
                assert launch_for(machine, heads, rows).block_h <= max(16, 2 * heads)


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 53, 61, 64, 255, 257, 4096, 2**30, 2**31 - 1])
def test_pages_by_multiplication(page_size: int) -> None:
    pytest.importorskip("triton")
    from sparse_mla.ops.sparse_decode.triton import division

    magic, shift = division(page_size)
    edges = [n * page_size + d for n in (0, 1, 2, (2**31 - 1) // page_size) for d in (-1, 0, 1)]
    slots = [*edges, 2**31 - 1, 2**31 - 2, *range(0, 2**31, 2**31 // 997)]
    for slot in slots:
        if 0 <= slot < 2**31:
            assert slot * magic >> shift == slot // page_size
            assert slot * magic < 2**63


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_triton_reads_every_layout(layout: KVLayout) -> None:
    """Alone, and every one as wide beside it; the extra cache's own layouts only there."""
    alone = replace(REQUEST, layout=layout.name)
    beside_it = [name for name, other in LAYOUTS.items() if other.d_qk == layout.d_qk]
    for asked in (alone, *(replace(alone, extra_layout=name) for name in beside_it)):
        ok, reason = answer("triton", asked, H200)
        assert ok != layout.extra_only and reason
    beside = replace(alone, extra_layout="v5_fp8")
    assert answer("triton", beside, H200) == (False, "has no code for v5_fp8")


def test_a_backend_asked_for_by_name_runs_or_raises() -> None:
    assert dispatch.choose(REQUEST, H200, "triton").name == "triton"
    with pytest.raises(NotImplementedError, match="cpu: tensors are on cuda"):
        dispatch.choose(REQUEST, H200, "cpu")
    if arch.of("cpu").triton is None or arch.of("cpu").interpret:
        pytest.skip("needs triton, not interpreting")
    call = decode_call(heads=2)
    with pytest.raises(NotImplementedError, match="triton: needs a GPU"):
        sparse_mla.decode(call.q, call.cache, call.indices, backend="triton")
    flat = prefill_call(heads=2)
    with pytest.raises(NotImplementedError, match="triton: needs a GPU"):
        sparse_mla.prefill(flat.q, flat.cache, flat.indices, backend="triton")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="backend is 'sm90x', decode has: cpu, sm90, triton"):
        dispatch.choose(REQUEST, H200, "sm90x")
    with pytest.raises(ValueError, match="op is 'dense', allowed: decode, prefill, dense_decode"):
        dispatch.explain(replace(REQUEST, op="dense"), H200)
    with pytest.raises(ValueError, match="device is xpu, allowed: cpu, cuda"):
        arch.of("xpu")


def test_every_backend_that_can_be_loaded_loads() -> None:
    for op in dispatch.OPS:
        for backend in dispatch.backends_of(op):
            if backend.name == "triton":
                pytest.importorskip("triton")
            assert callable(backend.load())


def test_this_machine() -> None:
    machine = arch.of("cpu")
    assert machine.device == "cpu" and machine.shared_memory == 0
    assert arch.default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "cpu" in dispatch.available_backends("cpu")


def test_shared_memory_of_unknown_gpus_is_the_least() -> None:
    assert replace(H200, capability=(13, 0)).shared_memory == 99 * 1024
    assert H200.shared_memory == 227 * 1024
