"""Launcher of the portable Triton kernels for decode."""

from __future__ import annotations

import math

import torch
import triton

from ... import arch
from ...kv_cache import KVCache
from . import triton_kernel, triton_wgmma_kernel
from .config import Launch, launch_for
from .source import Source

# The fewest tokens that are worth a split of their own.
MIN_SPLIT = 64
# With batch_invariant=True every list is cut into pieces of this many tokens.
INVARIANT_SPLIT = 512
MAX_SPLITS = 64


def run(
    q: torch.Tensor,
    sources: list[Source],
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode; see interface.decode. num_splits 0 chooses by shape."""
    (source,) = sources
    cache, indices = source.cache, source.indices
    machine = arch.of(q.device)
    launch = launch_for(machine, q.shape[2], cache.layout.quantised)
    tokens = q.shape[0] * q.shape[1]
    if not num_splits:
        programs = tokens * triton.cdiv(q.shape[2], launch.block_h) * launch.value_blocks
        slots = max(1, machine.multiprocessors) * launch.programs_per_sm
        num_splits = plan_splits(programs, indices.shape[-1], slots, batch_invariant)
    out, lse, _ = launch_attend(
        q, cache, indices, source.lengths, attn_sink, scale, num_splits, launch, False
    )
    return out, lse


def plan_splits(programs: int, topk: int, slots: int, batch_invariant: bool) -> int:
    """How many pieces to cut each list into, so that `programs` * splits fill `slots`."""
    if batch_invariant:
        return max(1, math.ceil(topk / INVARIANT_SPLIT))
    return max(1, min(slots // max(1, programs), math.ceil(topk / MIN_SPLIT), MAX_SPLITS))


def launch_attend(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    splits: int,
    launch: Launch,
    want_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch `launch`'s kernel on q [b, s_q, h, d_qk], indices [b, s_q, topk]; merge splits.

    Returns:
        out [b, s_q, h, d_v] bf16, lse [b, s_q, h] float32 and, if wanted, max_logits like lse;
        max_logits needs splits == 1.
    """
    b, s_q, heads, _ = q.shape
    topk = indices.shape[-1]
    layout = cache.layout
    _check_alignment(cache)
    out = torch.empty(b, s_q, heads, layout.d_v, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse) if want_max else None
    rows = b * s_q * heads
    if rows == 0:
        return out, lse, max_logits
    blocks = max(1, triton.cdiv(topk, launch.block_t))
    split_blocks = triton.cdiv(blocks, max(1, min(splits, blocks)))
    splits = triton.cdiv(blocks, split_blocks)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, rows, layout.d_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    head_blocks = triton.cdiv(heads, launch.block_h)
    machine = arch.of(q.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        grid = (b * s_q * head_blocks * splits * launch.value_blocks,)
        arguments = (
            q,
            cache.pages,
            indices,
            lengths,
            attn_sink,
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
            split_blocks * launch.block_t,
            scale * math.log2(math.e),
        )
        constants = {
            "TOKEN_STRIDE": cache.token_stride,
            "PACKED": cache.pages.stride(0) == cache.page_size * cache.token_stride,
            "SPLIT": splits > 1,
            "BLOCK_H": launch.block_h,
            "BLOCK_T": launch.block_t,
            "STAGES": launch.stages,
            "num_warps": launch.num_warps,
        }
        if launch.tokens_first and layout.quantised:
            triton_wgmma_kernel.attend_tokens_first[grid](*arguments, **constants)
        else:
            triton_kernel.attend[grid](
                *arguments,
                QUANTISED=layout.quantised,
                D_ROPE=layout.rope.count if layout.rope else 0,
                HARDWARE_FP8=machine.capability is not None and machine.capability >= (8, 9),
                VALUE_BLOCKS=launch.value_blocks,
                **constants,
            )
        if splits > 1:
            block_d = 256
            triton_kernel.combine[(rows, layout.d_v // block_d)](
                part,
                part_lse,
                attn_sink,
                out,
                lse,
                rows,
                heads,
                splits,
                MAX_SPLITS=triton.next_power_of_2(splits),
                BLOCK_D=block_d,
                num_warps=4 if splits > 8 else 1,
            )
    return out, lse, max_logits


def _check_alignment(cache: KVCache) -> None:
    pages = cache.pages
    if pages.data_ptr() % 4 or pages.stride(0) % 4 or cache.token_stride % 4:
        raise ValueError(
            f"the cache starts at address {pages.data_ptr():#x} with page stride "
            f"{pages.stride(0)} and token stride {cache.token_stride}; all must be multiples of 4"
        )
