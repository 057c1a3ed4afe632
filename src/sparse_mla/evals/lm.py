"""lm-eval's view of a model that `generate.continue_prompts` runs. Needs lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM

from .generate import continue_prompts


class Continued(LM):
    """Only continuing is offered; `each` gets a request's problem number and its answer."""

    def __init__(
        self, model: Any, tokenizer: Any, batch: int, each: Callable[[int, str], None]
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch, self.each = model, tokenizer, batch, each

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        settings = requests[0].args[1]
        return continue_prompts(
            self.model,
            self.tokenizer,
            [request.args[0] for request in requests],
            until=settings["until"],
            longest=settings["max_gen_toks"],
            batch=self.batch,
            each=lambda place, text: self.each(requests[place].doc_id, text),
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("these tasks ask for answers, not for likelihoods")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("these tasks ask for answers, not for likelihoods")
