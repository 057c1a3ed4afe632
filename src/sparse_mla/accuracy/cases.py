"""The case catalogue: every failure in docs/faults.md as an input, and plain inputs beside them.

Most cases are one `Draw` (case_inputs.py); those that need a hand-made call are in
case_special.py, the cache writer's in case_writes.py. Sizes are small on purpose: a fault in how
bytes are read shows on two rows.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from ..kv_layout import LAYOUTS, get_layout
from .case import Case, Inputs
from .case_inputs import Draw, Extra, draw
from .case_special import SPECIAL_CASES
from .case_writes import WRITE_CASES
from .cases_beside import BESIDE_CASES
from .cases_busy import BUSY_CASES
from .cases_dense import DENSE_CASES
from .cases_layouts import LAYOUT_CASES
from .cases_mixed import MIXED_CASES
from .cases_seldom import SELDOM_CASES
from .cases_shapes import SHAPE_CASES
from .cases_values import VALUE_CASES

ALL_LAYOUTS = tuple(name for name, layout in LAYOUTS.items() if not layout.extra_only)

CASES: tuple[Case, ...] = (
    *VALUE_CASES,
    *SHAPE_CASES,
    *SPECIAL_CASES,
    *LAYOUT_CASES,
    *DENSE_CASES,
    *SELDOM_CASES,
    *BUSY_CASES,
    *BESIDE_CASES,
    *MIXED_CASES,
    *WRITE_CASES,
)


def random_case(seed: int) -> Case:
    """A small case drawn at random, clean or hostile: what no correct kernel may fail."""
    spec = random_draw(random.Random(seed))
    name = f"random/{seed}"

    def build(case_seed: int, device: torch.device) -> list[Inputs]:
        return [draw(spec, case_seed, name, device)]

    layout = f"{spec.layout}, {spec.values}, {spec.scales}, holes {spec.holes}"
    about = f"{layout}, h {spec.h}, topk {spec.topk}, page {spec.page_size}"
    if spec.extra is not None:
        about += f", beside {spec.extra.layout}, topk {spec.extra.topk}"
    return Case(name, spec.op, about, (), build)


def random_draw(r: random.Random) -> Draw:
    """A random `Draw`, small enough for about 10 ms."""
    op = r.choice(("decode", "decode", "prefill"))
    spec = Draw(
        op=op,
        layout=r.choice(("v32_fp8", "v32_fp8", *ALL_LAYOUTS)),
        b=r.randint(1, 3),
        s_q=r.randint(1, 2) if op == "decode" else r.randint(1, 4),
        h=r.choice((1, 2, 4, 5, 8)),
        topk=r.choice((1, 7, 33, 64, 65, 100, 128)),
        page_size=r.choice((1, 2, 16, 53, 64)),
        values=r.choice(
            (
                "gaussian",
                "gaussian",
                "heavy_tailed",
                "outlier_channels",
                "shifted",
                "token_magnitudes",
                "tile_magnitudes",
                "sparse_tiles",
                "tiny",
                "huge",
            )
        ),
        logit_std=r.choice((0.0, 0.5, 1.5, 3.0, 8.0)),
        holes=r.choice(
            (
                "none",
                "none",
                "front",
                "middle",
                "random",
                "chunk",
                "most",
                "large",
                "negative",
                "some_rows_empty",
            )
        ),
        page_pad=r.choice((0, 0, 64)),
        strided=r.random() < 0.3,
    )
    if spec.layout in ("v32_fp8", "glm53_nope_fp8"):
        spec = replace(spec, scales=r.choice(("amax", "amax", "pow2", "log_uniform")))
    if r.random() < 0.3:
        spec = replace(spec, lengths=tuple(r.randint(0, spec.topk) for _ in range(4)))
    if r.random() < 0.3:
        sinks = (-3.0, 0.0, 2.0, 6.0, float("inf"), float("-inf"))
        spec = replace(spec, sink=tuple(r.choice(sinks) for _ in range(3)))
    if op == "decode" and r.random() < 0.3:
        spec = replace(spec, extra=_random_extra(r, spec))
    return spec


def _random_extra(r: random.Random, spec: Draw) -> Extra:
    """A second cache of the same width."""
    width = get_layout(spec.layout).d_qk
    topk = r.choice((0, 1, 17, 64, 90))
    return Extra(
        layout=r.choice([name for name, layout in LAYOUTS.items() if layout.d_qk == width]),
        topk=topk,
        page_size=r.choice((1, 2, 16, 53, 64)),
        holes=r.choice(("none", "none", "random", "large", "some_rows_empty")),
        lengths=None if r.random() < 0.6 else tuple(r.randint(0, topk) for _ in range(3)),
        page_pad=r.choice((0, 0, 64)),
    )
