"""Tables made from rows: README's and the documentation's, and what `sparse-mla bench` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import arch, dispatch
from ..accuracy.cases_layouts import PAIRS
from ..compat import conformance_table
from ..kv_layout import LAYOUTS
from .rows import Row, read
from .run import Missing
from .workloads import GOALS, HEADLINES, Goal, goal_of

BASELINES = ("flash_mla", "torch:gather_einsum", "torch:copy")
# The version that the support table speaks of: the one that the H200's rows were measured with.
SUPPORT_TRITON = "3.6.0"
# Columns of the terminal's table where there is no terminal to ask.
PLAIN_WIDTH = 155


@dataclass(frozen=True)
class Line:
    """One of our measurements beside the peer of the same run, if there is one."""

    ours: Row
    peer: Row | None

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.peer.p50_us / self.ours.p50_us

    @property
    def goal(self) -> Goal | None:
        goal = goal_of(self.ours.gpu, self.ours.workload, self.ours.backend or "")
        if goal is None or self.peer is None or self.peer.provider != goal.peer:
            return None
        return goal

    @property
    def verdict(self) -> str:
        """ "met", or what is not: time, error, gain; empty without a goal."""
        goal, ratio = self.goal, self.ratio
        if goal is None or ratio is None:
            return ""
        failed = []
        if round(ratio, 2) < goal.ratio:
            failed.append("time")
        if goal.error is not None and round(self.ours.multiple, 2) > goal.error:
            failed.append("error")
        if goal.gain is not None and abs(self.ours.gain) > goal.gain:
            failed.append("gain")
        return "not met: " + ", ".join(failed) if failed else "met"


def lines(rows: Iterable[Row]) -> list[Line]:
    """Our newest row of each machine, workload and backend, with the baseline of its own run.

    Later rows are newer. Sorted by machine, then as the workloads come first.
    """
    rows = list(rows)
    peers = {(r.run, r.workload): r for r in rows if r.provider in BASELINES}
    newest: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.backend is not None:
            newest[row.gpu, row.workload, row.backend] = row
    return [Line(row, peers.get((row.run, row.workload))) for row in newest.values()]


def by_machine(found: Sequence[Line]) -> dict[str, list[Line]]:
    machines = dict.fromkeys(line.ours.gpu for line in found)
    return {gpu: [line for line in found if line.ours.gpu == gpu] for gpu in machines}


def _measured_with(found: Sequence[Line]) -> str:
    """Versions, commits and dates behind the lines."""
    first = found[0].ours
    commits = ", ".join(dict.fromkeys(line.ours.commit[:10] for line in found))
    dates = ", ".join(dict.fromkeys(line.ours.date for line in found))
    return (
        f"**{first.gpu}** (driver {first.driver}, torch {first.torch}, triton {first.triton}, "
        f"commit {commits}, {dates})"
    )


_COLUMNS = (
    "op", "cache", "b", "s_q", "heads", "topk", "s_kv", "backend", "time (p20-p80) us",
    "error / ideal", "gain", "peer", "its time (p20-p80) us", "its error / ideal",
    "peer's time / ours",
)  # fmt: skip


def _cells(line: Line) -> list[str]:
    ours, peer = line.ours, line.peer
    shape = (ours.op, ours.layout, ours.b, ours.s_q, ours.h_q, ours.topk, ours.s_kv)
    cells = [str(value) for value in shape]
    cells += [str(ours.backend), spread(ours), f"{ours.multiple:.2f}", f"{ours.gain:+.0e}"]
    if peer is None or line.ratio is None:
        return [*cells, "", "", "", ""]
    return [*cells, peer.provider, spread(peer), f"{peer.multiple:.2f}", f"{line.ratio:.2f}"]


def spread(row: Row) -> str:
    """Median and p20-p80, microseconds, with a decimal where it says something."""
    digits = 1 if row.p50_us < 100 else 0
    return f"{row.p50_us:.{digits}f} ({row.p20_us:.{digits}f}-{row.p80_us:.{digits}f})"


def _markdown(columns: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    parts = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    parts += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(parts)


def measurements(rows: Iterable[Row]) -> str:
    """Every line, one table a machine."""
    parts = []
    for found in by_machine(lines(rows)).values():
        parts += [_measured_with(found), "", _markdown(_COLUMNS, map(_cells, found)), ""]
    return "\n".join(parts).rstrip() + "\n"


def headlines(rows: Iterable[Row]) -> str:
    """The workloads of `HEADLINES`, each with the backend that runs by default."""
    order = [b.name for b in dispatch.backends_of("decode")]
    columns = (
        "workload", "backend", "time us", "error / ideal", "peer", "its time us",
        "its error / ideal", "peer's time / ours",
    )  # fmt: skip
    parts = []
    for found in by_machine(lines(rows)).values():
        chosen = []
        for workload in HEADLINES:
            same = [line for line in found if line.ours.workload == workload]
            if same:
                chosen.append(min(same, key=lambda line: order.index(str(line.ours.backend))))
        if not chosen:
            continue
        body = []
        for line in chosen:
            ours, peer = line.ours, line.peer
            cells = [ours.workload.label, str(ours.backend), f"{ours.p50_us:.0f}"]
            cells.append(f"{ours.multiple:.2f}")
            if peer is None or line.ratio is None:
                cells += ["", "", "", ""]
            else:
                cells += [peer.provider, f"{peer.p50_us:.0f}", f"{peer.multiple:.2f}"]
                cells.append(f"**{line.ratio:.2f}**")
            body.append(cells)
        parts += [_measured_with(chosen), "", _markdown(columns, body), ""]
    return "\n".join(parts).rstrip() + "\n"


def goals(rows: Iterable[Row]) -> str:
    """Every goal against the newest rows: ratio and error, met or not, or not measured."""
    columns = (
        "machine", "backend", "workload", "peer", "its time us", "ours", "ratio", "goal",
        "error / ideal", "goal", "gain", "",
    )  # fmt: skip
    found = lines(rows)
    body = []
    for goal in GOALS:
        limit = "" if goal.error is None else f"≤ {goal.error:.2f}"
        head = [goal.machine, goal.backend, goal.workload.label, goal.peer]
        same = [line for line in found if line.goal == goal]
        if not same:
            body.append([*head, "", "", "", f"≥ {goal.ratio:.2f}", "", limit, "", "not measured"])
        for line in same:
            ours, peer, ratio = line.ours, line.peer, line.ratio
            if peer is None or ratio is None:
                raise ValueError(f"a line with a goal has no peer: {ours}")
            body.append(
                [
                    *head,
                    spread(peer),
                    spread(ours),
                    f"{ratio:.2f}",
                    f"≥ {goal.ratio:.2f}",
                    f"{ours.multiple:.2f}",
                    limit,
                    f"{ours.gain:+.0e}",
                    line.verdict,
                ]
            )
    return _markdown(columns, body) + "\n"


def print_result(rows: Sequence[Row], missing: Sequence[Missing], console: Console) -> None:
    """What a run measured, first what has a goal, and what was not timed and why."""
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    shown = lines(rows)
    aims = [line for goal in GOALS for line in shown if line.goal == goal]
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="median (p20-p80); error in multiples of ideal rounding; topk 2048, decode with "
        "s_q 1 and prefill with 4096 where nothing else is said",
    )
    for name in ("workload", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("peer us", "ours us", "ratio", "goal", "error", "peer's", "gain"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("")
    for line in aims:
        table.add_row(*_terminal_cells(line), style=None if line.verdict == "met" else "red")
    table.add_section()
    for line in shown:
        if line.goal is None:
            table.add_row(*_terminal_cells(line))
    console.print(table)
    if aims:
        met = sum(line.verdict == "met" for line in aims)
        console.print(f"{met} of {len(aims)} goals met")
    for item in missing:
        word = "WRONG" if item.wrong else "refused"
        console.print(
            f"{word}: {item.provider}, {item.workload.label}: {item.reason}", markup=False
        )


def _terminal_cells(line: Line) -> list[str]:
    ours, peer, goal = line.ours, line.peer, line.goal
    usual = ("topk=2048", "s_q=1", "s_q=4096")
    return [
        " ".join(word for word in ours.workload.label.split() if word not in usual),
        str(ours.backend),
        "-" if peer is None else spread(peer),
        spread(ours),
        "-" if line.ratio is None else f"{line.ratio:.2f}",
        "" if goal is None else f"{goal.ratio:.2f}",
        f"{ours.multiple:.2f}",
        "-" if peer is None else f"{peer.multiple:.2f}",
        f"{ours.gain:+.0e}",
        line.verdict,
    ]


def result_files(root: Path) -> list[Path]:
    """The committed row files below benchmarks/results, in a stable order."""
    return sorted((root / "benchmarks" / "results").glob("*/*.jsonl"))


SUPPORT_MACHINES = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def support() -> str:
    """Which backends run what where, best first, as the backends themselves answer."""
    machines = [replace(arch.parse(name), triton=SUPPORT_TRITON) for name in SUPPORT_MACHINES]
    calls = [
        (op, f"`{layout.name}`", dispatch.Request(op, layout.name, 64))
        for op in dispatch.OPS
        for layout in LAYOUTS.values()
        if op == "kv_write" or not layout.extra_only
    ]
    calls += [
        (
            "decode",
            f"`{main}` + `{extra}`",
            dispatch.Request("decode", main, 64, extra_layout=extra),
        )
        for main, extra in PAIRS
    ]
    # Caches with the same answers share a line.
    lines: dict[tuple[str, ...], list[str]] = {}
    for op, caches, request in calls:
        cells = [op]
        for machine in machines:
            running = [a.backend for a in dispatch.explain(request, machine) if a.ok]
            cells.append(", ".join(running) or "no")
        lines.setdefault(tuple(cells), []).append(caches)
    body = [[op, ", ".join(caches), *cells] for (op, *cells), caches in lines.items()]
    columns = ("op", "cache", *("CPU" if n == "cpu" else n for n in SUPPORT_MACHINES))
    return _markdown(columns, body) + "\n"


def replace_part(text: str, name: str, part: str) -> str:
    """The text with what stands between the markers of a generated part made anew."""
    begin = f"<!-- {name}: generated by `python -m sparse_mla.bench.table`, do not edit -->"
    end = f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the text needs the markers {begin!r} and {end!r} exactly once each")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{part}\n{end}{tail}"


def all_rows(root: Path) -> list[Row]:
    """The rows of every committed file, older files first."""
    return [row for path in result_files(root) for row in read(path)]


def pages(root: Path) -> dict[Path, str]:
    """The pages with generated parts, and their texts made anew from the rows below `root`."""
    rows = all_rows(root)
    readme, docs = root / "README.md", root / "docs"
    with_support = replace_part(readme.read_text(), "support", support())
    conformance = docs / "conformance.md"
    counts = conformance_table.table(conformance_table.load(root))
    performance, all_of_them = docs / "performance.md", docs / "measurements.md"
    return {
        readme: replace_part(with_support, "performance", headlines(rows)),
        conformance: replace_part(conformance.read_text(), "conformance", counts),
        performance: replace_part(performance.read_text(), "goals", goals(rows)),
        all_of_them: replace_part(all_of_them.read_text(), "measurements", measurements(rows)),
    }


def main() -> None:
    """Rewrite the generated parts of the checkout in the current folder, and its figures."""
    from .figures import write_all

    root = Path.cwd()
    for path, text in pages(root).items():
        path.write_text(text)
    write_all(all_rows(root), root / "docs" / "figures")


if __name__ == "__main__":
    main()
