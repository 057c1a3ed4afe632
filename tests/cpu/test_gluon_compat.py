"""One Gluon source for several versions of triton: what the compatibility names compile to."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import async_copy  # noqa: E402

from sparse_mla.ops import gluon_compat  # noqa: E402
from sparse_mla.ops.gluon_compat import async_load, barrier, reinterpret  # noqa: E402


@gluon.jit
def copy(in_ptr, out_ptr, rows, PART: gl.constexpr):
    """16 rows of 32 words through shared memory; with PART, only the first eight are read back."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    buffer = gl.allocate_shared_memory(gl.int32, [16, 32], plain)
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    at = row[:, None] * 32 + column[None, :]
    async_load(buffer, in_ptr + at, mask=(row < rows)[:, None])
    async_copy.commit_group()
    async_copy.wait_group(0)
    barrier()
    ROWS: gl.constexpr = 8 if PART else 16
    words = reinterpret(buffer, gl.float32, [ROWS, 32], plain)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    gl.store(out_ptr + row[:, None] * 32 + column[None, :], words.load(layout))


def ptx_of(part: bool) -> str:
    types = {"in_ptr": "*i32", "out_ptr": "*fp32", "rows": "i32", "PART": "constexpr"}
    aligned = {(number,): [["tt.divisibility", 16]] for number in (0, 1)}
    source = GluonASTSource(copy, types, constexprs={(3,): part}, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    return str(triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"])


@pytest.mark.parametrize("part", (False, True))
def test_masked_copies_fill_with_zeros_and_buffers_are_read_as_another_type(part: bool) -> None:
    ptx = ptx_of(part)
    # The size of the source is 16 bytes or 0, the rest of the 16 are zeros: never skipped.
    sizes = re.findall(r"cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10, (%r\d+);", ptx)
    assert sizes
    for register in sizes:
        assert re.search(rf"selp\.b32\s+{register}, 16, 0, %p\d+;", ptx)
    assert "bar.sync" in ptx
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 1


def test_names_exist() -> None:
    assert callable(gluon_compat.barrier) and callable(async_load)
