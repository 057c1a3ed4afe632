"""Intervals and tests for shares of right answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Right answers out of all, with Wilson's interval at 95 %."""

    right: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.count

    def __str__(self) -> str:
        return (
            f"{self.value:.3f} ({self.right} of {self.count}; 95 % interval {self.low:.3f} to "
            f"{self.high:.3f})"
        )


def wilson(right: int, count: int) -> Share:
    """ValueError without any answers."""
    from scipy.stats import binomtest

    if count < 1:
        raise ValueError(f"count is {count}, there must be answers")
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return Share(right, count, float(interval.low), float(interval.high))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: pairs that only one side got right are coin flips."""
    from scipy.stats import binomtest

    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)
