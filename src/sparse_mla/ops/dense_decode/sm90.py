"""Launcher of the Hopper kernel for dense decode over bf16 caches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ... import arch
from ...kv_cache import KVCache
from . import sm90_kernel
from .sm90_combine import combine

# Bytes that a lane copies at once.
ALIGNMENT = 16
ROWS = 64  # heads of query tokens per CTA
TILE = 64  # tokens
PAIR = 128
# batch_invariant=True: at most so many pieces of a sequence, of at least so many pairs of tiles.
INVARIANT_CHUNKS = 16
INVARIANT_PAIRS = 16
MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """How `sm90_kernel.attend` is launched.

    Attributes:
        prefetch: bring tiles into L2 a pair ahead.
        rounded_sums: divide by the sum of the rounded weights instead of the exact sum.
        right_registers, loader_registers: per thread of the worker warps; the default ones get
            what is left of 504.
    """

    prefetch: bool
    rounded_sums: bool
    right_registers: int
    loader_registers: int


# One block of rows per sequence: memory sets the time, and prefetching costs some (b=32 h=64
# s_k=8192: 99 us, 110 with it, FlashMLA 104); sums of rounded weights cost nothing.
ONE_BLOCK = Launch(False, True, 224, 56)
# Two and more share their rows by L2, where the first to ask waits for memory (b=128 h=128
# s_k=4096: 244 us, FlashMLA 242; rounded sums 3 % more).
BLOCKS = Launch(True, False, 224, 56)


def launch_for(blocks: int) -> Launch:
    """The launch for a number of blocks of rows per sequence."""
    return ONE_BLOCK if blocks == 1 else BLOCKS


def run(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    num_splits: int,
    batch_invariant: bool,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense decode; see interface.dense_decode. num_splits 0 shares all tokens out evenly."""
    if q.is_cuda:
        # Binds the device's context to a thread that has none yet: descriptors need it.
        torch.cuda.is_current_stream_capturing()
    if cache.alignment < ALIGNMENT:
        raise ValueError(
            f"the cache is aligned to {cache.alignment} bytes, the kernels need {ALIGNMENT}"
        )
    b, s_q, heads, _ = q.shape
    layout = cache.layout
    out = torch.empty(b, s_q, heads, layout.d_v, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(b, s_q, heads, dtype=torch.float32, device=q.device)
    if b * s_q == 0:
        return out, lse
    if q.data_ptr() % ALIGNMENT or any(stride % 8 for stride in q.stride()[:-1]):
        q = q.contiguous()
    blocks = triton.cdiv(s_q * heads, ROWS)
    launch = launch_for(blocks) if launch is None else launch
    parts = max(1, arch.of(q.device).multiprocessors // blocks)
    max_tokens = min(block_table.shape[1] * cache.page_size, 2**31 - 1)
    chunks, least = num_splits or 1, 1
    if batch_invariant and not num_splits:
        chunks, least = INVARIANT_CHUNKS, INVARIANT_PAIRS
    chunks = min(chunks, max(1, triton.cdiv(max_tokens, PAIR * least)), MAX_SPLITS)
    chunked = batch_invariant or num_splits > 0
    split = chunks > 1 if chunked else parts > 1
    part = part_lse = plan = None
    if split:
        slots = b * chunks if chunked else 2 * parts
        part = torch.empty(slots, s_q * heads, 512, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(slots, s_q * heads, dtype=torch.float32, device=q.device)
        if not chunked:
            plan = torch.empty(parts, 2, dtype=torch.int32, device=q.device)
    wide, narrow, page_rows = _descriptors(cache)
    packed = cache.token_stride == layout.row_bytes
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        sm90_kernel.attend[(blocks * parts,)](
            q,
            triton.reinterpret(cache.pages, tl.bfloat16),
            wide,
            narrow,
            block_table,
            cache_seqlens,
            out,
            lse,
            part,
            part_lse,
            plan,
            q.stride(0) // 8,
            q.stride(1) // 8,
            q.stride(2) // 8,
            block_table.stride(0),
            cache.pages.stride(0) // ALIGNMENT,
            cache.page_size,
            page_rows,
            cache.num_pages,
            max_tokens,
            b,
            s_q,
            heads,
            chunks,
            least,
            scale * math.log2(math.e),
            D_ROPE=layout.rope.count if layout.rope else 0,
            TOKEN_STRIDE=cache.token_stride // ALIGNMENT,
            TMA=wide is not None,
            # Rows far apart would be prefetched with what lies between them.
            PREFETCH=launch.prefetch and wide is not None and packed,
            CAN_SPLIT=split,
            CHUNKED=chunked,
            ROW_LIMITS=causal and s_q > 1,
            ROUNDED_SUMS=launch.rounded_sums,
            RIGHT_REGISTERS=launch.right_registers,
            LOADER_REGISTERS=launch.loader_registers,
            num_warps=4,
        )
        if part is not None and part_lse is not None:
            combine(part, part_lse, plan, cache_seqlens, max_tokens, chunks, least, out, lse)
    return out, lse


def _descriptors(
    cache: KVCache,
) -> tuple[TensorDescriptor | None, TensorDescriptor | None, int]:
    """TMA descriptors of the cache's rows with boxes of 256 and 64 columns, and rows per page.

    None where a tile can lie in several pages, or a page is no whole number of rows.
    """
    page_stride, token_stride = cache.pages.stride(0), cache.token_stride
    if cache.page_size % TILE or page_stride % token_stride or cache.num_pages == 0:
        return None, None, 0
    width = cache.layout.d_qk
    page_rows = page_stride // token_stride
    lines = (cache.num_pages - 1) * page_rows + cache.page_size
    if lines > 2**31 - 1:
        return None, None, 0
    rows = cache.pages.as_strided((lines, 2 * width), (token_stride, 1)).view(torch.bfloat16)
    swizzled = gl.NVMMASharedLayout(128, 16, 2)
    strides = [token_stride // 2, 1]
    wide, narrow = (
        TensorDescriptor(rows, [lines, width], strides, [TILE, columns], swizzled)
        for columns in (256, 64)
    )
    return wide, narrow, page_rows
