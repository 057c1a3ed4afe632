"""Greedy continuation of many prompts that begin alike: the common part is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Each = Callable[[int, str], None]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Leading tokens that all rows share, leaving each at least one of its own."""
    # The first and the last in order differ where any two do.
    first, last = min(map(list, rows)), max(map(list, rows))
    most = min(len(row) for row in rows) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return same


def prefilled(model: Any, tokens: Sequence[int], rows: int) -> Any:
    """A cache that holds the tokens, once per row; None where there are none."""
    if not tokens:
        return None
    ids = torch.tensor([list(tokens)], device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    return cache


def padded(
    prefix: Sequence[int], rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask: the prefix, padding, then what each row has of its own."""
    width = max(len(row) for row in rows) - len(prefix)
    tokens, mask = [], []
    for row in rows:
        own = list(row[len(prefix) :])
        gap = width - len(own)
        tokens.append([*prefix, *([pad] * gap), *own])
        mask.append([1] * len(prefix) + [0] * gap + [1] * len(own))
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


class StopAt:
    """Stops a row once its text holds one of the strings; looks at the last tokens alone."""

    window = 24

    def __init__(self, tokenizer: Any, strings: Sequence[str], start: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, strings, start
        self.done: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.done is None:
            self.done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        first = max(self.start, input_ids.shape[1] - self.window)
        texts = self.tokenizer.batch_decode(input_ids[:, first:])
        found = [any(string in text for string in self.strings) for text in texts]
        self.done |= torch.tensor(found, device=input_ids.device)
        return self.done


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return min((text.split(string, 1)[0] for string in strings), key=len, default=text)


@torch.no_grad()
def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    until: Sequence[str],
    longest: int,
    batch: int = 16,
    each: Each | None = None,
) -> list[str]:
    """What the model continues each prompt with, greedily, up to one of the strings.

    Args:
        batch: prompts at a time.
        each: called with a prompt's number and answer, in the order in which they are done.
    """
    from transformers import StoppingCriteriaList

    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    answers = [""] * len(rows)
    # Rows of similar length, so that little is padded.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    shared = rows[0][: common_prefix(rows)] if len(rows) > 1 else []
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        tokens, mask = padded(shared, [rows[i] for i in chosen], pad, model.device)
        stop = StopAt(tokenizer, until, tokens.shape[1])
        made = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=prefilled(model, shared, len(chosen)),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        texts = tokenizer.batch_decode(made[:, tokens.shape[1] :], skip_special_tokens=True)
        for number, text in zip(chosen, texts, strict=True):
            answers[number] = cut(text, until)
            if each is not None:
                each(number, answers[number])
    return answers
