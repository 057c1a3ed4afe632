"""Launcher of the portable Triton kernel for dense decode."""

from __future__ import annotations

import math

import torch
import triton

from ... import arch
from ...kv_cache import KVCache
from ...kv_layout import get_layout
from ..sparse_decode import triton_kernel as sparse_kernel
from ..sparse_decode.config import Launch, launch_for
from . import triton_kernel

# The fewest tokens that are worth a split of their own.
MIN_SPLIT = 128
# batch_invariant=True: so many pieces of a sequence, of at least so many tokens.
INVARIANT_SPLITS = 8
INVARIANT_TOKENS = 512
MAX_SPLITS = 64
# FP8 rows too are launched as sparse decode launches bf16 rows: heads first.
BF16 = get_layout("bf16")


def run(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense decode; see interface.dense_decode. num_splits 0 chooses by shape."""
    machine = arch.of(q.device)
    launch = launch_for(machine, q.shape[1] * q.shape[2], (BF16,))
    min_split = launch.block_t
    if batch_invariant and not num_splits:
        num_splits, min_split = INVARIANT_SPLITS, INVARIANT_TOKENS
    elif not num_splits:
        blocks = triton.cdiv(q.shape[1] * q.shape[2], launch.block_h) * launch.value_blocks
        slots = max(1, machine.multiprocessors) * launch.programs_per_sm
        reach = block_table.shape[1] * cache.page_size
        num_splits = plan_splits(q.shape[0] * blocks, reach, slots)
        min_split = MIN_SPLIT
    return launch_attend(
        q, cache, block_table, cache_seqlens, scale, causal, num_splits, min_split, launch
    )


def plan_splits(programs: int, tokens: int, slots: int) -> int:
    """How many pieces to cut each sequence into, so that `programs` * splits fill `slots`."""
    return max(1, min(slots // max(1, programs), math.ceil(tokens / MIN_SPLIT), MAX_SPLITS))


def launch_attend(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    splits: int,
    min_split: int,
    launch: Launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on q [b, s_q, h, d_qk] and merge its splits."""
    b, s_q, heads, _ = q.shape
    layout = cache.layout
    out = torch.empty(b, s_q, heads, layout.d_v, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    rows = b * s_q * heads
    if rows == 0:
        return out, lse
    # No sequence has more pieces of min_split tokens.
    splits = min(splits, max(1, triton.cdiv(block_table.shape[1] * cache.page_size, min_split)))
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, rows, layout.d_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    row_blocks = triton.cdiv(s_q * heads, launch.block_h)
    machine = arch.of(q.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        triton_kernel.attend[(b * row_blocks * splits * launch.value_blocks,)](
            q,
            cache.pages,
            block_table,
            cache_seqlens,
            cache.tensor_scale,
            part,
            part_lse,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            block_table.stride(0),
            cache.pages.stride(0),
            cache.page_size,
            cache.num_pages,
            s_q,
            heads,
            row_blocks,
            min(block_table.shape[1] * cache.page_size, 2**31 - 1),
            splits,
            min_split,
            scale * math.log2(math.e),
            QUANTISED=layout.quantised,
            HARDWARE_FP8=machine.capability is not None and machine.capability >= (8, 9),
            D_ROPE=layout.d_qk - 512,
            TOKEN_STRIDE=cache.token_stride,
            CAUSAL=causal and s_q > 1,
            SPLIT=splits > 1,
            BLOCK_H=launch.block_h,
            BLOCK_T=launch.block_t,
            VALUE_BLOCKS=launch.value_blocks,
            STAGES=launch.stages,
            num_warps=launch.num_warps,
        )
        if splits > 1:
            block_d = 256
            sparse_kernel.combine[(rows, layout.d_v // block_d)](
                part,
                part_lse,
                None,
                out,
                lse,
                rows,
                heads,
                splits,
                MAX_SPLITS=triton.next_power_of_2(splits),
                BLOCK_D=block_d,
                num_warps=4 if splits > 8 else 1,
            )
    return out, lse
