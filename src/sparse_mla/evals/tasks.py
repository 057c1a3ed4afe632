"""Problem sets, and the lm-eval task that asks them: the generated problems, and GSM8K."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .problems import Problem, fewshot, held_out, read_answer
from .problems.problem import END

GENERATED, GSM8K = "problems", "gsm8k"
TASKS = (GENERATED, GSM8K)

GSM8K_HUB = "openai/gsm8k"
GSM8K_SHOTS = 5
GSM8K_TOKENS = 512
# The longest generated answer has 99.
GENERATED_TOKENS = 128


@dataclass(frozen=True)
class ProblemSet:
    """Problems with one few-shot prompt.

    Attributes:
        name: the task's name, as logs keep it.
        shots: worked problems that stand before every question.
        asked: the problems, in the task's order.
        longest: tokens an answer may have.
        first: the number of the first problem; numbers count through the whole task.
    """

    name: str
    shots: list[Problem]
    asked: list[Problem]
    longest: int
    first: int = 0


def problem_set(
    task: str, data: str | None = None, limit: int | None = None, start: int = 0
) -> ProblemSet:
    """The problems of a task.

    Args:
        task: "problems" (generated, docs/tiny-model.md) or "gsm8k".
        data: for gsm8k, a folder with train.jsonl and test.jsonl, or a hub id.
        limit: only that many problems; None for all.
        start: the number of the first one.

    Raises:
        ValueError: no such task, a limit below 1, no problem of that number, files that are missing
            or not GSM8K's form.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, allowed: {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, must be at least 1")
    if task == GENERATED:
        if data is not None:
            raise ValueError(f"data is {data!r}, the generated problems need none")
        shots, longest, every = fewshot(), GENERATED_TOKENS, held_out()
    else:
        train, every = _gsm8k(data or GSM8K_HUB)
        shots, longest = train[:GSM8K_SHOTS], GSM8K_TOKENS
    if not 0 <= start < len(every):
        raise ValueError(f"start is {start}, must be one of the numbers 0 to {len(every) - 1}")
    asked = every[start : None if limit is None else start + limit]
    return ProblemSet(task, shots, asked, longest, start)


def gsm8k_texts(data: str, limit: int) -> list[str]:
    """GSM8K's first test problems with their answers, each one text.

    Raises:
        ValueError: as `problem_set`.
    """
    _, test = _gsm8k(data)
    return [f"Question: {p.question}\nAnswer: {p.answer}" for p in test[:limit]]


def _gsm8k(data: str) -> tuple[list[Problem], list[Problem]]:
    """The training and the test side."""
    folder = Path(data)
    if folder.is_dir():
        return _read(folder / "train.jsonl"), _read(folder / "test.jsonl")
    if folder.exists() or data.startswith((".", "/", "~")):
        raise ValueError(f"data is {data!r}, must be a folder with train.jsonl and test.jsonl")
    try:
        import datasets

        loaded = datasets.load_dataset(data, "main")
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ValueError(f"data {data!r} cannot be loaded from the hub: {error}") from error
    sides = [[_problem(row, data) for row in loaded[side]] for side in ("train", "test")]
    return sides[0], sides[1]


def _read(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        found.append(_problem(row, f"{path}, line {number}"))
    return found


def _problem(row: Any, where: str) -> Problem:
    texts = isinstance(row, dict) and [row.get("question"), row.get("answer")]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} has no 'question' and 'answer'")
    if read_answer(row["answer"]) is None:
        raise ValueError(f"{where}: the answer has no line '#### number'")
    return Problem(row["question"], row["answer"])


def lm_eval_task(problems: ProblemSet) -> Any:
    """The set as a task of lm-eval, scored like its own gsm8k with strict-match."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def rows(side: list[Problem]) -> Any:
        return datasets.Dataset.from_list(
            [{"question": problem.question, "answer": problem.answer} for problem in side]
        )

    return ConfigurableTask(
        config={
            "task": problems.name,
            "custom_dataset": lambda **_: {
                "train": rows(problems.shots),
                "test": rows(problems.asked),
            },
            "output_type": "generate_until",
            "training_split": "train",
            "fewshot_split": "train",
            "test_split": "test",
            "num_fewshot": len(problems.shots),
            "fewshot_config": {"sampler": "first_n"},
            "fewshot_delimiter": END,
            "target_delimiter": " ",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {
                "until": [END, "Question:"],
                "do_sample": False,
                "max_gen_toks": problems.longest,
            },
            "filter_list": [
                {
                    "name": "strict-match",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "ignore_case": True,
                    "ignore_punctuation": False,
                    "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"],
                }
            ],
            "metadata": {"version": 1},
        }
    )
