"""The command `sparse-mla`: thin bodies, the work is in the modules they call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bump.commands import register as register_bump
from .cli_common import (
    MOST_IDEAL,
    MOST_SECONDS,
    device_named,
    usage_error,
    writable,
    writable_folder,
    writing,
)
from .evals.commands import app as eval_app

app = typer.Typer(
    help="Sparse MLA attention: check kernels, explain choices, measure, bump, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Sparse MLA attention: check kernels, explain choices, measure, bump, evaluate."""


register_bump(app)
app.add_typer(eval_app, name="eval")


@app.command()
def check(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend of this library; repeatable. Default: all that run here."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, or NAME@PATH of an environment: a provider (`sparse-mla providers`) or a "
            "module with FlashMLA's function names; repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of all inputs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only the short set of cases.")] = False,
    case: Annotated[
        str | None,
        typer.Option(help="Only cases: how a part of the name begins, or a pattern (*, ?)."),
    ] = None,
    random: Annotated[int, typer.Option(min=0, help="Add this many random cases.")] = 0,
    limit: Annotated[
        float,
        typer.Option(
            min=1.0,
            max=MOST_IDEAL,
            help="Case budget in multiples of ideal rounding (docs/accuracy).",
        ),
    ] = 1.7,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report to this file.")] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Each in a process of its own, as NAME@PATH always.")
    ] = False,
    time_limit: Annotated[
        float,
        typer.Option(min=1.0, max=MOST_SECONDS, help="Seconds for a call in a process of its own."),
    ] = 300.0,
    faults: Annotated[
        bool, typer.Option("--faults", help="Put the fault library on trial instead.")
    ] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Show the cases and stop.")] = False,
) -> None:
    """Run the case catalogue: is every answer within the error that arithmetic allows?

    Exit status: 0 if nothing failed, crashed or hung and something passed, 1 if not, 2 for a usage
    error or a file that cannot be written.
    """
    import torch

    from .accuracy import check as checking
    from .accuracy import terminal
    from .accuracy.cases import CASES

    out = terminal.console()
    try:
        cases = checking.choose_cases(CASES, case, quick, random, seed)
        if list_cases:
            terminal.print_cases(cases, out)
            return
        where = device_named(device)
        if faults:
            from .accuracy.fault_gate import run_faults

            raise typer.Exit(run_faults(cases, seed=seed, device=where, limit=limit))
        chosen = checking.choose_implementations(
            backend or [], provider or [], where, isolate, time_limit
        )
    except ValueError as error:
        usage_error(error)
    writable(json, "--json")
    writable(html, "--html")
    with torch.no_grad(), terminal.progress(len(cases) * len(chosen)) as step:
        report = checking.run_check(
            chosen, cases, seed=seed, device=where, limit=limit, on_result=step
        )
    terminal.print_report(report, out)
    if json is not None:
        with writing(json):
            report.save(json)
    if html is not None:
        from .accuracy.report import write_html

        with writing(html):
            write_html(report, html)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A file that check or compare --json wrote.")],
    html: Annotated[Path, typer.Argument(help="The report to write.")],
    lang: Annotated[str, typer.Option(help="Of a comparison's report: en or zh.")] = "en",
) -> None:
    """Draw the report of a saved run, or of a saved comparison: one self-contained file."""
    from .accuracy.check import load_report
    from .accuracy.report import write_html
    from .bump.report import redraw
    from .bump.words import Words

    try:
        Words(lang)
        made = redraw(results, html, lang)
        if made is not None:
            typer.echo(f"{made}; report: {html}")
            return
        loaded = load_report(results)
    except ValueError as error:
        usage_error(error)
    except OSError as error:
        usage_error(f"{results}: {error.strerror}")
    writable(html, "HTML")
    with writing(html):
        write_html(loaded, html)
    typer.echo(f"{loaded.summary}; report: {html}")


@app.command()
def explain(
    op: Annotated[str, typer.Option(help="decode, prefill, dense_decode or kv_write.")] = "decode",
    heads: Annotated[int, typer.Option(min=1, max=128, help="Query heads.")] = 64,
    layout: Annotated[str, typer.Option(help="The cache's layout.")] = "v32_fp8",
    tokens: Annotated[int, typer.Option(min=1, help="Query tokens, b * s_q.")] = 128,
    topk: Annotated[int, typer.Option(min=0, help="Length of the index lists.")] = 2048,
    extra_layout: Annotated[
        str | None, typer.Option(help="The extra cache's layout. Default: there is none.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Ask about cpu or sm_90 and the like. Default: this machine.")
    ] = None,
) -> None:
    """Say which kernel runs a call on this machine, and why the others do not."""
    from . import arch as arches
    from . import dispatch
    from .accuracy.terminal import console
    from .explain import print_answers
    from .kv_layout import get_layout

    try:
        extra = get_layout(extra_layout).name if extra_layout else ""
        if extra and op != "decode":
            raise ValueError(f"--extra-layout is {extra!r}, {op} takes no extra cache")
        name = get_layout(layout).name
        request = dispatch.Request(op, name, heads, tokens, topk, extra_layout=extra)
        machine = arches.parse(arch) if arch else arches.of(arches.default_device())
        answers = dispatch.explain(request, machine)
    except ValueError as error:
        usage_error(error)
    print_answers(request, machine, answers, console())
    raise typer.Exit(0 if any(answer.ok for answer in answers) else 1)


@app.command()
def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only workloads with these words, as 'decode b=128 h=64'; repeatable."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend of this library; repeatable. Default: all that run here."),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure flash_mla too, if it is installed.")] = True,
    samples: Annotated[int, typer.Option(min=3, help="Timed calls per provider.")] = 20,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Append the rows to this .jsonl file.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Append the rows to <gpu>/<date>.jsonl in this folder.")
    ] = None,
    list_workloads: Annotated[
        bool, typer.Option("--list", help="Show the workloads and stop.")
    ] = False,
) -> None:
    """Check answers, then time them: our backends beside flash_mla, and the goals they have.

    Exit status: 0, 1 if an answer was wrong (it is not timed) or none of ours was timed, 2 for a
    usage error or a file that cannot be written.
    """
    import torch

    from .accuracy.terminal import console
    from .bench import rows as row_files
    from .bench.run import run, workloads_for
    from .bench.table import print_result
    from .bench.workloads import choose

    try:
        where = device_named(device)
        if list_workloads:
            for workload in choose(workloads_for(where), only or []):
                typer.echo(workload.label)
            return
        writable(rows, "--rows")
        writable_folder(results, "--results")
        with torch.no_grad():
            result = run(
                where,
                samples,
                lambda label: typer.echo(label, err=True),
                only=only or [],
                backends=backend or [],
                peers=peers,
            )
    except ValueError as error:
        usage_error(error)
    print_result(result.rows, result.missing, console())
    if rows is not None:
        with writing(rows):
            row_files.append(rows, result.rows)
    if results is not None and result.rows:
        file = row_files.results_file(results, result.machine)
        with writing(file):
            row_files.append(file, result.rows)
    timed = any(row.backend is not None for row in result.rows)
    raise typer.Exit(0 if timed and not result.wrong else 1)


if __name__ == "__main__":
    app()
