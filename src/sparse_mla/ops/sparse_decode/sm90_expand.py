"""Launcher of the Hopper kernel for caches whose values are bf16 numbers once expanded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ... import arch
from . import sm90_expand_kernel, sm90_expand_plan_kernel
from .source import Source

HEADS = 64  # heads per item
PAIR = 128  # tokens per step
# With batch_invariant=True every list is cut into parts of this many pairs.
INVARIANT_PAIRS = 4
MAX_SPLITS = 64
# The plans of sm90_expand_plan_kernel, and what `sorted` is written for at most.
WHOLE, SORTED, BY_SHAPE, BALANCED = 0, 1, 2, 3
ROUNDS = 16
SORTED_SEQUENCES = 512


@dataclass(frozen=True)
class Launch:
    """How `sm90_expand_kernel.attend` is launched.

    Attributes:
        heads: heads of an item.
        rounded_sums: divide by the sum of the rounded weights instead of the exact sum.
        right_registers, fill_registers: per thread of the worker warps, the latter of two groups;
            the default ones get what is left of 512.
        prefetch: ask L2 for a tile's rows one tile ahead.
    """

    heads: int
    rounded_sums: bool
    right_registers: int
    fill_registers: int
    prefetch: bool = True


LAUNCH = Launch(64, True, 208, 48)
LAUNCH_16 = Launch(16, True, 168, 72)


def launch_for(heads: int) -> Launch:
    """The launch for a number of heads."""
    return LAUNCH_16 if heads <= 16 else LAUNCH


@dataclass(frozen=True)
class Plan:
    """Which items are cut, and into how many parts of how many pairs of tiles."""

    whole: int
    splits: int
    split_pairs: int

    def parts(self, items: int) -> int:
        return (items - self.whole) * self.splits


def plan(items: int, pairs: int, programs: int, num_splits: int, batch_invariant: bool) -> Plan:
    """The plan by shape for `items` of `pairs` pairs each.

    Without num_splits and batch_invariant, full rounds of one item a program are left whole and
    the items of the last round are cut so that they fill the programs.
    """
    if batch_invariant or num_splits:
        splits = num_splits or math.ceil(pairs / INVARIANT_PAIRS)
        whole = 0
    else:
        whole = items // programs * programs
        splits = min(programs // max(1, items - whole), MAX_SPLITS)
    size = math.ceil(pairs / max(1, min(splits, pairs)))
    splits = math.ceil(pairs / size)
    return Plan(items if splits == 1 else whole, splits, size)


def attend(
    q: torch.Tensor,
    sources: list[Source],
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    batch_invariant: bool,
    want_max: bool = False,
    launch: Launch | None = None,
    kind: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attention of q [b, s_q, h, 512] bf16 over one or two caches; see interface.decode.

    Args:
        num_splits: parts that each item is cut into; 0 chooses by shape, or by the lengths.
        want_max: also return max_logits; num_splits must be 1 then.
        kind: which plan, see sm90_expand_plan_kernel; None chooses.

    Returns:
        out [b, s_q, h, 512] bf16, lse [b, s_q, h] float32 natural, and max_logits like lse.
    """
    for source in sources:
        if source.cache.alignment < 16:
            raise ValueError(
                f"a cache is aligned to {source.cache.alignment} bytes, the kernel needs 16"
            )
    if want_max and num_splits != 1:
        raise ValueError(f"num_splits is {num_splits}, max_logits needs 1")
    b, s_q, heads, _ = q.shape
    out = torch.empty(b, s_q, heads, 512, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    max_logits = torch.empty_like(lse) if want_max else None
    if out.numel() == 0:
        return out, lse, max_logits
    if q.data_ptr() % 16 or any(stride % 8 for stride in q.stride()[:-1]):
        q = q.contiguous()
    main, extra = sources[0], sources[-1]
    topk = main.indices.shape[-1]
    extra_topk = extra.indices.shape[-1] if len(sources) > 1 else 0
    extra_lengths = extra.lengths if len(sources) > 1 else None
    head_blocks = triton.cdiv(heads, HEADS)
    items = b * s_q * head_blocks
    pairs = max(1, triton.cdiv(triton.cdiv(topk, 64) + triton.cdiv(extra_topk, 64), 2))
    multiprocessors = arch.of(q.device).multiprocessors
    lengths = main.lengths is not None or extra_lengths is not None
    if kind is None:
        kind = BY_SHAPE
        # Lists with lengths, where they fill more than one round.
        if lengths and items > multiprocessors and not (num_splits or batch_invariant):
            rounds = triton.cdiv(items, multiprocessors)
            few = b <= SORTED_SEQUENCES and rounds <= ROUNDS
            # Not where a round would be mostly empty if the lengths are all the same.
            full = 2 * rounds * multiprocessors <= 3 * items
            kind = SORTED if few and full else BALANCED
    launch = launch or launch_for(heads)
    meta = None
    if kind == SORTED:
        programs = min(multiprocessors, items)
        planned = Plan(items, 1, pairs)
        slots = cuts = 0
        meta = torch.empty(programs, ROUNDS, dtype=torch.int32, device=q.device)
    elif kind == BALANCED:
        programs = min(multiprocessors, items * pairs)
        planned = Plan(items, 1, pairs)
        slots = 2 * programs
        cuts = programs
        meta = torch.empty(programs, 4, dtype=torch.int32, device=q.device)
    else:
        planned = plan(items, pairs, multiprocessors, num_splits, batch_invariant)
        slots = planned.parts(items)
        programs = min(multiprocessors, planned.whole + slots)
        cuts = items - planned.whole
        if not cuts:
            kind = WHOLE
    parts = torch.empty(slots, HEADS, 512, dtype=torch.float32, device=q.device)
    parts_lse = torch.empty(slots, HEADS, dtype=torch.float32, device=q.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        sm90_expand_kernel.attend[(programs,)](
            q,
            triton.reinterpret(main.cache.pages, tl.int32),
            main.indices,
            main.lengths,
            triton.reinterpret(extra.cache.pages, tl.int32),
            extra.indices,
            extra_lengths,
            attn_sink,
            out,
            lse,
            max_logits,
            parts,
            parts_lse,
            meta,
            q.stride(0) // 8,
            q.stride(1) // 8,
            q.stride(2) // 8,
            *page_arguments(main),
            *page_arguments(extra),
            s_q,
            heads,
            head_blocks,
            topk,
            extra_topk,
            items,
            planned.whole,
            planned.splits,
            planned.split_pairs,
            scale * math.log2(math.e),
            HEADS=launch.heads,
            PLAN=kind,
            SEQUENCES=max(128, triton.next_power_of_2(b)) if kind == SORTED else 0,
            EXTRA=len(sources) > 1,
            ROUNDED_SUMS=launch.rounded_sums,
            PREFETCH=launch.prefetch,
            RIGHT_REGISTERS=launch.right_registers,
            FILL_REGISTERS=launch.fill_registers,
            num_warps=4,
        )
        if cuts:
            block_d = 512
            sm90_expand_plan_kernel.merge[(cuts, min(heads, HEADS), 512 // block_d)](
                parts,
                parts_lse,
                meta,
                attn_sink,
                out,
                lse,
                heads,
                head_blocks,
                planned.whole,
                planned.splits,
                BLOCK_D=block_d,
                TOGETHER=4 if kind == BALANCED else triton.next_power_of_2(min(planned.splits, 8)),
                num_warps=4,
                launch_pdl=True,
            )
    return out, lse, max_logits


def page_arguments(source: Source) -> tuple[int, ...]:
    """How the kernel finds a slot of the source, and its lists."""
    cache = source.cache
    return (
        cache.pages.stride(0) // 4,
        cache.page_size,
        *division(cache.page_size),
        min(cache.num_slots - 1, 2**31 - 1),
        source.indices.stride(0),
        source.indices.stride(1),
    )


def division(divisor: int) -> tuple[int, int]:
    """(magic, shift): n // divisor = (2 n magic >> 32) >> shift for 0 <= n < 2^31.

    magic is a uint32, given as an int32. It is (2^(31 + shift) + e) / divisor with e < divisor <=
    2^shift, so that the quotient is too large by n e / (divisor 2^(31 + shift)) < 1 / divisor.
    """
    shift = (divisor - 1).bit_length()
    magic = -(-(2 ** (31 + shift)) // divisor)
    return magic - 2**32 if magic >= 2**31 else magic, shift
