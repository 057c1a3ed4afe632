"""Launcher of the Hopper kernel for sparse decode with few heads over v32_fp8 caches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from ... import arch
from ...kv_cache import KVCache
from .sm90_combine import combine
from .sm90_few_heads_kernel import attend as attend_kernel

D_V = 512
BLOCK_H = 16
BLOCK_T = 32
# With batch_invariant=True every list is cut into pieces of this many tokens.
INVARIANT_SPLIT = 512
MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        stages: tiles of 32 tokens in the ring, 21 KB each; an even number.
        consumer_registers, producer_registers: per thread of the worker partitions; the first
            consumer gets what is left of 3 * 168.
    """

    stages: int
    consumer_registers: int
    producer_registers: int


# H200, h=16, topk 2048, an earlier version of the kernel, which took odd numbers too: 78.5 us at
# b=128 and 32.7 at b=32 with 5 stages, 81.2 and 34.9 with 8. 6 is the next even number (committed
# rows of this version: 75.0 and 33.3); others were not timed again. With 224 and 56 registers 16
# bytes spill, none of them in the loops.
LAUNCH = Launch(6, 224, 56)

# The cost of a launch in units of a tile of a program, about 1 us: what a program takes besides its
# tiles, what the merge takes and what it takes more for each split. The same version: b=4 16.8 us
# with 16 splits and 17.4 with 32, b=32 32.7 with 4 and 43 with 8, b=128 78.5 unsplit and 94 with 2.
PROGRAM_COST = 10.0
MERGE_COST = 3.0
SPLIT_COST = 0.2


def plan_splits(programs: int, topk: int, multiprocessors: int, batch_invariant: bool) -> int:
    """How many pieces to cut each list into; one program at a time runs on a multiprocessor."""
    if batch_invariant:
        return max(1, math.ceil(topk / INVARIANT_SPLIT))
    # Each of a program's two consumers takes a tile at a time.
    tiles = max(1, math.ceil(topk / BLOCK_T))

    def cost(splits: int) -> float:
        waves = math.ceil(programs * splits / max(1, multiprocessors))
        merge = MERGE_COST + SPLIT_COST * splits if splits > 1 else 0.0
        return waves * (math.ceil(tiles / splits) + PROGRAM_COST) + merge

    return min(range(1, max(1, min(MAX_SPLITS, tiles // 2)) + 1), key=cost)


def attend(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
    want_max: bool,
    launch: Launch = LAUNCH,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attend q [b, s_q, h, 576] to the slots in indices [b, s_q, topk]; see interface.decode.

    Args:
        num_splits: pieces that each list is cut into; 0 chooses by shape.
        want_max: also return the largest logits (nothing is split then).

    Returns:
        out [b, s_q, h, 512] bf16, lse [b, s_q, h] float32 natural, and max_logits like lse.
    """
    b, s_q, heads, _ = q.shape
    topk = indices.shape[-1]
    out = torch.empty(b, s_q, heads, D_V, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse) if want_max else None
    rows = b * s_q * heads
    if rows == 0:
        return out, lse, max_logits
    head_blocks = triton.cdiv(heads, BLOCK_H)
    programs = b * s_q * head_blocks
    if want_max:
        num_splits = 1
    elif not num_splits:
        multiprocessors = arch.of(q.device).multiprocessors
        num_splits = plan_splits(programs, topk, multiprocessors, batch_invariant)
    blocks = max(1, triton.cdiv(topk, BLOCK_T))
    split_blocks = triton.cdiv(blocks, max(1, min(num_splits, blocks)))
    splits = triton.cdiv(blocks, split_blocks)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, rows, D_V, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    attend_kernel[(programs * splits,)](
        q,
        cache.pages,
        indices,
        lengths,
        None if splits > 1 else attn_sink,
        part,
        part_lse,
        max_logits,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        indices.stride(0),
        indices.stride(1),
        cache.pages.stride(0),
        cache.page_size,
        min(cache.num_slots - 1, 2**31 - 1),
        s_q,
        heads,
        head_blocks,
        topk,
        splits,
        split_blocks * BLOCK_T,
        scale * math.log2(math.e),
        TOKEN_STRIDE=cache.token_stride,
        PACKED=cache.pages.stride(0) == cache.page_size * cache.token_stride,
        SPLIT=splits > 1,
        STAGES=launch.stages,
        CONSUMER_REGISTERS=launch.consumer_registers,
        PRODUCER_REGISTERS=launch.producer_registers,
        num_warps=4,
    )
    if splits > 1:
        combine(part, part_lse, attn_sink, out, lse)
    return out, lse, max_logits
