"""The consumers' loop over pairs of tiles in the Hopper kernel for expanded caches, 64 heads.

As in sparse_prefill/sm90_kernel.py two groups of four warps each have the softmax of one tile of a
pair and half of the output's columns. There both copy K as fast as it is freed; here a tile takes
as long to expand as to attend, so that the groups take turns: `right` applies the even tile's
weights before it has its own tile's logits, which frees the even tile early.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_compat import barrier
from ..sparse_prefill.sm90_kernel import (
    INF,
    LOGIT_ROWS,
    LOGITS,
    TILE,
    exp2,
    finite,
    opaque_zero,
    round_weights,
)

# Accumulators: with sixteen warps ptxas has no registers for instructions of 256 columns.
OUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
OUT_ROWS = gl.constexpr(gl.SliceLayout(1, OUT))
OUT_COLUMNS = gl.constexpr(gl.SliceLayout(0, OUT))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def left_logits(shared, TILE_OF_PAIR: gl.constexpr, zero, phase):
    """The product with the left half of a tile, on its way."""
    s = warpgroup_mma_init(gl.zeros([TILE, TILE], gl.float32, layout=LOGITS))
    mbarrier.wait(shared.left_full.index(TILE_OF_PAIR), phase)
    return warpgroup_mma(
        shared.q_left.index(zero),
        shared.k_left.index(TILE_OF_PAIR + zero).permute((1, 0)),
        s,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def logits(shared, s, TILE_OF_PAIR: gl.constexpr, zero, phase, scale_log2):
    """A tile's logits in the log2 domain from `left_logits`, -inf for masked tokens."""
    mbarrier.wait(shared.right_full.index(TILE_OF_PAIR), phase)
    s = warpgroup_mma(
        shared.q_right.index(zero),
        shared.k_right.index(TILE_OF_PAIR + zero).permute((1, 0)),
        s,
        is_async=True,
    )
    # Loaded while the products run: later it would queue behind the other consumer's operands.
    bias = shared.bias.index(TILE_OF_PAIR).load(gl.SliceLayout(0, LOGITS))
    s = warpgroup_mma_wait(0, deps=[s])
    return s * scale_log2 + bias[None, :]


@gluon.jit
def scaled(acc, decay):
    return warpgroup_mma_init(acc * gl.convert_layout(decay, OUT_ROWS)[:, None])


@gluon.jit
def publish(shared, weights, base, HALF: gl.constexpr, zero):
    """Hand a tile's weights and the running maximum to the other consumer."""
    own_p = shared.p0 if HALF == 0 else shared.p1
    shared.base.index(HALF).store(base)
    own_p.index(zero).store(weights)
    fence_async_shared()
    barrier()
    mbarrier.arrive(shared.p_full.index(HALF), count=1)


@gluon.jit
def attend_pairs(
    shared,
    pairs,
    done,
    scale_log2,
    HALF: gl.constexpr,  # 0: left, 1: right
    ROUNDED_SUMS: gl.constexpr,
):
    """A consumer's part of `pairs` pairs of tiles, after `done` pairs of earlier items.

    Returns acc [64, 256], not normalised, the running maximum and the sums over the own tiles of P
    and of P as it was rounded. The last odd tile's values stay the consumer's.
    """
    values = shared.k_left if HALF == 0 else shared.k_right
    values_free = shared.left_free if HALF == 0 else shared.right_free
    base = gl.full([TILE], -INF, gl.float32, layout=LOGIT_ROWS)
    exact = gl.zeros([TILE], gl.float32, layout=LOGIT_ROWS)
    rounded = exact
    acc = gl.zeros([TILE, 256], gl.float32, layout=OUT)
    for j in range(pairs):
        zero = opaque_zero(j)
        phase = (done + j) & 1
        if HALF == 0:
            s = left_logits(shared, 0, zero, phase)
            s = logits(shared, s, 0, zero, phase, scale_log2)
            even_base = gl.maximum(base, gl.max(s, 1))
            p = exp2(s - finite(even_base)[:, None])
            weights, p_rounded = round_weights(p)
            publish(shared, weights, even_base, 0, zero)
            decay = exp2(base - finite(even_base))
            acc = scaled(acc, decay)
            own = gl.convert_layout(weights, WEIGHTS)
            acc = warpgroup_mma(own, values.index(zero), acc, is_async=True)
            exact = exact * decay + gl.sum(p, 1)
            if ROUNDED_SUMS:
                rounded = rounded * decay + gl.sum(p_rounded, 1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(values_free.index(0), count=1)

            mbarrier.wait(shared.p_full.index(1), phase)
            base = shared.base.index(1).load(LOGIT_ROWS)
            decay = exp2(even_base - finite(base))
            exact = exact * decay
            if ROUNDED_SUMS:
                rounded = rounded * decay
            acc = scaled(acc, decay)
            acc = warpgroup_mma(shared.p1.index(zero), values.index(1 + zero), acc, is_async=True)
        else:
            mbarrier.wait(shared.p_full.index(0), phase)
            even_base = shared.base.index(0).load(LOGIT_ROWS)
            decay = exp2(base - finite(even_base))
            acc = scaled(acc, decay)
            acc = warpgroup_mma(shared.p0.index(zero), values.index(zero), acc, is_async=True)
            s = left_logits(shared, 1, zero, phase)
            acc = warpgroup_mma_wait(1, deps=[acc])
            barrier()
            mbarrier.arrive(values_free.index(0), count=1)

            s = logits(shared, s, 1, zero, phase, scale_log2)
            base = gl.maximum(even_base, gl.max(s, 1))
            p = exp2(s - finite(base)[:, None])
            weights, p_rounded = round_weights(p)
            publish(shared, weights, base, 1, zero)
            odd_decay = exp2(even_base - finite(base))
            acc = scaled(acc, odd_decay)
            own = gl.convert_layout(weights, WEIGHTS)
            acc = warpgroup_mma(own, values.index(1 + zero), acc, is_async=True)
            exact = exact * (decay * odd_decay) + gl.sum(p, 1)
            if ROUNDED_SUMS:
                rounded = rounded * (decay * odd_decay) + gl.sum(p_rounded, 1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        # The last pair's tile becomes the staging buffer of the output first.
        mbarrier.arrive(values_free.index(1), count=1, pred=j < pairs - 1)
    return acc, base, exact, rounded
