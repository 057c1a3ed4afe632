"""Ask a model the problems of a task, through lm-eval."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from .generate import continue_prompts
from .log import Answered, Log
from .problems import read_answer
from .tasks import ProblemSet, lm_eval_task

# (problem's number, its answer, whether the final number is right)
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
    lm_eval, LM = _lm_eval()

    class Continued(LM):
        """lm-eval's view of the model; only continuing is offered."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            settings = requests[0].args[1]

            def each(number: int, text: str) -> None:
                if on_answer is not None:
                    doc = requests[number].doc_id
                    right = read_answer(text) == problems.asked[doc].target
                    on_answer(doc, text, right)

            return continue_prompts(
                model,
                tokenizer,
                [request.args[0] for request in requests],
                until=settings["until"],
                longest=settings["max_gen_toks"],
                batch=batch,
                each=each,
            )

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("these tasks ask for answers, not for likelihoods")

        loglikelihood_rolling = loglikelihood

    begun = time.monotonic()
    # Not simple_evaluate: it reads all of lm-eval's task files first, ten seconds on a CPU.
    found = lm_eval.evaluate(
        Continued(),
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
                number=sample["doc_id"],
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


def _lm_eval() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ValueError(f"lm-eval is missing: pip install 'sparse-mla[eval]' ({error})") from error
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval, LM
