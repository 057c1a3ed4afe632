"""Launch choices of the portable Triton kernels, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...arch import Arch
from ...kv_layout import KVLayout


@dataclass(frozen=True)
class Launch:
    """How `triton_kernel.attend` or `triton_wgmma_kernel.attend_tokens_first` is launched.

    Attributes:
        block_h: heads per program, at least 16 (the smallest tensor-core tile).
        block_t: tokens per step.
        value_blocks: programs that share the 512 output dims; each computes all logits.
        num_warps: warps per program.
        stages: depth of the software pipeline over steps.
        programs_per_sm: programs that fit an SM at once; splits aim at filling them.
        tokens_first: `attend_tokens_first` where it can read the cache, with value_blocks 1.
    """

    block_h: int
    block_t: int
    value_blocks: int
    num_warps: int
    stages: int
    programs_per_sm: int
    tokens_first: bool = False


# Tokens per step, value blocks and depth were chosen on an H200 (b=128, topk 2048, v32_fp8) among
# about 170 launches of the kernels' variants. Deeper pipelines did not help: the loads of a step
# overlap with the other program on the SM. Times in us.
HEADS_16_WIDE = Launch(16, 64, 1, 4, 1, 2)  # h=16: 131; block_t 32: 190
HEADS_16 = Launch(16, 32, 1, 4, 1, 2)  # bf16 rows, twice as many bytes
HEADS_32 = Launch(32, 32, 1, 4, 1, 2)  # h=32: 194
# h=64: 232; one program for all 512 dims needs 8 warps: 300
HEADS_64 = Launch(64, 32, 2, 4, 1, 2)

# HEADS_64 takes 109 KB of shared memory, more than sm_86, sm_89 and sm_120 have.
LARGE_SHARED_MEMORY = 160 * 1024

# Where products of 64 rows are one instruction (wgmma), and rows have a scale per 128 dims. Without
# the launch after it (`redo_for`), which makes 125 of the 117 and 210 of the 200.
WGMMA_16 = Launch(16, 64, 1, 4, 1, 2, tokens_first=True)  # h=16: 117; h=8: 118
WGMMA_32 = Launch(32, 64, 1, 4, 1, 2, tokens_first=True)  # h=32: 138; h=64: 200

# And rows are exact in bf16, without scales of 128 dims. b=128, h=64, v4_fp8, 128 + 512 tokens: 69;
# stages 1: 73, 3: 74; HEADS_32: 113. bf16_nope, 2048 tokens: 157; stages 1: 191; HEADS_64: 218.
WGMMA_64 = Launch(64, 64, 1, 8, 2, 1)


def tokens_first_reads(layouts: Sequence[KVLayout]) -> bool:
    """Whether `attend_tokens_first` serves these caches: one, of e4m3, with scales in float32."""
    return len(layouts) == 1 and scaled_by_tile(layouts[0])


def scaled_by_tile(layout: KVLayout) -> bool:
    """Whether there is a float32 scale for every 128 dims, applied outside the products."""
    return layout.scales is not None and layout.scales.dtype == "fp32"


def launch_for(machine: Arch, heads: int, layouts: Sequence[KVLayout]) -> Launch:
    """The launch for a machine, number of heads and the caches' layouts."""
    large = machine.shared_memory >= LARGE_SHARED_MEMORY
    if machine.capability == (9, 0) and tokens_first_reads(layouts):
        return WGMMA_16 if heads <= 16 else WGMMA_32
    if heads <= 16:
        return HEADS_16_WIDE if all(layout.quantised for layout in layouts) else HEADS_16
    if machine.capability == (9, 0) and heads > 32 and not any(map(scaled_by_tile, layouts)):
        return WGMMA_64
    # Two programs that share the output dims take tiles in orders of their own: all of one kind.
    if heads <= 32 or not large or any(layout.latent.count < layout.d_v for layout in layouts):
        return HEADS_32
    return HEADS_64


def redo_for(launch: Launch) -> Launch:
    """The launch of `attend` after a tokens-first one: as many heads a program, tokens that divide.

    It runs for few lists or none, so that only its grid of programs that return counts.
    """
    return HEADS_16_WIDE if launch.block_h == HEADS_16_WIDE.block_h else HEADS_32
