"""Prints the table of docs/faults.md, made from the fault library and the case catalogue.

With --write it puts the table into the document.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.faults import FAULTS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- table: tools/faults_table.py -->", "<!-- end of table -->"
MOST_CASES = 3

_REPOSITORIES = {
    "V": "vllm-project/vllm",
    "S": "sgl-project/sglang",
    "F": "flashinfer-ai/flashinfer",
    "M": "deepseek-ai/FlashMLA",
    "A": "ROCm/aiter",
}

# Threads that report a fault of that line; the other lines come from code reading and reviews.
THREADS = {
    1: "S21291 M184",
    4: "S39288 A4245 F941",
    5: "V48366",
    6: "F3395",
    7: "F4401",
    8: "V52109 A4774 F3136",
    10: "V36616",
    12: "V35175 V33638",
    13: "V57094 F5015",
    14: "S33064",
    16: "S30342",
}


def table() -> str:
    """The table as Markdown, one row per fault."""
    rows = [
        "| # | fault | the wrong kernel … | seen in | cases made to show it |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        cells = (str(fault.line), f"`{fault.name}`", fault.about, _seen(fault.line))
        rows.append(f"| {' | '.join(cells)} | {_cases(fault.name)} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """The document with a fresh table between its two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{DOCUMENT.name} must hold {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _seen(line: int) -> str:
    links = []
    for thread in THREADS.get(line, "").split():
        repository, number = _REPOSITORIES[thread[0]], thread[1:]
        links.append(f"[{repository}#{number}](https://github.com/{repository}/issues/{number})")
    return ", ".join(links)


def _cases(name: str) -> str:
    shown = [f"`{case.name}`" for case in CASES if name in case.shows]
    if not shown:
        return "ordinary ones"
    more = len(shown) - MOST_CASES
    return ", ".join(shown[:MOST_CASES]) + (f" and {more} more" if more > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update docs/faults.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
