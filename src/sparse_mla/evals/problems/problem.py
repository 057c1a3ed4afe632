"""A problem, and the text form that training, few-shot prompts and lm-eval share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Between two problems of a prompt; a model's answer ends here.
END = "\n\n"

_MARKED = re.compile(r"#### (-?[0-9][0-9,]*(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer, as in GSM8K's files.

    Attributes:
        question: one paragraph.
        answer: the steps, one per line, then "#### " and the number.
        template: which template it was drawn from; "" where it was not drawn.
    """

    question: str
    answer: str
    template: str = ""

    @property
    def target(self) -> str:
        """The final number."""
        found = read_answer(self.answer)
        if found is None:
            raise ValueError(f"answer is {self.answer!r}, it has no line '#### number'")
        return found


def shown(problem: Problem) -> str:
    """The problem with its answer, as it stands in a prompt and in training text."""
    return f"Question: {problem.question}\nAnswer: {problem.answer}{END}"


def prompt_of(shots: Iterable[Problem], question: str) -> str:
    """Worked problems, then the question to answer. The answer continues with a space."""
    return "".join(shown(shot) for shot in shots) + f"Question: {question}\nAnswer:"


def read_answer(text: str) -> str | None:
    """The number after the first "####", without thousands separators; None if there is none."""
    found = _MARKED.search(text)
    return None if found is None else found.group(1).replace(",", "")
