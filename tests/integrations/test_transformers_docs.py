"""docs/transformers.md: its snippets run, in order."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra [transformers])")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "transformers.md"


def test_the_table_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "bench_transformers.py"))
    assert tool["updated"](PAGE.read_text()) == PAGE.read_text(), (
        "run python tools/bench_transformers.py --write"
    )


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
