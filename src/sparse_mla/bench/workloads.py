"""What is measured, as data: shapes, and the goals that some of them have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..kv_layout import LAYOUTS, get_layout


@dataclass(frozen=True)
class Workload:
    """A shape to measure. Query tokens select random tokens of one shared cache.

    "kv_write" writes b tokens into whole random pages of a cache of s_kv.
    In dense decode topk is the length of every sequence, whose pages are random ones.

    With extra_topk there is a second cache of as many tokens, whose lists have that many entries;
    with extra_lengths only a random number of them counts, the same for a sequence's tokens.
    """

    op: str
    layout: str
    b: int
    s_q: int
    h_q: int
    topk: int
    s_kv: int
    extra_topk: int = 0
    extra_lengths: bool = False

    @property
    def entries(self) -> int:
        """Entries of a query token's lists, those that do not count left out on average."""
        return self.topk + self.extra_topk // (2 if self.extra_lengths else 1)

    @property
    def label(self) -> str:
        """Unique among the workloads; `matches` searches its words."""
        if self.op == "kv_write":
            return f"{self.op} {self.layout} n={self.b}"
        shape = f"b={self.b} s_q={self.s_q}"
        end = f"topk={self.topk}"
        if self.op == "prefill":
            shape, end = f"s_q={self.s_q}", f"{end} s_kv={self.s_kv}"
        elif self.op == "dense_decode":
            end = f"s_k={self.topk}"
        if self.extra_topk:
            end += f" extra={self.extra_topk}" + " lengths" * self.extra_lengths
        return f"{self.op} {self.layout} {shape} h={self.h_q} {end}"

    def matches(self, text: str) -> bool:
        """Whether every word of `text` is a word of the label."""
        return set(text.split()) <= set(self.label.split())

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.b * self.s_q

    @property
    def flops(self) -> int:
        """Of both products, for the heads that were asked for."""
        if self.op == "kv_write":
            return 0
        layout = get_layout(self.layout)
        return 2 * self.tokens * self.h_q * self.entries * (layout.d_qk + layout.d_v)

    @property
    def bytes(self) -> int:
        """Least memory traffic: each distinct selected row once, indices, queries and outputs.

        A writer reads bf16 tokens and their slots and writes the tokens' bytes.
        """
        layout = get_layout(self.layout)
        if self.op == "kv_write":
            return self.b * (2 * layout.d_qk + layout.bytes_per_token + 8)
        rows = min(self.tokens * self.entries, self.s_kv) * layout.bytes_per_token
        index = 0 if self.op == "dense_decode" else 4 * self.entries
        return rows + self.tokens * (index + 2 * self.h_q * (layout.d_qk + layout.d_v))


@dataclass(frozen=True)
class Goal:
    """What a backend of ours is to reach on a workload.

    Attributes:
        machine: how the names of the machines begin for which the goal was set.
        backend: ours; "sm90" and the like.
        peer: the provider it is compared with.
        ratio: least value of the peer's time over ours, both measured in one run.
        error: largest relative L2 error in multiples of ideal rounding, if there is a goal for it.
        gain: largest |gain|, likewise.
    """

    machine: str
    workload: Workload
    backend: str
    peer: str
    ratio: float
    error: float | None = None
    gain: float | None = None


def _decode(b: int, h_q: int, s_q: int = 1) -> Workload:
    return Workload("decode", "v32_fp8", b, s_q, h_q, 2048, b * 32768)


def _prefill(h_q: int, s_kv: int, layout: str = "bf16", topk: int = 2048) -> Workload:
    return Workload("prefill", layout, 1, 4096, h_q, topk, s_kv)


def _write(layout: str, tokens: int = 16384) -> Workload:
    return Workload("kv_write", layout, tokens, 1, 1, 0, 4 * tokens)


def _dense(b: int, h_q: int, s_k: int) -> Workload:
    return Workload("dense_decode", "bf16", b, 1, h_q, s_k, b * s_k)


def _model1(b: int, h_q: int, extra_topk: int, lengths: bool = False) -> Workload:
    """DeepSeek V4 as FlashMLA's tests time it ("MODEL1"): two query tokens a sequence."""
    return Workload("decode", "v4_fp8", b, 2, h_q, 128, 1 << 20, extra_topk, lengths)


H200 = "NVIDIA H200"
# |gain| is measured on a sample of query tokens; rounding the exact answer alone gives 1e-5.
MAX_GAIN = 5e-5


def _faster(ratio: float, workloads: Iterable[Workload]) -> list[Goal]:
    """Goals of the Hopper kernels: few heads round almost ideally, many heads nearly so."""
    goals = []
    for workload in workloads:
        few = workload.op == "decode" and workload.h_q <= 32
        error = 1.05 if few else 1.15
        goals.append(Goal(H200, workload, "sm90", "flash_mla", ratio, error, MAX_GAIN))
    return goals


