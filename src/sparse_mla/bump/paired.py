"""Paired statistics: the same inputs to both sides, so differences are tested pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FLIPS = 4999
FLOOR = 0.05
"""Errors below this multiple of ideal count as equal: nobody can use the difference."""


@dataclass(frozen=True)
class Paired:
    """How candidate / base is distributed over pairs.

    Attributes:
        pairs: how many there are.
        ratio: geometric mean of candidate / base.
        p: of the sign-flip test, two-sided: how often randomly exchanging base and candidate
            within pairs makes a mean log ratio at least as large. 1 where nothing differs.
        lower, higher: share of pairs in which the candidate is below, above the base.
    """

    pairs: int
    ratio: float
    p: float
    lower: float
    higher: float


def compare_pairs(
    base: Sequence[float], candidate: Sequence[float], floor: float = FLOOR
) -> Paired | None:
    """Test candidate / base over pairs of positive numbers; None without pairs.

    Under the hypothesis that the sides are exchangeable the sign of every log ratio is a coin
    flip; no distribution is assumed. The flips are drawn from a fixed seed.
    """
    if len(base) != len(candidate):
        raise ValueError(f"{len(base)} and {len(candidate)} values are not pairs")
    if not base:
        return None
    low = np.maximum(np.asarray(base, dtype=np.float64), floor)
    high = np.maximum(np.asarray(candidate, dtype=np.float64), floor)
    logs = np.log(high / low)
    mean = float(logs.mean())
    p = 1.0
    if np.any(logs != 0):
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(FLIPS, len(logs)))
        at_least = np.abs(signs @ logs) >= abs(logs.sum()) * (1 - 1e-12)
        p = float(at_least.sum() + 1) / (FLIPS + 1)
    return Paired(
        pairs=len(logs),
        ratio=math.exp(mean),
        p=p,
        lower=float((logs < 0).mean()),
        higher=float((logs > 0).mean()),
    )
