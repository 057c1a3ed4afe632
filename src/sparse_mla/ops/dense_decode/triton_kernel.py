"""The portable Triton kernel of dense decode, over bf16 rows or FP8 ones with one scale for all.

A row is one head of one query token; a sequence has s_q * heads of them. One program attends
BLOCK_H rows of one sequence to one split of its tokens, BLOCK_T at a time, with a running softmax
in float32 (log2 domain). Splits are cut by each sequence's own length, on the device. Partial
results are merged by sparse decode's `combine`.

FP8 values go to the tensor cores as bf16, which holds them exactly; the scale of the whole tensor
multiplies the logits and the output in float32.

Tokens of pages that the cache does not have are masked at the load, as those past the end are.
"""

import triton
import triton.language as tl

from ..sparse_decode.triton_kernel import dot, store_tile
from ..sparse_decode.triton_rows_kernel import decode_e4m3, to_bf16


@triton.jit
def load_pages(table, token, last, page_size):
    """The tokens' page numbers, -1 from `last` on."""
    return tl.load(table + token // page_size, mask=token < last, other=-1)


@triton.jit
def load_values(ptr, mask, QUANTISED: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """Values of a row at ptr as bf16; masked ones are 0."""
    if QUANTISED:
        return decode_e4m3(tl.load(ptr, mask=mask, other=0), HARDWARE_FP8)
    else:
        return tl.load(ptr, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["s_q", "heads", "row_blocks", "max_tokens", "splits", "min_split"])
def attend(
    q_ptr,  # [b, s_q, heads, D_QK] bf16, strides q_stride_*
    kv_ptr,  # cache bytes, uint8
    table_ptr,  # [b, max_pages] int32
    seqlens_ptr,  # [b] int32
    tensor_scale_ptr,  # [1] float32, or None
    out_ptr,  # [splits, b, s_q * heads, 512], bf16 when unsplit, else float32
    lse_ptr,  # [splits, b, s_q * heads] float32: natural when unsplit, else log2
    q_stride_b,
    q_stride_s,
    q_stride_h,
    table_stride,
    page_stride,  # bytes
    page_size,
    num_pages,
    s_q,
    heads,
    row_blocks,
    max_tokens,  # what the table reaches
    splits,
    min_split,  # least tokens of a split, a multiple of BLOCK_T
    scale_log2,  # softmax scale * log2(e)
    QUANTISED: tl.constexpr,  # rows of e4m3
    HARDWARE_FP8: tl.constexpr,
    D_ROPE: tl.constexpr,  # dims past 512: 64, or 0
    TOKEN_STRIDE: tl.constexpr,  # bytes
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,  # 1, or 2: two programs share the 512 output dims
    STAGES: tl.constexpr,
):
    # Programs of one sequence run side by side, so that their shared rows meet in L2.
    pid = tl.program_id(0)
    value_block = pid % VALUE_BLOCKS
    pid = pid // VALUE_BLOCKS
    row_block = pid % row_blocks
    split = (pid // row_blocks) % splits
    b = (pid // (row_blocks * splits)).to(tl.int64)
    sequences = tl.num_programs(0) // (row_blocks * splits * VALUE_BLOCKS)

    rows = s_q * heads
    row = row_block * BLOCK_H + tl.arange(0, BLOCK_H)
    row_ok = row < rows
    q_mask = row_ok[:, None]
    dims = tl.arange(0, 128)[None, :]
    rope_dims = tl.arange(0, 64)[None, :]
    columns = tl.arange(0, BLOCK_T)
    # Tiles of 128 dims in this program's order: those whose output it owns come first.
    tile0 = value_block * 2
    tile2 = 2 - tile0
    dims0 = dims + tile0 * 128
    dims1 = dims + (tile0 * 128 + 128)
    dims2 = dims + tile2 * 128
    dims3 = dims + (tile2 * 128 + 128)

    q_rows = q_ptr + b * q_stride_b + (row // heads).to(tl.int64)[:, None] * q_stride_s
    q_rows += (row % heads).to(tl.int64)[:, None] * q_stride_h
    q0 = tl.load(q_rows + dims0, mask=q_mask, other=0.0)
    q1 = tl.load(q_rows + dims1, mask=q_mask, other=0.0)
    q2 = tl.load(q_rows + dims2, mask=q_mask, other=0.0)
    q3 = tl.load(q_rows + dims3, mask=q_mask, other=0.0)
    if D_ROPE > 0:
        q_rope = tl.load(q_rows + (rope_dims + 512), mask=q_mask, other=0.0)

    length = tl.maximum(tl.minimum(tl.load(seqlens_ptr + b), max_tokens), 0)
    size = ((length + splits - 1) // splits + (BLOCK_T - 1)) // BLOCK_T * BLOCK_T
    size = tl.maximum(size, min_split)
    first = split * size
    last = tl.minimum(length, first + size)
    if CAUSAL:
        limit = length - s_q + 1 + row // heads
        seen = length - s_q + 1 + tl.minimum((row_block * BLOCK_H + BLOCK_H - 1) // heads, s_q - 1)
        last = tl.minimum(last, seen)
    table = table_ptr + b * table_stride

    factor = tl.full([BLOCK_H], 1.0, tl.float32)
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
        factor *= tensor_scale
        scale_log2 *= tensor_scale

    base = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    rounded = tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, 128], tl.float32)
    acc1 = tl.zeros([BLOCK_H, 128], tl.float32)
    if VALUE_BLOCKS == 1:
        acc2 = tl.zeros([BLOCK_H, 128], tl.float32)
        acc3 = tl.zeros([BLOCK_H, 128], tl.float32)
    zero = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)

    # Page numbers are loaded a step ahead.
    next_page = load_pages(table, first + columns, last, page_size)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES, disable_licm=True):
        page = next_page
        next_page = load_pages(table, start + BLOCK_T + columns, last, page_size)
        token = start + columns
        ok = (page >= 0) & (page < num_pages)
        offset = tl.where(ok, page, 0).to(tl.int64) * page_stride
        offset += (token % page_size).to(tl.int64) * TOKEN_STRIDE
        values = (kv_ptr + offset)[:, None]
        if not QUANTISED:
            values = values.to(tl.pointer_type(tl.bfloat16))
        mask = ok[:, None]
        k0 = load_values(values + dims0, mask, QUANTISED, HARDWARE_FP8)
        k1 = load_values(values + dims1, mask, QUANTISED, HARDWARE_FP8)
        k2 = load_values(values + dims2, mask, QUANTISED, HARDWARE_FP8)
        k3 = load_values(values + dims3, mask, QUANTISED, HARDWARE_FP8)
        logits = dot(q0, tl.trans(k0), zero)
        logits = dot(q1, tl.trans(k1), logits)
        logits = dot(q2, tl.trans(k2), logits)
        logits = dot(q3, tl.trans(k3), logits)
        if D_ROPE > 0:
            k_rope = load_values(values + (rope_dims + 512), mask, QUANTISED, HARDWARE_FP8)
            logits = dot(q_rope, tl.trans(k_rope), logits)

        visible = ok[None, :]
        if CAUSAL:
            visible = visible & (token[None, :] < limit[:, None])
        logits = tl.where(visible, logits * scale_log2, float("-inf"))
        # The peak rounded up to an integer: rescaling is by powers of two, exact.
        new_base = tl.maximum(base, tl.ceil(tl.max(logits, 1)))
        # With nothing valid so far it is -inf; subtracting 0 instead keeps exp2 at 0.
        shift = tl.where(new_base == float("-inf"), 0.0, new_base)
        decay = tl.exp2(base - shift)
        p = tl.exp2(logits - shift[:, None])
        base = new_base
        total = total * decay + tl.sum(p, 1)
        weights = to_bf16(p)
        # Divided by the sum of the rounded weights: those that all round one way leave no gain.
        rounded = rounded * decay + tl.sum(weights.to(tl.float32), 1)
        acc0 = dot(weights, k0, acc0 * decay[:, None])
        acc1 = dot(weights, k1, acc1 * decay[:, None])
        if VALUE_BLOCKS == 1:
            acc2 = dot(weights, k2, acc2 * decay[:, None])
            acc3 = dot(weights, k3, acc3 * decay[:, None])

    lse = base + tl.log2(total)
    if not SPLIT:
        lse = lse * 0.6931471805599453
    line = (split.to(tl.int64) * sequences + b) * rows + row
    tl.store(lse_ptr + line, lse, mask=row < tl.where(value_block == 0, rows, 0))
    out = out_ptr + line[:, None] * 512
    store_tile(out + dims0, acc0, rounded, factor, q_mask)
    store_tile(out + dims1, acc1, rounded, factor, q_mask)
    if VALUE_BLOCKS == 1:
        store_tile(out + dims2, acc2, rounded, factor, q_mask)
        store_tile(out + dims3, acc3, rounded, factor, q_mask)
