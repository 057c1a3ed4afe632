"""Merging the pieces that `sm90_work_kernel.plan` cut sequences into.

The launch may begin before the attending kernel has ended (programmatic dependent launch): only
what does not depend on it comes before the wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ..sparse_decode.triton_rows_kernel import to_bf16

# Rows of a program, and pieces that it loads together.
ROWS = 4
TOGETHER = tl.constexpr(4)
PAIR = tl.constexpr(128)


@triton.jit(do_not_specialize=["rows", "parts", "max_tokens", "max_chunks", "min_chunk"])
def _combine(
    parts_ptr,  # [slots, rows, 512] float32
    parts_lse_ptr,  # [slots, rows] float32, log2
    plan_ptr,  # [parts, 2] int32; unless CHUNKED
    seqlens_ptr,  # [b] int32; only if CHUNKED
    out_ptr,  # [b, rows, 512] bf16
    lse_ptr,  # [b, rows] float32, natural
    rows,  # of a sequence
    parts,
    max_tokens,
    max_chunks,
    min_chunk,
    CHUNKED: tl.constexpr,
    MAX_PARTS: tl.constexpr,  # a power of two >= parts
    MAX_PIECES: tl.constexpr,  # a power of two >= a sequence's pieces
    ROWS: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, 512)[None, :]
    there = row < rows
    if CHUNKED:
        # Program 0 of the grid takes a sequence.
        sequence = tl.program_id(0)
        length = tl.maximum(tl.minimum(tl.load(seqlens_ptr + sequence), max_tokens), 0)
        pairs = tl.maximum((length + (PAIR - 1)) // PAIR, 1)
        chunk = tl.maximum((pairs + max_chunks - 1) // max_chunks, min_chunk)
        pieces = (pairs + chunk - 1) // chunk
        slot0 = sequence * max_chunks
        slot1 = slot0 + 1
        step = 1
        gdc_wait()
    else:
        # It takes the sequence that the part begins in, if it is the first to begin inside it.
        part = tl.program_id(0) + 1
        other = tl.arange(0, MAX_PARTS)
        gdc_wait()
        sequence = tl.load(plan_ptr + part * 2)
        first = tl.load(plan_ptr + part * 2 + 1)
        before = tl.load(plan_ptr + part * 2 - 2)
        before_first = tl.load(plan_ptr + part * 2 - 1)
        sequences = tl.load(plan_ptr + other * 2, mask=other < parts, other=-1)
        following = tl.sum(((sequences == sequence) & (other >= part)).to(tl.int32), 0)
        begins = (sequence >= 0) & (first > 0) & ((before != sequence) | (before_first == 0))
        pieces = tl.where(begins, following + 1, 0)
        slot0 = (part - 1) * 2 + tl.where(before == sequence, 0, 1)
        slot1 = part * 2
        step = 2
    if pieces > 1:
        piece = tl.arange(0, MAX_PIECES)
        slots = tl.where(piece == 0, slot0, slot1 + (piece - 1) * step).to(tl.int64)
        at = slots[:, None] * rows + row[None, :]
        mask = (piece < pieces)[:, None] & there[None, :]
        lse = tl.load(parts_lse_ptr + at, mask=mask, other=float("-inf"))
        peak = tl.max(lse, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(lse - base[None, :]), 0)
        factor = tl.where(total == 0.0, 0.0, 1.0 / total)
        out = tl.zeros([ROWS, 512], tl.float32)
        for start in range(0, pieces, TOGETHER):
            for i in tl.static_range(TOGETHER):
                one = start + i
                slot = tl.where(one == 0, slot0, slot1 + (one - 1) * step).to(tl.int64)
                ok = there & (one < pieces)
                line = slot * rows + row
                weight = tl.load(parts_lse_ptr + line, mask=ok, other=float("-inf"))
                part_rows = parts_ptr + line[:, None] * 512 + dims
                values = tl.load(part_rows, mask=ok[:, None], other=0.0)
                # A piece with nothing valid has weight 0 and zeros as its part.
                out += values * (tl.exp2(weight - base) * factor)[:, None]
        target = sequence.to(tl.int64) * rows + row
        tl.store(out_ptr + target[:, None] * 512 + dims, to_bf16(out), mask=there[:, None])
        tl.store(lse_ptr + target, (base + tl.log2(total)) * 0.6931471805599453, mask=there)


def combine(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    plan: torch.Tensor | None,
    seqlens: torch.Tensor,
    max_tokens: int,
    max_chunks: int,
    min_chunk: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge partial results into out [b, s_q, h, 512] bf16 and lse [b, s_q, h], in place.

    Args:
        part: [slots, s_q * h, 512] float32, each row normalised.
        part_lse: [slots, s_q * h] float32, log2.
        plan: [parts, 2] int32; None where sequences are cut by their own lengths.
    """
    rows = part_lse.shape[1]
    parts = out.shape[0] if plan is None else plan.shape[0]
    grid = (parts if plan is None else parts - 1, triton.cdiv(rows, ROWS))
    _combine[grid](
        part,
        part_lse,
        plan,
        seqlens,
        out,
        lse,
        rows,
        parts,
        max_tokens,
        max_chunks,
        min_chunk,
        CHUNKED=plan is None,
        MAX_PARTS=triton.next_power_of_2(parts) if plan is not None else 1,
        MAX_PIECES=triton.next_power_of_2(max_chunks if plan is None else parts),
        ROWS=ROWS,
        num_warps=4,
        launch_pdl=True,
    )
