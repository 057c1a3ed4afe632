"""Ask a model the problems of a task, through lm-eval."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .log import Answered, Log
from .problems import prompt_of, read_answer
from .tasks import ProblemSet, lm_eval_task

# (the problem's place among those asked, its answer, whether the final number is right)
OnAnswer = Callable[[int, str, bool], None]


def ask(
    model: Any,
    tokenizer: Any,
    problems: ProblemSet,
    *,
    batch: int = 16,
    on_answer: OnAnswer | None = None,
    about: dict[str, Any] | None = None,
) -> Log:
    """Answers to all problems, judged by lm-eval's exact_match.

    Args:
        batch: problems at a time.
        on_answer: called as answers come in.
        about: more facts for the log.
    """
    try:
        import lm_eval

        from .lm import Continued
    except ImportError as error:
        raise ValueError(f"lm-eval is missing: pip install 'sparse-mla[eval]' ({error})") from error
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def each(number: int, text: str) -> None:
        if on_answer is not None:
            on_answer(number, text, read_answer(text) == problems.asked[number].target)

    _check_length(model, tokenizer, problems)
    begun = time.monotonic()
    # Not simple_evaluate: it reads all of lm-eval's task files first, ten seconds on a CPU.
    with _no_second_bar():
        found = lm_eval.evaluate(
            Continued(model, tokenizer, batch, each),
            {problems.name: lm_eval_task(problems)},
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
    samples = sorted(found["samples"][problems.name], key=lambda sample: sample["doc_id"])
    answered = []
    for sample in samples:
        response = sample["resps"][0][0]
        problem = problems.asked[sample["doc_id"]]
        answered.append(
            Answered(
                number=problems.first + sample["doc_id"],
                question=problem.question,
                target=problem.target,
                given=read_answer(response),
                right=bool(sample["exact_match"]),
                response=response,
            )
        )
    facts = {
        "task": problems.name,
        "problems": len(answered),
        "shots": len(problems.shots),
        "seconds": round(time.monotonic() - begun, 1),
        "lm_eval": lm_eval.__version__,
        "torch": torch.__version__,
    }
    return Log({**(about or {}), **facts}, answered)


def _check_length(model: Any, tokenizer: Any, problems: ProblemSet) -> None:
    """ValueError if a prompt and its answer may pass the positions that the model has."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None:
        return
    prompt = max((prompt_of(problems.shots, p.question) for p in problems.asked), key=len)
    need = len(tokenizer(prompt).input_ids) + problems.longest
    if need > most:
        raise ValueError(
            f"the longest prompt of {problems.name!r} and its answer take {need} tokens, the model "
            f"has max_position_embeddings {most}"
        )


@contextmanager
def _no_second_bar() -> Iterator[None]:
    """lm-eval draws a bar over the building of prompts, a second's work, and offers no switch."""
    import lm_eval.api.task as module

    before = module.tqdm
    module.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        module.tqdm = before
