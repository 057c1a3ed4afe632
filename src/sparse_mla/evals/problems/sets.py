"""Which draws are for training, for prompts and for testing.

A question belongs to the test side by a hash of its text, so that no training draw, whatever its
seed, can be a held-out problem.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import islice

from .draw import draw
from .problem import Problem
from .templates import POOLS, TEMPLATES

TEST_SIZE = 1319  # as many as GSM8K's
SHOTS = 6  # 512 tokens and more, against an index_topk of 128

_TEST_SHARE = 8
_TEST_SEED = 20_001
_SHOT_SEED = 20_002


def is_held_out(question: str) -> bool:
    """Whether the question is on the test side; one in 8 is."""
    return zlib.crc32(question.encode()) % _TEST_SHARE == 0


def problems(
    seed: int, held_out: bool = False, templates: tuple[str, ...] | None = None
) -> Iterator[Problem]:
    """Endless draws of one side; every template is as likely as any other."""
    rng = random.Random(seed)
    chosen = [t for t in TEMPLATES if templates is None or t.name in templates]
    if not chosen:
        raise ValueError(f"templates is {templates!r}, none of them exists")
    while True:
        problem = draw(chosen[int(rng.random() * len(chosen))], POOLS, rng)
        if is_held_out(problem.question) == held_out:
            yield problem


def held_out(count: int = TEST_SIZE, templates: tuple[str, ...] | None = None) -> list[Problem]:
    """The first `count` of the test problems; no two are the same."""
    found: dict[str, Problem] = {}
    for problem in problems(_TEST_SEED, held_out=True, templates=templates):
        if len(found) == count:
            break
        found.setdefault(problem.question, problem)
    return list(found.values())


def fewshot(count: int = SHOTS) -> list[Problem]:
    """Worked problems for prompts, from the training side."""
    return list(islice(problems(_SHOT_SEED), count))
