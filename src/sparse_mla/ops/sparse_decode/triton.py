"""Launcher of the portable Triton kernels for decode."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from ... import arch
from ...kv_cache import KVCache
from . import triton_kernel, triton_wgmma_kernel
from .config import Launch, launch_for, redo_for, tokens_first_reads
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
    machine = arch.of(q.device)
    launch = launch_for(machine, q.shape[2], [source.cache.layout for source in sources])
    if not num_splits:
        programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], launch.block_h)
        slots = max(1, machine.multiprocessors) * launch.programs_per_sm
        topk = sum(source.indices.shape[-1] for source in sources)
        num_splits = plan_splits(programs * launch.value_blocks, topk, slots, batch_invariant)
    out, lse, _ = launch_attend(q, sources, attn_sink, scale, num_splits, launch, False)
    return out, lse


def plan_splits(programs: int, topk: int, slots: int, batch_invariant: bool) -> int:
    """How many pieces to cut each list into, so that `programs` * splits fill `slots`."""
    if batch_invariant:
        return max(1, math.ceil(topk / INVARIANT_SPLIT))
    return max(1, min(slots // max(1, programs), math.ceil(topk / MIN_SPLIT), MAX_SPLITS))


def launch_attend(
    q: torch.Tensor,
    sources: list[Source],
    attn_sink: torch.Tensor | None,
    scale: float,
    splits: int,
    launch: Launch,
    want_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch `launch`'s kernel on q [b, s_q, h, d_qk] and one or two sources; merge splits.

    Returns:
        out [b, s_q, h, d_v] bf16, lse [b, s_q, h] float32 and, if wanted, max_logits like lse;
        max_logits needs splits == 1.
    """
    b, s_q, heads, _ = q.shape
    main = sources[0]
    d_v = main.cache.layout.d_v
    for source in sources:
        _check_alignment(source.cache)
    out = torch.empty(b, s_q, heads, d_v, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse) if want_max else None
    rows = b * s_q * heads
    if rows == 0:
        return out, lse, max_logits
    blocks = sum(triton.cdiv(source.indices.shape[-1], launch.block_t) for source in sources)
    blocks = max(1, blocks)
    split_blocks = triton.cdiv(blocks, max(1, min(splits, blocks)))
    splits = triton.cdiv(blocks, split_blocks)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, rows, d_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    head_blocks = triton.cdiv(heads, launch.block_h)
    machine = arch.of(q.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        grid = (b * s_q * head_blocks * splits * launch.value_blocks,)
        tokens_first = launch.tokens_first and tokens_first_reads(
            [source.cache.layout for source in sources]
        )
        wild = None
        if tokens_first:
            wild = torch.empty(splits, b * s_q, head_blocks, dtype=torch.int32, device=q.device)
        arguments = (
            q,
            attn_sink,
            part,
            part_lse,
            max_logits,
            wild,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            s_q,
            heads,
            head_blocks,
            splits,
            split_blocks * launch.block_t,
            scale * math.log2(math.e),
            *_source_arguments(main),
        )
        constants = {
            "LAYOUT": main.cache.layout,
            "TOKEN_STRIDE": main.cache.token_stride,
            "PACKED": _packed(main.cache),
            "SPLIT": splits > 1,
            "BLOCK_H": launch.block_h,
            "BLOCK_T": launch.block_t,
            "STAGES": launch.stages,
            "num_warps": launch.num_warps,
        }
        if tokens_first:
            triton_wgmma_kernel.attend_tokens_first[grid](*arguments, **constants)
            # Lists of scales too far apart for fp16 weights, by the kernel of bf16 weights.
            again = redo_for(launch)
            constants |= {
                "BLOCK_T": again.block_t,
                "STAGES": again.stages,
                "num_warps": again.num_warps,
            }
        extra = sources[1].cache if len(sources) > 1 else None
        triton_kernel.attend[grid](
            *arguments,
            *(_source_arguments(sources[1]) if extra else [None] * SOURCE_ARGUMENTS),
            EXTRA_LAYOUT=extra and extra.layout,
            EXTRA_TOKEN_STRIDE=extra and extra.token_stride,
            EXTRA_PACKED=extra and _packed(extra),
            HARDWARE_FP8=machine.capability is not None and machine.capability >= (8, 9),
            VALUE_BLOCKS=launch.value_blocks,
            **constants,
        )
        if splits > 1:
            block_d = 256
            triton_kernel.combine[(rows, d_v // block_d)](
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


SOURCE_ARGUMENTS = 13


def _source_arguments(source: Source) -> list[Any]:
    """What the kernels are told of a source, in the order of their arguments."""
    cache, indices, layout = source.cache, source.indices, source.cache.layout
    page_stride, page_size = cache.pages.stride(0), cache.page_size
    planar = layout.planar
    return [
        cache.pages,
        indices,
        source.lengths,
        cache.tensor_scale,
        indices.stride(0),
        indices.stride(1),
        indices.shape[-1],
        *division(page_size),
        page_stride - page_size * cache.token_stride,
        page_stride - page_size * layout.footer_bytes if planar else None,
        page_size * layout.row_bytes if planar else None,
        min(cache.num_slots - 1, 2**31 - 1),
    ]


def division(divisor: int) -> tuple[int, int]:
    """(magic, shift) so that n // divisor == n * magic >> shift for 0 <= n < 2^31.

    With 2^l >= divisor and magic * divisor = 2^(31 + l) + e the quotient is exact for 0 < e <= 2^l
    (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994). The
    product stays below 2^63. A division at run time is a chain of 20 instructions in front of
    every row's address.
    """
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


def _packed(cache: KVCache) -> bool:
    """Whether rows follow each other from page to page."""
    return cache.pages.stride(0) == cache.page_size * cache.token_stride


def _check_alignment(cache: KVCache) -> None:
    pages = cache.pages
    if pages.data_ptr() % 4 or pages.stride(0) % 4 or cache.token_stride % 4:
        raise ValueError(
            f"the cache starts at address {pages.data_ptr():#x} with page stride "
            f"{pages.stride(0)} and token stride {cache.token_stride}; all must be multiples of 4"
        )
