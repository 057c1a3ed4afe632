"""What the two Hopper kernels for 64 heads over FP8 caches share: layouts and row-wise steps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..sm90_pairs_kernel import INF, LOG2E, exp2

# A peak (log2 domain) that no logit is below; finite, so that differences of two are 0.
LOWEST = gl.constexpr(-3.0e38)

# Accumulators: S [64, 64] and one group of the output [64, 128].
S_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
O_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
P_OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=O_MMA, k_width=2))
S_ROW = gl.constexpr(gl.SliceLayout(1, S_MMA))
S_COLUMN = gl.constexpr(gl.SliceLayout(0, S_MMA))
O_ROW = gl.constexpr(gl.SliceLayout(1, O_MMA))

# One sum for each row and lane of S, [64, 4].
SUMS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
SUMS_ROW = gl.constexpr(gl.SliceLayout(1, SUMS))

# Rows of 256 elements, 16 bytes a lane, one row a warp.
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
WIDE_F32 = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def thread_sums(x):
    """Sums over the columns that a thread holds, [64, 4] of a [64, n] tensor like S."""
    parts = x.reshape([64, x.shape[1] // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(parts, 3), 1), SUMS, assert_trivial=True)


@gluon.jit
def query_power(top):
    """2^(8 - floor(log2(top))), which brings a row's largest |q| to [2^8, 2^9); [64] float32."""
    bits = (top.to(gl.int32, bitcast=True) >> 23) & 0xFF
    power = gl.minimum(gl.maximum(262 - bits, 1), 254)
    return (power << 23).to(gl.float32, bitcast=True)


@gluon.jit
def sink_share(sink, lse_log2, total):
    """exp(lse) / (exp(lse) + exp(sink)); 0 for sink +inf, 1 for -inf or where `total` is 0."""
    sink = sink * LOG2E
    share = 1.0 / (1.0 + exp2(sink - lse_log2))
    return gl.where((sink == -INF) | (total == 0.0), 1.0, share)