CPU_WORKLOADS = (
    Workload("decode", "v32_fp8", 8, 1, 16, 2048, 65536),
    Workload("decode", "v32_fp8", 1, 1, 64, 2048, 65536),
    Workload("decode", "bf16", 8, 1, 16, 2048, 65536),
)

MODEL1_BATCHES = (2, 64, 74, 128, 148, 256)

GOALS = (
    *_faster(1.5, [_decode(128, 64), _decode(32, 64)]),
    *_faster(1.3, [_decode(64, 128), _decode(128, 128, s_q=2)]),
    # FlashMLA takes 64 or 128 heads: fewer are padded, as its callers do.
    *_faster(1.85, [_decode(b, h) for b in (128, 256) for h in (8, 16)]),
    *_faster(1.85, [_decode(256, 16, s_q=2)]),
    *_faster(1.9, [_decode(32, 8), _decode(32, 16)]),
    *_faster(2.0, [_decode(4, 8), _decode(4, 16)]),
    *_faster(1.5, [_decode(b, 32) for b in (128, 32, 4)]),
    *_faster(1.5, [_decode(b, h, s_q) for h in (64, 128) for b in (1, 2, 4) for s_q in (1, 2)]),
    *_faster(1.05, [_prefill(128, 8192)]),
    *_faster(1.1, [_prefill(128, 65536), _prefill(64, 32768)]),
    *_faster(1.1, [_prefill(64, 32768, "bf16_nope", 512)]),
    *_faster(2.5, [_prefill(h, 32768) for h in (8, 16, 32)]),
    *_faster(1.3, [_model1(b, 64, 512) for b in MODEL1_BATCHES]),
    *_faster(1.3, [_model1(b, 128, 1024) for b in MODEL1_BATCHES]),
    *_faster(1.3, [_model1(b, h, 1024, True) for h in (64, 128) for b in MODEL1_BATCHES]),
    *_faster(1.05, [_dense(128, 128, 4096), _dense(128, 128, 2048), _dense(32, 64, 8192)]),
    Goal(H200, _decode(128, 16), "triton", "flash_mla", 0.8),
    Goal(H200, _decode(128, 64), "triton", "flash_mla", 0.7),
    # 70 % of what a copy of as many bytes takes.
    *(Goal(H200, _write(layout), "triton", "torch:copy", 0.7) for layout in ("v32_fp8", "v4_fp8")),
    Goal("CPU", CPU_WORKLOADS[0], "cpu", "torch:gather_einsum", 5.0),
)

# Shapes without a goal, which make the figures' curves of time against batch.
_CURVES = [_decode(b, h) for h in (8, 16, 32, 64, 128) for b in (1, 4, 32, 128, 256)]
# Few heads over V4's caches: FlashMLA's callers pad them.
_MODEL1_FEW = [_model1(128, h, 512) for h in (8, 16, 32)]
_WRITES = [_write(layout) for layout in LAYOUTS]

# What serving GLM-5 and DeepSeek V3.2 meets; 8 to 32 heads are those of tensor-parallel ranks.
GPU_WORKLOADS = tuple(
    sorted(
        {goal.workload for goal in GOALS if goal.machine == H200}
        | set(_CURVES)
        | set(_MODEL1_FEW)
        | set(_WRITES),
        key=lambda w: (w.op, w.layout, w.h_q, w.s_q, w.b, w.s_kv, w.extra_topk, w.extra_lengths),
    )
)

# What README shows.
HEADLINES = (
    *(_decode(128, h) for h in (8, 16, 32, 64)),
    _decode(64, 128),
    *(_decode(4, h) for h in (16, 64, 128)),
    *(_model1(128, h, 512) for h in (16, 64)),
    _model1(64, 128, 1024),
    _dense(128, 128, 2048),
    *(_prefill(h, 32768) for h in (16, 64)),
    _prefill(128, 65536),
    *CPU_WORKLOADS,
)


def choose(workloads: Iterable[Workload], only: Iterable[str]) -> list[Workload]:
    """The workloads that match any of the texts, or all if there is no text.

    Raises:
        ValueError: a text matches no workload.
    """
    workloads, only = list(workloads), list(only)
    for text in only:
        if not any(w.matches(text) for w in workloads):
            raise ValueError(
                f"no workload's label has the words {text!r}; labels are like "
                f"{workloads[0].label!r} (--list shows them)"
            )
    return [w for w in workloads if not only or any(w.matches(text) for text in only)]


def goal_of(machine: str, workload: Workload, backend: str) -> Goal | None:
    """The goal of a backend of ours for a workload on a machine, if there is one."""
    for goal in GOALS:
        if machine.startswith(goal.machine) and (goal.workload, goal.backend) == (
            workload,
            backend,
        ):
            return goal
    return None
