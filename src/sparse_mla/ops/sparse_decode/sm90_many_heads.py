"""Launcher of the Hopper kernels for many heads over v32_fp8 caches: 17 to 128, in blocks of 64.

sm90_bounded_scales_kernel attends every list; where it meets scales out of its bounds it says so,
and sm90_many_heads_kernel, which is slower and takes any scales, redoes that program's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from ... import arch
from ...kv_cache import KVCache
from .sm90_bounded_scales_kernel import attend_bounded
from .sm90_combine import combine
from .sm90_many_heads_kernel import attend as attend_any

HEADS = 64  # heads per program
TILE = 64  # tokens per step
# With batch_invariant=True every list is cut into pieces of this many tokens.
INVARIANT_SPLIT = 512
MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        right_registers, fill_registers: per thread of these warpgroups; the first one gets what is
            left of 3 * 168 (three warpgroups) or 4 * 128 (four).
    """

    right_registers: int
    fill_registers: int


# H200, topk 2048, in us without the other launch (2 to 4 more), FlashMLA in the same run in
# brackets: b=128 h=64 117 (120), b=32 h=64 55 (52), b=64 h=128 113 (100), b=128 h=128 s_q=2 407
# (370), b=4 h=128 s_q=2 38 (30). ptxas serialises the products (C7512) if a consumer holds more.
BOUNDED = Launch(right_registers=208, fill_registers=48)
# H200, topk 2048, in us, FlashMLA in the same run in brackets: b=128 h=64 153 (120), b=32 h=64 69
# (52), b=64 h=128 146 (99), b=128 h=128 s_q=2 527 (370), b=1 h=64 29 (21). These registers leave a
# spilled load in a loop.
ANY = Launch(right_registers=192, fill_registers=64)
# Tiles between the L2 prefetch of rows and their gather: it hardly matters (none at all: 3 % faster
# in an earlier version), as the gather is not what holds that kernel.
AHEAD = 3


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of q [b, s_q, h, 576] bf16 over indices [b, s_q, topk]; see interface.decode.

    Args:
        num_splits: pieces that each list is cut into; 0 chooses by shape.
        want_max: also return max_logits; the lists are then not split.

    Returns:
        out [b, s_q, h, 512] bf16, lse [b, s_q, h] float32 and, if wanted, max_logits like lse,
        natural.
    """
    b, s_q, heads, _ = q.shape
    topk = indices.shape[-1]
    _check_alignment(cache)
    pages = cache.pages
    out = torch.empty(b, s_q, heads, 512, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse) if want_max else None
    rows = b * s_q * heads
    if rows == 0:
        return out, lse, max_logits
    head_blocks = triton.cdiv(heads, HEADS)
    tiles = max(1, triton.cdiv(topk, TILE))
    if want_max:
        num_splits = 1
    elif not num_splits:
        slots = max(1, arch.of(q.device).multiprocessors)
        num_splits = plan_splits(b * s_q * head_blocks, tiles, slots, batch_invariant)
    split_tiles = triton.cdiv(tiles, min(num_splits, tiles))
    splits = triton.cdiv(tiles, split_tiles)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, rows, 512, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    programs = b * s_q * head_blocks * splits
    wild = torch.empty(programs, 2, dtype=torch.int32, device=q.device)
    if q.data_ptr() % 16 or any(stride % 8 for stride in q.stride()[:-1]):
        q = q.contiguous()
    before = (
        q,
        pages[:, : pages.shape[1] // 4 * 4].view(torch.int32),
        indices,
        lengths,
        attn_sink if splits == 1 else None,
        part,
        part_lse,
        max_logits,
        wild,
    )
    after = (
        indices.stride(0),
        indices.stride(1),
        pages.stride(0) // 4,
        cache.page_size,
        min(cache.num_slots - 1, 2**31 - 1),
        s_q,
        heads,
        head_blocks,
        topk,
        splits,
        split_tiles,
        scale * math.log2(math.e),
    )
    constants = {
        "TOKEN_WORDS": cache.token_stride // 4,
        "PACKED": pages.stride(0) == cache.page_size * cache.token_stride,
        "SPLIT": splits > 1,
        "num_warps": 4,
    }
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        attend_bounded[(programs,)](
            *before,
            *(stride // 8 for stride in q.stride()[:-1]),
            *after,
            RIGHT_REGISTERS=BOUNDED.right_registers,
            FILL_REGISTERS=BOUNDED.fill_registers,
            **constants,
        )
        attend_any[(programs,)](
            *before,
            *q.stride()[:-1],
            *after,
            AHEAD=AHEAD,
            RIGHT_REGISTERS=ANY.right_registers,
            FILL_REGISTERS=ANY.fill_registers,
            launch_pdl=True,
            **constants,
        )
        if splits > 1:
            combine(part, part_lse, attn_sink, out, lse)
    return out, lse, max_logits


def plan_splits(programs: int, tiles: int, slots: int, batch_invariant: bool) -> int:
    """How many pieces to cut lists of `tiles` into, so that `programs` * splits fill `slots`."""
    if batch_invariant:
        return max(1, math.ceil(tiles * TILE / INVARIANT_SPLIT))
    return max(1, min(slots // programs, tiles, MAX_SPLITS))


def _check_alignment(cache: KVCache) -> None:
    pages = cache.pages
    if pages.data_ptr() % 16 or pages.stride(0) % 16 or cache.token_stride % 16:
        raise ValueError(
            f"the cache starts at address {pages.data_ptr():#x} with page stride "
            f"{pages.stride(0)} and token stride {cache.token_stride}; all must be multiples of 16"
        )
