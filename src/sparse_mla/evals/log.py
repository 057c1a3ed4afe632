"""What an evaluation leaves: one JSON object per line, the run first, then every problem."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .shares import Share, wilson

FORMAT = "sparse_mla.eval/1"


@dataclass(frozen=True)
class Answered:
    """One problem and what the model made of it.

    Attributes:
        number: the problem's place in its set.
        given: the number that the model answered with; None if it gave none.
    """

    number: int
    question: str
    target: str
    given: str | None
    right: bool
    response: str


@dataclass
class Log:
    """A run. `about` holds task, model, layout, fault, limit, versions, seconds."""

    about: dict[str, Any]
    answered: list[Answered] = field(default_factory=list)

    @property
    def share(self) -> Share:
        return wilson(sum(one.right for one in self.answered), len(self.answered))

    @property
    def name(self) -> str:
        fault = self.about.get("fault")
        return f"{self.about.get('layout')}" + (f" with {fault}" if fault else "")

    def save(self, path: Path) -> None:
        lines = [{"format": FORMAT, **self.about}, *map(asdict, self.answered)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")


def load_log(path: Path) -> Log:
    """Read what `Log.save` wrote; ValueError for anything else."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON lines: {error}") from error
    kind = lines[0].get("format") if lines and isinstance(lines[0], dict) else None
    if kind != FORMAT:
        raise ValueError(f"{path} has format {kind!r}, expected {FORMAT!r}")
    try:
        answered = [Answered(**line) for line in lines[1:]]
    except TypeError as error:
        raise ValueError(f"{path}: a line is not a problem's: {error}") from error
    if not answered:
        raise ValueError(f"{path} holds no problems")
    about = {key: value for key, value in lines[0].items() if key != "format"}
    return Log(about, answered)
