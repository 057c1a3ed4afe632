"""Launcher of the Hopper kernels for bf16 caches, for prefill and for decode.

Up to 32 heads the gather sets the time (sm90_few_heads_kernel), above that the tensor cores
(sm90_kernel, 64 heads per CTA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ... import arch
from ...kv_cache import KVCache
from ..sparse_decode import sm90_expand, sm90_fp8, triton_kernel
from ..sparse_decode.backends import SM90_EXPANDED
from ..sparse_decode.source import Source
from . import sm90_few_heads_kernel, sm90_kernel

# Bytes that a lane copies at once.
ALIGNMENT = 16
# The fewest tokens that are worth a split of their own.
MIN_SPLIT = 128
# With batch_invariant=True every list is cut into pieces of this many tokens.
INVARIANT_SPLIT = 512
MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """How `sm90_kernel.attend` is launched.

    Attributes:
        rounded_sums: divide by the sum of the rounded weights instead of the exact sum.
        right_registers, loader_registers: per thread of the worker warps; the default ones get
            what is left of 504.
    """

    rounded_sums: bool
    right_registers: int
    loader_registers: int


@dataclass(frozen=True)
class FewHeadsLaunch:
    """How `sm90_few_heads_kernel.attend_few` is launched.

    Attributes:
        heads: heads of the instructions, the query's or more.
        loader_registers: per thread of the loader; the consumer gets what is left of 256.
    """

    heads: int
    loader_registers: int


# Prefill is nearly as accurate either way on ordinary data (1.06 and 1.055 times ideal rounding),
# and the rounded sums cost 6 % where the tensor cores and their power set the time: 1911 us against
# 2045 at s_q=4096, h=64, topk 2048, s_kv 32768; 3742 against 3971 at h=128, s_kv 8192.
HEADS_64_PREFILL = Launch(False, 224, 56)
HEADS_64_DECODE = Launch(True, 224, 56)
# s_q=4096, topk 2048, s_kv 32768: h=8 1399 us, h=16 1395, h=32 1610. The kernel for 64 heads takes
# about 1800 for any of them (1838 at h=16, 1878 at h=32 before its last change).
HEADS_16 = FewHeadsLaunch(16, 40)
HEADS_32 = FewHeadsLaunch(32, 24)


def launch_for(heads: int, prefill: bool) -> Launch | FewHeadsLaunch:
    """The launch for a number of heads."""
    if heads <= 16:
        return HEADS_16
    if heads <= 32:
        return HEADS_32
    return HEADS_64_PREFILL if prefill else HEADS_64_DECODE


def run(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill; see interface.prefill. Quantised caches go to decode's kernels."""
    # One "sequence" per query token, so that lengths are per token.
    sequences = q.unsqueeze(1), cache, indices.unsqueeze(1), topk_length, attn_sink, scale
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        if cache.layout.name in SM90_EXPANDED:
            source = Source(cache, indices.unsqueeze(1), topk_length)
            out, lse, max_logits = sm90_expand.attend(
                q.unsqueeze(1), [source], attn_sink, scale, 1, batch_invariant=False, want_max=True
            )
        elif cache.layout.quantised:
            out, lse, max_logits = sm90_fp8.attend(
                *sequences, num_splits=1, batch_invariant=False, want_max=True
            )
        else:
            launch = launch_for(q.shape[1], prefill=True)
            out, lse, max_logits = attend(*sequences, want_max=True, splits=1, launch=launch)
    if max_logits is None:
        raise RuntimeError("the launcher returned no max_logits")
    return out.squeeze(1), max_logits.squeeze(1), lse.squeeze(1)


