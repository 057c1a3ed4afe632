"""The table of docs/conformance.md, from the runner's committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path("docs") / "reports" / "conformance"

_COLUMNS = (
    "suite", "commit", "cases", "run", "passed", "failed", "refused", "with timing", "machine",
    "ours at", "date",
)  # fmt: skip


def load(root: Path) -> list[dict[str, Any]]:
    """The committed results, a file's suites one after the other."""
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        result = json.loads(path.read_text())
        for name, suite in result["suites"].items():
            found.append({"name": name, "machine": result["machine"], **suite})
    return found


def table(results: list[dict[str, Any]]) -> str:
    """One line a suite and result."""
    if not results:
        return "Nothing has been run yet.\n"
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for result in results:
        count, machine = result["count"], result["machine"]
        run = count["passed"] + count["failed"] + count["refused"]
        cells = (
            f"`{result['name']}`: {result['peer']}, {result['file']}",
            result["commit"],
            run + count["skipped"] + count["left_out"],
            run,
            count["passed"],
            count["failed"],
            count["refused"],
            count["timed"],
            machine["gpu"],
            machine["commit"][:10],
            machine["date"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
