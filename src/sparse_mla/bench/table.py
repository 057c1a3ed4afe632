"""Tables made from rows: README's performance section, and what `sparse-mla bench` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import arch, dispatch
from ..kv_layout import LAYOUTS
from .rows import Row, read

BASELINES = ("flash_mla", "torch:gather_einsum")


@dataclass(frozen=True)
class Line:
    """One of our measurements beside the peer of the same run, if there is one."""

    ours: Row
    peer: Row | None

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.peer.p50_us / self.ours.p50_us


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each machine, shape and provider the row of the newest run: later lines win."""
    newest: dict[tuple[object, object], str] = {}
    rows = list(rows)
    for row in rows:
        newest[row.gpu, row.shape] = row.run
    return [row for row in rows if newest[row.gpu, row.shape] == row.run]


def lines(rows: Iterable[Row]) -> list[Line]:
    """Pair our rows with the baseline measured in the same run on the same shape."""
    rows = list(rows)
    peers = {(r.run, r.shape): r for r in rows if r.provider in BASELINES}
    return [
        Line(row, peers.get((row.run, row.shape)))
        for row in rows
        if row.provider.startswith("sparse_mla:")
    ]


def markdown(rows: Iterable[Row]) -> str:
    """One table a machine, in the order of the rows."""
    parts = []
    rows = latest(rows)
    for gpu in dict.fromkeys(row.gpu for row in rows):
        of_gpu = [row for row in rows if row.gpu == gpu]
        first = of_gpu[0]
        parts.append(
            f"**{gpu}** (driver {first.driver}, torch {first.torch}, triton {first.triton}, "
            f"commit {first.commit[:10]}, {first.date})\n"
        )
        parts.append(
            "| op | cache | b | s_q | heads | topk | backend | time (p20-p80) us | error / ideal "
            "| peer | its time us | its error / ideal | peer's time / ours |"
        )
        parts.append("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        for line in lines(of_gpu):
            parts.append(_markdown_line(line))
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _markdown_line(line: Line) -> str:
    ours, peer = line.ours, line.peer
    cells = [
        ours.op,
        ours.layout,
        str(ours.b),
        str(ours.s_q),
        str(ours.h_q),
        str(ours.topk),
        ours.provider.removeprefix("sparse_mla:"),
        f"{ours.p50_us:.0f} ({ours.p20_us:.0f}-{ours.p80_us:.0f})",
        f"{ours.rel_l2 / ours.ideal:.2f}",
    ]
    if peer is None:
        cells += ["", "", "", ""]
    else:
        cells += [
            peer.provider,
            f"{peer.p50_us:.0f}",
            f"{peer.rel_l2 / peer.ideal:.2f}",
            f"{peer.p50_us / ours.p50_us:.2f}",
        ]
    return "| " + " | ".join(cells) + " |"


def print_rows(rows: Iterable[Row], console: Console) -> None:
    """The measured rows as a table for the terminal."""
    table = Table(
        "workload", "provider", "p50 us", "p20-p80", "error / ideal", "gain", "x baseline"
    )
    rows = list(rows)
    baselines = {(r.run, r.shape): r for r in rows if r.provider in BASELINES}
    for row in rows:
        base = baselines.get((row.run, row.shape))
        ratio = "" if base is None else f"{base.p50_us / row.p50_us:.2f}"
        table.add_row(
            f"{row.op} {row.layout} b={row.b} s_q={row.s_q} h={row.h_q}",
            row.provider,
            f"{row.p50_us:.1f}",
            f"{row.p20_us:.1f}-{row.p80_us:.1f}",
            f"{row.rel_l2 / row.ideal:.2f}",
            f"{row.gain:+.1e}",
            ratio,
        )
    console.print(table)


def result_files(root: Path) -> list[Path]:
    """The committed row files below benchmarks/results, in a stable order."""
    return sorted((root / "benchmarks" / "results").glob("*/*.jsonl"))


def support() -> str:
    """What runs where, as the backends themselves answer."""
    names = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    parts = [
        "| op | cache | " + " | ".join("CPU" if n == "cpu" else n for n in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for op in dispatch.OPS:
        for layout in LAYOUTS:
            cells = []
            for name in names:
                answers = dispatch.explain(dispatch.Request(op, layout, 64), arch.parse(name))
                cells.append(next((a.backend for a in answers if a.chosen), "no"))
            parts.append(f"| {op} | {layout} | " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


# (machine, provider, peer, b, heads, least ratio of the peer's time to ours), v32_fp8 decode.
GOALS = (
    ("NVIDIA H200", "sparse_mla:triton", "flash_mla", 128, 16, 0.6),
    ("NVIDIA H200", "sparse_mla:triton", "flash_mla", 128, 64, 0.6),
    ("CPU", "sparse_mla:cpu", "torch:gather_einsum", 8, 16, 5.0),
)


def goals(rows: Iterable[Row]) -> str:
    """The goals of this version against the newest rows: ratio, met or not."""
    parts = ["| machine | backend | b | heads | peer | goal | measured | |", "|---" * 8 + "|"]
    measured = lines(latest(rows))
    for gpu, provider, peer, b, heads, least in GOALS:
        for line in measured:
            ours = line.ours
            shape = (ours.op, ours.layout, ours.b, ours.s_q, ours.h_q, ours.topk)
            if (
                line.peer is None
                or (ours.provider, line.peer.provider) != (provider, peer)
                or not ours.gpu.startswith(gpu)
                or shape != ("decode", "v32_fp8", b, 1, heads, 2048)
            ):
                continue
            ratio = line.peer.p50_us / ours.p50_us
            cells = [gpu, provider, str(b), str(heads), peer, f"{least:.2f}", f"{ratio:.2f}"]
            parts.append("| " + " | ".join([*cells, "met" if ratio >= least else "not met"]) + " |")
    return "\n".join(parts) + "\n"


def replace_part(text: str, name: str, part: str) -> str:
    """The text with what stands between the markers of a generated part made anew."""
    begin = f"<!-- {name}: generated by `python -m sparse_mla.bench.table`, do not edit -->"
    end = f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the text needs the markers {begin!r} and {end!r} exactly once each")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{part}\n{end}{tail}"


def pages(root: Path) -> dict[Path, str]:
    """The pages with generated parts, and their texts made anew from the rows below `root`."""
    rows = [row for path in result_files(root) for row in read(path)]
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    with_support = replace_part(readme.read_text(), "support", support())
    return {
        readme: replace_part(with_support, "performance", markdown(rows)),
        performance: replace_part(performance.read_text(), "goals", goals(rows)),
    }


def main() -> None:
    """Rewrite the generated parts of the checkout in the current folder."""
    for path, text in pages(Path.cwd()).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
