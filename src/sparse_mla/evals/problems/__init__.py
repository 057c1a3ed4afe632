"""Generated grade-school word problems in GSM8K's form; needs nothing but Python."""

from __future__ import annotations

from .problem import Problem, prompt_of, read_answer, shown
from .sets import SHOTS, TEST_SIZE, fewshot, held_out, problems
from .templates import TEMPLATES

__all__ = [
    "SHOTS",
    "TEMPLATES",
    "TEST_SIZE",
    "Problem",
    "fewshot",
    "held_out",
    "problems",
    "prompt_of",
    "read_answer",
    "shown",
]
