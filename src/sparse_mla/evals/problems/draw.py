"""Templates and how a problem is drawn from one.

A template's lines mention drawn things in braces and compute in brackets: "{X} sold [c:a/2] clips"
becomes "Mia sold <<48/2=24>>24 clips" and names the result c. Numbers are whole and stay within
1..999, so that a small model can learn every step.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property

from .problem import Problem

LARGEST = 999

_STEP = re.compile(r"\[(\w+):(\w+)([-+*/])(\w+)\]")
_FIELD = re.compile(r"\{(\w+)\}")


class Unusable(Exception):
    """A draw whose numbers leave 1..LARGEST or do not divide."""


@dataclass(frozen=True)
class Template:
    """One kind of problem.

    Attributes:
        name: unique.
        draws: in order, "name low..high" (a whole number), "name = x*y" (from earlier ones), or
            "name of POOL" (a word; two names from one pool differ).
        question: text with {name}.
        steps: lines of the answer with {name} and [result:x+y]; the last result is the answer.
    """

    name: str
    draws: tuple[str, ...]
    question: str
    steps: tuple[str, ...]

    @cached_property
    def _parsed(self) -> list[tuple[str, str, tuple[str, ...]]]:
        parsed: list[tuple[str, str, tuple[str, ...]]] = []
        for line in self.draws:
            if found := re.fullmatch(r"(\w+) (\d+)\.\.(\d+)", line):
                parsed.append((found[1], "range", (found[2], found[3])))
            elif found := re.fullmatch(r"(\w+) = (\w+)([-+*/])(\w+)", line):
                parsed.append((found[1], "computed", (found[2], found[3], found[4])))
            elif found := re.fullmatch(r"(\w+) of (\w+)", line):
                parsed.append((found[1], "word", (found[2],)))
            else:
                raise ValueError(f"draw is {line!r} in template {self.name}")
        return parsed


def compute(left: int, operator: str, right: int) -> int:
    """The result; Unusable if it is not a whole number within 1..LARGEST."""
    if operator == "+":
        result = left + right
    elif operator == "-":
        result = left - right
    elif operator == "*":
        result = left * right
    else:
        if right == 0 or left % right:
            raise Unusable
        result = left // right
    if not 1 <= result <= LARGEST:
        raise Unusable
    return result


def draw(template: Template, pools: dict[str, list[str]], rng: random.Random) -> Problem:
    """One problem; draws again until its numbers are usable."""
    while True:
        try:
            return _draw(template, pools, rng)
        except Unusable:
            continue


def _draw(template: Template, pools: dict[str, list[str]], rng: random.Random) -> Problem:
    values: dict[str, int] = {}
    words: dict[str, str] = {}
    for name, kind, rest in template._parsed:
        if kind == "range":
            low, high = int(rest[0]), int(rest[1])
            values[name] = low + int(rng.random() * (high - low + 1))
        elif kind == "computed":
            values[name] = compute(_value(rest[0], values), rest[1], _value(rest[2], values))
        else:
            pool = pools[rest[0]]
            word = pool[int(rng.random() * len(pool))]
            while word in words.values():
                word = pool[int(rng.random() * len(pool))]
            words[name] = word
    texts = dict(words)
    texts.update((name, str(value)) for name, value in values.items())
    question = _FIELD.sub(lambda found: texts[found[1]], template.question)
    result = 0

    def step(found: re.Match[str]) -> str:
        nonlocal result
        left, right = _value(found[2], values), _value(found[4], values)
        result = values[found[1]] = compute(left, found[3], right)
        texts[found[1]] = str(result)
        return f"<<{left}{found[3]}{right}={result}>>{result}"

    lines = [
        _FIELD.sub(lambda found: texts[found[1]], _STEP.sub(step, line)) for line in template.steps
    ]
    answer = "\n".join([*lines, f"#### {result}"])
    return Problem(question, answer, template.name)


def _value(name: str, values: dict[str, int]) -> int:
    return int(name) if name.isdigit() else values[name]
