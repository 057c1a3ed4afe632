"""Two evaluations of the same problems, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

from .log import Answered, Log
from .shares import mcnemar


@dataclass(frozen=True)
class Comparison:
    """What two logs say about the problems that both hold.

    Attributes:
        both, only_a, only_b, neither: how many problems were answered rightly by whom.
        p: McNemar's exact two-sided p.
        disagreements: pairs (a, b) of which one is right, in the problems' order.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float
    disagreements: list[tuple[Answered, Answered]]

    @property
    def pairs(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither


def compare(a: Log, b: Log) -> Comparison:
    """ValueError if the logs share no problem, or number them differently."""
    others = {one.number: one for one in b.answered}
    pairs = [(one, others[one.number]) for one in a.answered if one.number in others]
    if not pairs:
        raise ValueError("the two logs have no problem in common")
    for one, other in pairs:
        if one.question != other.question:
            raise ValueError(f"problem {one.number} is not the same in both logs")
    only_a = sum(one.right and not other.right for one, other in pairs)
    only_b = sum(other.right and not one.right for one, other in pairs)
    both = sum(one.right and other.right for one, other in pairs)
    return Comparison(
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=len(pairs) - both - only_a - only_b,
        p=mcnemar(only_a, only_b),
        disagreements=[pair for pair in pairs if pair[0].right != pair[1].right],
    )
