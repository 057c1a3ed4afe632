"""How far a model's predictions move when its attention changes: KL on problems and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .generate import common_prefix, prefilled
from .problems import prompt_of
from .problems.problem import END
from .tasks import ProblemSet

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over problems, with the bootstrap's percentile interval at 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """A model against its reference, on the same texts.

    Attributes:
        kl: KL(reference || model) per token of the problems and their worked answers, in nats.
        agreement: share of those tokens at which both would choose the same one.
        problems, tokens: what was measured on.
        per_problem: each problem's mean KL.
    """

    kl: Interval
    agreement: float
    problems: int
    tokens: int
    per_problem: list[float]


@torch.no_grad()
def predictions(
    model: Any,
    tokenizer: Any,
    problems: ProblemSet,
    limit: int,
    on_problem: Callable[[], None] | None = None,
) -> list[torch.Tensor]:
    """Log-probabilities [tokens, vocabulary] for every token of the first problems and answers.

    The text is given, so that every model is asked about the same tokens. Questions are what a
    trained model is least sure of: an answer's tokens it may know so well that nothing moves them.
    What all prompts share is read once and cropped back to.
    """
    texts = [(prompt_of(problems.shots, p.question), p.answer) for p in problems.asked[:limit]]
    prompts = [tokenizer(prompt).input_ids for prompt, _ in texts]
    wholes = [tokenizer(f"{prompt} {answer}{END}").input_ids for prompt, answer in texts]
    shared = prompts[0][: common_prefix(prompts)] if len(prompts) > 1 else []
    cache = prefilled(model, shared, 1)
    found = []
    for whole in wholes:
        ids = torch.tensor([whole[len(shared) : -1]], device=model.device)
        out = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        found.append(out.logits[0].float().log_softmax(-1).cpu())
        if cache is not None:
            cache.crop(-ids.shape[1])
        if on_problem is not None:
            on_problem()
    return found


def fidelity(reference: Sequence[torch.Tensor], model: Sequence[torch.Tensor]) -> Fidelity:
    """KL and agreement of two models' `predictions` over the same problems."""
    if len(reference) != len(model) or not reference:
        raise ValueError(f"{len(reference)} and {len(model)} problems cannot be compared")
    each, same, tokens = [], 0, 0
    for want, got in zip(reference, model, strict=True):
        kl = (want.exp() * (want - got)).nan_to_num(0.0).sum(-1)
        each.append(float(kl.mean()))
        same += int((want.argmax(-1) == got.argmax(-1)).sum())
        tokens += want.shape[0]
    return Fidelity(bootstrap(each), same / tokens, len(each), tokens, each)


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean of the values; the draws come from a fixed seed."""
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[draws].mean(1), (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))
