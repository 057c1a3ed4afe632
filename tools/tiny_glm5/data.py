"""Training text: problems one after the other, as in a prompt, cut into sequences."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparse_mla.evals.problems import problems
from sparse_mla.evals.problems.problem import END
from sparse_mla.evals.problems.vocabulary import encode


@dataclass(frozen=True)
class Text:
    """What to draw.

    Attributes:
        length: tokens of a sequence; the longest test prompt and its answer must fit.
        batch: sequences of a step.
        steps: steps of a shard; each shard has a seed of its own.
        templates: only these; None for all.
    """

    length: int = 768
    batch: int = 64
    steps: int = 8
    templates: tuple[str, ...] | None = None


def shard(text: Text, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [steps, batch, length + 1] and whether each belongs to an answer, as uint8."""
    count = text.steps * text.batch
    tokens = np.zeros((count, text.length + 1), np.uint16)
    answers = np.zeros((count, text.length + 1), np.uint8)
    source = problems(seed, templates=text.templates)
    for row in range(count):
        ids: list[int] = []
        marks: list[int] = []
        while len(ids) <= text.length:
            problem = next(source)
            asked = encode(f"Question: {problem.question}\nAnswer:")
            given = encode(f" {problem.answer}{END}")
            ids += asked + given
            marks += [0] * len(asked) + [1] * len(given)
        tokens[row], answers[row] = ids[: text.length + 1], marks[: text.length + 1]
    shape = (text.steps, text.batch, -1)
    return tokens.reshape(shape), answers.reshape(shape)


def _shard(job: tuple[Text, int]) -> tuple[np.ndarray, np.ndarray]:
    return shard(*job)


class Batches:
    """The steps from `first` on, in order; drawn in other processes where there are some.

    Start it before CUDA is used: the processes are forked.
    """

    def __init__(self, text: Text, seed: int, first: int, last: int, processes: int) -> None:
        self.text, self.first, self.last, self.processes = text, first, last, processes
        self.jobs = [
            (text, seed * 1_000_003 + number)
            for number in range(first // text.steps, -(-last // text.steps))
        ]
        context = multiprocessing.get_context("fork")
        self.pool = context.Pool(processes) if processes else None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = self.first // self.text.steps * self.text.steps
        for tokens, answers in self._shards():
            for one, marks in zip(tokens, answers, strict=True):
                if self.first <= step < self.last:
                    yield one, marks
                step += 1

    def _shards(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self.pool is None:
            yield from map(_shard, self.jobs)
            return
        # A few shards ahead, not all: the processes would take the cores that launch kernels.
        waiting: deque = deque()
        for job in self.jobs:
            waiting.append(self.pool.apply_async(_shard, (job,)))
            if len(waiting) > 2 * self.processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.terminate()
