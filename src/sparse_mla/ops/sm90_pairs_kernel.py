"""What the Hopper kernels share in which two groups of four warps attend a pair of tiles.

`left` has the logits and the softmax of the even tile and the left half of the output's columns,
`right` those of the odd tile and the right half; the first one's docstring is in
sparse_prefill/sm90_kernel.py. Dense decode and decode over expanded V4 caches do the same.
The approximations of exp2 and log2 and the dependent launches serve every Hopper kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from .gluon_compat import async_load, barrier

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
INF = gl.constexpr(float("inf"))

# Heads of an item and tokens of a tile: both products are 64 x 64 per warpgroup instruction.
TILE = gl.constexpr(64)
PAIR = gl.constexpr(128)

# Eight lanes copy 128 contiguous bytes, four rows a warp.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY))
COPY_COLUMNS = gl.constexpr(gl.SliceLayout(0, COPY))
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LOGIT_ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS))
OUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
OUT_ROWS = gl.constexpr(gl.SliceLayout(1, OUT))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUT, 2))
OUT_COLUMNS = gl.constexpr(gl.SliceLayout(0, OUT))
STORE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
STORE_ROWS = gl.constexpr(gl.SliceLayout(1, STORE))
STORE_COLUMNS = gl.constexpr(gl.SliceLayout(0, STORE))


@aggregate
class Shared:
    """Shared memory and barriers. `full` and `free` barriers have one phase per pair, item or
    segment."""

    q_left: gl.shared_memory_descriptor  # [1, 64, 256] bf16
    q_right: gl.shared_memory_descriptor  # [1, 64, 256]
    q_rope: gl.shared_memory_descriptor  # [1, 64, 64]
    k_left: gl.shared_memory_descriptor  # [2, 64, 256], one tile each
    k_right: gl.shared_memory_descriptor  # [2, 64, 256]
    k_rope: gl.shared_memory_descriptor  # [2, 64, 64]
    p0: gl.shared_memory_descriptor  # [1, 64, 64]; the rope columns of K0, dead by then
    p1: gl.shared_memory_descriptor  # [1, 64, 64]
    bias: gl.shared_memory_descriptor  # [2, 64] float32, 0 or -inf per token
    base: gl.shared_memory_descriptor  # [2, 64] float32, running maximum after either tile
    sums: gl.shared_memory_descriptor  # [4, 64] float32: exact and rounded sums of both consumers
    left_full: gl.shared_memory_descriptor  # [2, 1] k_left is there
    right_full: gl.shared_memory_descriptor  # [2, 1] k_right, k_rope and bias are there
    left_free: gl.shared_memory_descriptor  # [2, 1]
    right_free: gl.shared_memory_descriptor  # [2, 1]
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    p_full: gl.shared_memory_descriptor  # [2, 1] P and base of either tile are there
    sums_full: gl.shared_memory_descriptor  # [2, 1] of either consumer

    @gluon.constexpr_function
    def __init__(self, *fields):
        (
            self.q_left,
            self.q_right,
            self.q_rope,
            self.k_left,
            self.k_right,
            self.k_rope,
            self.p0,
            self.p1,
            self.bias,
            self.base,
            self.sums,
            self.left_full,
            self.right_full,
            self.left_free,
            self.right_free,
            self.q_full,
            self.q_free,
            self.p_full,
            self.sums_full,
        ) = fields


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def wait_for_primary():
    """Wait until the kernel before, of which this one is a dependent launch, has ended."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def launch_dependents():
    """Let a dependent launch begin once every program has come here or ended; it waits by itself
    for what this kernel writes."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def opaque_zero(j):
    """0, which no compiler can know. As a buffer's index it keeps about 70 wgmma descriptors from
    being hoisted out of the loop and spilled (1184 bytes without it)."""
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 24;", "=r,r", [j], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def round_weights(p):
    """P as bf16 and the sum of the rounded weights per row, float32."""
    weights, rounded = gl.inline_asm_elementwise(
        """{
        cvt.rn.bf16x2.f32 $0, $4, $3;
        shl.b32 $1, $0, 16;
        and.b32 $2, $0, 0xffff0000;
        }""",
        "=&r,=&r,=r,r,r",
        [p],
        dtype=(gl.bfloat16, gl.float32),
        is_pure=True,
        pack=2,
    )
    return weights, rounded


@gluon.jit
def finite(base):
    """0 while nothing was valid: subtracting it keeps exp2 at 0 where -inf would give NaN."""
    return gl.where(base == -INF, 0.0, base)


@gluon.jit
def sink_factor(lse, sink):
    """exp(lse) / (exp(lse) + exp(sink)), natural; 1 for sink -inf, 0 for +inf or an empty row."""
    factor = 1.0 / (1.0 + exp2((sink - lse) * LOG2E))
    factor = gl.where(sink == -INF, 1.0, factor)
    return gl.where(lse == -INF, 0.0, factor)


@gluon.jit
def copy_rows(dst, ptr, offsets, mask, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of rows at ptr + offsets (elements); zeros where masked."""
    columns = gl.arange(0, WIDTH, layout=COPY_COLUMNS)
    offsets = gl.max_contiguous(
        gl.multiple_of(offsets[:, None] + (columns[None, :] + FIRST), [1, 8]), [1, 8]
    )
    async_load(dst, ptr + offsets, mask=mask[:, None])


@gluon.jit
def both_sums(shared, exact, rounded, item_phase, HALF: gl.constexpr, ROUNDED_SUMS: gl.constexpr):
    """A consumer's sums of P and of P as it was rounded, over both consumers' tiles."""
    shared.sums.index(2 * HALF).store(exact)
    if ROUNDED_SUMS:
        shared.sums.index(2 * HALF + 1).store(rounded)
    barrier()
    mbarrier.arrive(shared.sums_full.index(HALF), count=1)
    mbarrier.wait(shared.sums_full.index(1 - HALF), item_phase)
    exact = exact + shared.sums.index(2 - 2 * HALF).load(LOGIT_ROWS)
    if ROUNDED_SUMS:
        rounded = rounded + shared.sums.index(3 - 2 * HALF).load(LOGIT_ROWS)
    else:
        rounded = exact
    return exact, rounded
