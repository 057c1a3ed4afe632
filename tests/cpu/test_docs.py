"""README and docs: snippets run, generated parts are up to date, links and names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparse_mla.bench import figures, rows, table
from sparse_mla.kv_layout import LAYOUTS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_python_snippets_run_in_order() -> None:
    scope: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    out, lse = scope["out"], scope["lse"]
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    assert out.shape == (2, 1, 16, 512)
    assert torch.isfinite(out).all()
    assert lse.shape == (2, 16, 1)


def test_generated_parts_are_up_to_date() -> None:
    for path, text in table.pages(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python -m sparse_mla.bench.table"


def test_figures_show_the_newest_rows() -> None:
    shown = figures.current(table.all_rows(ROOT), ROOT / "docs" / "figures")
    assert {"decode_time", "roofline", "accuracy"} <= set(shown)
    old = [name for name, current in shown.items() if not current]
    assert not old, f"{old}: run python -m sparse_mla.bench.table"


def test_every_figure_is_shown_and_made_from_data() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    made = figures.current(table.all_rows(ROOT), ROOT / "docs" / "figures")
    files = {path.stem for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert files == set(made)
    for name in files:
        assert f"(figures/{name}.svg)" in text


def test_committed_rows_are_rows_with_both_sides_of_a_ratio() -> None:
    files = table.result_files(ROOT)
    assert files
    for path in files:
        read = rows.read(path)
        assert read
        for line in table.lines(read):
            assert line.peer is not None, (
                f"{path}: {line.ours.workload.label} has no peer in its run"
            )
            assert line.peer.run == line.ours.run
            assert line.ours.multiple <= 1.7


def test_a_foreign_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"run": "x"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: fields are"):
        rows.read(path)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not JSON"):
        rows.read(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_formats_page_has_every_layout() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    for layout in LAYOUTS.values():
        assert f"| `{layout.name}` | {layout.bytes_per_token} |" in text
