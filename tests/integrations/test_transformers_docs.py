"""docs/transformers.md: its snippets run, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_snippets_run_in_order() -> None:
    scope: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    with torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, PAGE.name, "exec"), scope)
    text = scope["text"]
    assert isinstance(text, torch.Tensor)
    assert text.shape == (2, 48)
