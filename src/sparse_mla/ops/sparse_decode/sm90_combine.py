"""Merging the splits of Hopper's decode kernels.

The portable `triton_kernel.combine` weights a split by its exponential sum. Here the launch may
begin before the attending kernel has ended (programmatic dependent launch): only what does not
depend on it comes before the wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .triton_kernel import sink_factor
from .triton_rows_kernel import to_bf16

D_V = 512


@triton.jit(do_not_specialize=["rows", "heads", "splits"])
def _combine(
    parts_ptr,  # [splits, rows, 512] float32
    parts_lse_ptr,  # [splits, rows] float32, log2
    sink_ptr,  # [heads] float32, or None
    out_ptr,  # [rows, 512] bf16
    lse_ptr,  # [rows] float32, natural
    rows,  # b * s_q * heads
    heads,
    splits,
    MAX_SPLITS: tl.constexpr,  # a power of two >= splits
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, MAX_SPLITS).to(tl.int64)
    ok = split < splits
    parts = parts_ptr + (split * rows + row)[:, None] * 512 + dims[None, :]
    gdc_wait()
    lse = tl.load(parts_lse_ptr + split * rows + row, mask=ok, other=float("-inf"))
    part = tl.load(parts, mask=ok[:, None], other=0.0)
    peak = tl.max(lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - base)
    total = tl.sum(weight, 0)
    merged = (base + tl.log2(total)) * 0.6931471805599453
    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    if sink_ptr is not None:
        factor = factor * sink_factor(merged, tl.load(sink_ptr + row % heads))
    # A split with nothing valid has weight 0 and zeros as its part.
    out = tl.sum(part * (weight * factor)[:, None], 0)
    tl.store(out_ptr + row * 512 + dims, to_bf16(out))
    tl.store(lse_ptr + row, merged, mask=tl.program_id(1) == 0)


def combine(
    parts: torch.Tensor,
    parts_lse: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge partial results into out [.., heads, 512] bf16 and lse [.., heads], in place.

    Args:
        parts: [splits, rows, 512] float32, each row normalised; rows = out's rows.
        parts_lse: [splits, rows] float32, log2.
        attn_sink: [heads] float32.
    """
    splits, rows = parts_lse.shape
    block_d = 256
    _combine[(rows, D_V // block_d)](
        parts,
        parts_lse,
        attn_sink,
        out,
        lse,
        rows,
        out.shape[-2],
        splits,
        MAX_SPLITS=triton.next_power_of_2(splits),
        BLOCK_D=block_d,
        num_warps=4 if splits > 8 else 1,
        launch_pdl=True,
    )