def run_decode(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode; see sparse_decode's interface.decode. num_splits 0 chooses by shape."""
    heads = q.shape[2]
    launch = launch_for(heads, prefill=False)
    if not num_splits:
        few = isinstance(launch, FewHeadsLaunch)
        slots = arch.of(q.device).multiprocessors * (2 if few else 1)
        programs = q.shape[0] * q.shape[1] * (1 if few else triton.cdiv(heads, 64))
        num_splits = plan_splits(programs, indices.shape[-1], slots, batch_invariant)
    out, lse, _ = attend(
        q,
        cache,
        indices,
        topk_length,
        attn_sink,
        scale,
        want_max=False,
        splits=num_splits,
        launch=launch,
    )
    return out, lse


def plan_splits(programs: int, topk: int, slots: int, batch_invariant: bool) -> int:
    """How many pieces to cut each list into, so that `programs` * splits fill `slots`."""
    if batch_invariant:
        return max(1, math.ceil(topk / INVARIANT_SPLIT))
    return max(1, min(slots // max(1, programs), math.ceil(topk / MIN_SPLIT), MAX_SPLITS))


def attend(
    q: torch.Tensor,
    cache: KVCache,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    want_max: bool,
    splits: int,
    launch: Launch | FewHeadsLaunch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of q [b, s_q, h, d_qk] over its lists, indices [b, s_q, topk]; lengths [b].

    Returns:
        out [b, s_q, h, 512] bf16, lse [b, s_q, h] float32 and, if wanted, max_logits like lse;
        max_logits needs splits == 1.
    """
    if cache.alignment < ALIGNMENT:
        raise ValueError(
            f"the cache is aligned to {cache.alignment} bytes, the kernels need {ALIGNMENT}"
        )
    if want_max and splits > 1:
        raise ValueError(f"splits is {splits}, max_logits needs 1")
    b, s_q, heads, _ = q.shape
    topk = indices.shape[-1]
    layout = cache.layout
    out = torch.empty(b, s_q, heads, layout.d_v, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse) if want_max else None
    rows = b * s_q * heads
    if rows == 0:
        return out, lse, max_logits
    if q.data_ptr() % ALIGNMENT or any(stride % 8 for stride in q.stride()[:-1]):
        q = q.contiguous()
    few = isinstance(launch, FewHeadsLaunch)
    step = 64 if few else 128
    steps = max(1, triton.cdiv(topk, step))
    split_steps = triton.cdiv(steps, max(1, min(splits, steps)))
    splits = triton.cdiv(steps, split_steps)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, rows, layout.d_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    arguments = (
        q,
        triton.reinterpret(cache.pages, tl.bfloat16),
        indices,
        lengths,
        attn_sink if splits == 1 else None,
        part,
        part_lse,
        max_logits,
        q.stride(0) // 8,
        q.stride(1) // 8,
        q.stride(2) // 8,
        indices.stride(0),
        indices.stride(1),
        cache.pages.stride(0) // ALIGNMENT,
        cache.page_size,
        min(cache.num_slots - 1, 2**31 - 1),
        b * s_q,
        s_q,
        heads,
        topk,
        splits,
        split_steps * step,
        scale * math.log2(math.e),
    )
    constants = {
        "D_ROPE": layout.rope.count if layout.rope else 0,
        "TOKEN_STRIDE": cache.token_stride // ALIGNMENT,
        "PACKED": cache.pages.stride(0) == cache.page_size * cache.token_stride,
        "SPLIT": splits > 1,
        "LOADER_REGISTERS": launch.loader_registers,
        "num_warps": 4,
    }
    sms = arch.of(q.device).multiprocessors
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        if isinstance(launch, FewHeadsLaunch):
            # 128 registers a thread leave room for two CTAs per SM.
            sm90_few_heads_kernel.attend_few[(min(b * s_q * splits, 2 * sms),)](
                *arguments, HEADS=launch.heads, maxnreg=128, **constants
            )
        else:
            items = b * s_q * splits * triton.cdiv(heads, 64)
            sm90_kernel.attend[(min(items, sms),)](
                *arguments,
                ROUNDED_SUMS=launch.rounded_sums,
                RIGHT_REGISTERS=launch.right_registers,
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
