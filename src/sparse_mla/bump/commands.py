"""The commands of a bump: thin bodies, the work is in the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cli_common import MOST_IDEAL, MOST_SECONDS, device_named, usage_error, writable

Case = Annotated[
    str | None, typer.Option(help="Only cases: how a part of the name begins, or a pattern (*, ?).")
]
Quick = Annotated[bool, typer.Option("--quick", help="Only the short set of cases.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of all inputs.")]
Limit = Annotated[
    float,
    typer.Option(min=1.0, max=MOST_IDEAL, help="Case budget in multiples of ideal rounding."),
]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one.")]
TimeLimit = Annotated[
    float, typer.Option(min=1.0, max=MOST_SECONDS, help="Seconds for one call of a provider.")
]
Lock = Annotated[Path, typer.Option(help="The lock file.")]
Checkout = Annotated[Path | None, typer.Option(help="A local clone of the provider's sources.")]
Report = Annotated[
    Path | None, typer.Option(help="Write the bump report to this .html or .md file.")
]
Language = Annotated[str, typer.Option(help="The report's language: en or zh.")]
Why = Annotated[str, typer.Option(help="Why the change is wanted: text or an issue's link.")]
AcceptFault = Annotated[
    str, typer.Option(help="A named fault (docs/faults.md) that may be there, and only that.")
]
Samples = Annotated[int, typer.Option(min=3, help="Timed calls per side and workload.")]


def _one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a user got wrong is one line on standard error and exit status 2."""

    @wraps(command)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except (ValueError, OSError) as error:
            usage_error(" ".join(str(error).split()))

    return wrapper


def _settings(
    case: str | None, quick: bool, seed: int, limit: float, device: str | None, time_limit: float
) -> Any:
    from .trial import Settings

    cases = f"case:{case}" if case else "quick" if quick else "all"
    made = Settings(device_named(device), cases, seed, limit, time_limit)
    made.catalogue()
    return made


def _note(line: str) -> None:
    typer.echo(line, err=True)


@_one_line
def providers(
    name: Annotated[
        list[str] | None, typer.Argument(help="NAME or NAME@PATH; default: all that are known.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the list to this file.")] = None,
    time_limit: TimeLimit = 60.0,
) -> None:
    """List what can be put on trial here: versions, commits, and (ok, reason) per op and layout."""
    import json as json_format

    from ..accuracy.terminal import console
    from .survey import survey
    from .terminal import print_providers

    writable(json, "--json")
    found = survey(name or [], time_limit)
    if json is not None:
        rows = [one.as_json() for one in found]
        json.write_text(json_format.dumps({"format": "sparse_mla.providers/1", "providers": rows}))
    print_providers(found, console())


@_one_line
def compare(
    base: Annotated[str, typer.Argument(help="NAME or NAME@PATH of what is used now.")],
    candidate: Annotated[str, typer.Argument(help="NAME or NAME@PATH of what it would become.")],
    case: Case = None,
    quick: Quick = False,
    seed: Seed = 0,
    limit: Limit = 1.7,
    device: Device = None,
    time_limit: TimeLimit = 300.0,
    speed: Annotated[
        bool | None, typer.Option("--speed/--no-speed", help="Default: where there is a GPU.")
    ] = None,
    samples: Samples = 20,
    workload: Annotated[str, typer.Option(help="Only workloads whose label holds this.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write the comparison to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    report: Report = None,
    lang: Language = "en",
    why: Why = "",
    checkout: Checkout = None,
    base_commit: Annotated[str, typer.Option(help="If the base does not say it.")] = "",
    candidate_commit: Annotated[str, typer.Option(help="If the candidate does not say it.")] = "",
    cmake: Annotated[
        list[Path] | None, typer.Option(help="A CMake file whose weak pins are risks.")
    ] = None,
    requirements: Annotated[
        list[Path] | None, typer.Option(help="A pip file whose weak pins are risks.")
    ] = None,
    submodules: Annotated[
        list[Path] | None, typer.Option(help="A checkout whose submodules are looked at.")
    ] = None,
) -> None:
    """Run two providers on the same inputs and say which is better; docs/bump.md has the rule.

    Exit status: 0 if the candidate is better or the same, 1 if it is worse or nothing could be
    compared, 2 for a usage error.
    """
    from ..accuracy import terminal
    from .report import Context, check_report, write_report
    from .sides import compare_sides
    from .terminal import print_comparison

    settings = _settings(case, quick, seed, limit, device, time_limit)
    for path, option in ((json, "--json"), (junit, "--junit"), (report, "--report")):
        writable(path, option)
    check_report(report, lang)
    context = Context.gather(
        why=why,
        checkout=checkout,
        commits=(base_commit, candidate_commit),
        files={
            "cmake": cmake or [], "requirements": requirements or [], "submodule": submodules or []
        },
    )  # fmt: skip
    with terminal.progress(2 * len(settings.catalogue())) as step:
        made = compare_sides(
            base, candidate, settings, step, speed=speed, samples=samples, only=workload, note=_note
        )
    # What was given goes into the JSON file, for reports drawn from it later.
    if why:
        made.about["why"] = why
    for side, commit in (("base", base_commit), ("candidate", candidate_commit)):
        if commit:
            made.about["sides"][side]["commit"] = commit
    write_outputs(made, json, junit)
    if report is not None:
        write_report(made, context, report, lang)
    print_comparison(made, terminal.console())
    raise typer.Exit(0 if made.ok else 1)


def write_outputs(made: Any, json: Path | None, junit: Path | None) -> None:
    """The comparison as JSON and as JUnit XML, where asked for."""
    import json as json_format

    from .junit import junit as as_xml
    from .report import finite

    if json is not None:
        text = json_format.dumps(finite(made.as_json()), allow_nan=False)
        json.write_text(text + "\n", encoding="utf-8")
    if junit is not None:
        junit.write_text(as_xml(made), encoding="utf-8")


@_one_line
def lock(
    provider: Annotated[str, typer.Argument(help="NAME or NAME@PATH.")],
    lock: Lock = Path("kernels.lock"),
    cmake: Annotated[
        list[Path] | None, typer.Option(help="A CMake file with its FetchContent GIT_TAG.")
    ] = None,
    requirements: Annotated[
        list[Path] | None, typer.Option(help="A pip requirements file that pins it.")
    ] = None,
    submodules: Annotated[
        list[Path] | None, typer.Option(help="A checkout that has it as a submodule.")
    ] = None,
    pin_name: Annotated[str, typer.Option(help="What the build calls it, if not NAME.")] = "",
    url: Annotated[str, typer.Option(help="Its repository, if neither build nor pip says.")] = "",
    accept_fault: AcceptFault = "",
    case: Case = None,
    quick: Quick = False,
    seed: Seed = 0,
    limit: Limit = 1.7,
    device: Device = None,
    time_limit: TimeLimit = 300.0,
) -> None:
    """Put a provider on trial and write its commit and certificate to the lock file.

    Exit status: 0 if it passed and was locked, 1 if it did not pass (nothing is written), 2 for a
    usage error.
    """
    from .verify import NotProven, lock_provider

    settings = _settings(case, quick, seed, limit, device, time_limit)
    writable(lock, "--lock")
    name = pin_name or provider.partition("@")[0]
    files = [("cmake", path, name) for path in cmake or []]
    files += [("requirements", path, name) for path in requirements or []]
    files += [("submodule", path, name) for path in submodules or []]
    try:
        certificate = lock_provider(
            provider, lock, files, settings, url=url, accept_fault=accept_fault
        )
    except NotProven as error:
        typer.echo(f"not locked: {error.args[0]}")
        raise typer.Exit(1) from None
    typer.echo(f"{lock}: {provider} locked: {certificate.summary}")


@_one_line
def verify(
    lock: Lock = Path("kernels.lock"),
    provider: Annotated[
        list[str] | None,
        typer.Option(help="NAME@PATH: where a locked provider lives, if not here; repeatable."),
    ] = None,
    pins_only: Annotated[
        bool, typer.Option("--pins-only", help="Only compare the build's pins; needs no GPU.")
    ] = False,
    device: Device = None,
    time_limit: TimeLimit = 300.0,
) -> None:
    """Compare the build's pins with the lock, run the gate again and compare that too.

    Exit status: 0 if everything agrees, 1 if not, 2 for a usage error.
    """
    from ..accuracy.terminal import console
    from .terminal import print_findings
    from .trial import Settings
    from .verify import verify as verify_lock

    specs = {spec.partition("@")[0]: spec for spec in provider or []}
    settings = Settings(device_named(device), time_limit=time_limit)
    found = verify_lock(lock, specs, settings, pins_only)
    print_findings(found, console())
    raise typer.Exit(0 if all(one.ok for one in found) else 1)


@_one_line
def bump(
    name: Annotated[str, typer.Argument(help="The provider.")],
    to: Annotated[str, typer.Option(help="The full hash of the commit to move to.")],
    cmake: Annotated[Path, typer.Option(help="The CMake file with its FetchContent GIT_TAG.")],
    build: Annotated[
        str,
        typer.Option(
            help="Run in a checkout of a commit; its last line of output is the directory or "
            "environment to import from."
        ),
    ],
    lock: Lock = Path("kernels.lock"),
    pin_name: Annotated[str, typer.Option(help="What CMake calls it, if not NAME.")] = "",
    checkout: Checkout = None,
    accept_fault: AcceptFault = "",
    not_worse: Annotated[
        bool,
        typer.Option("--not-worse", help="Enough if it is not worse than the pinned commit."),
    ] = False,
    report: Report = None,
    lang: Language = "en",
    why: Why = "",
    case: Case = None,
    quick: Quick = False,
    seed: Seed = 0,
    limit: Limit = 1.7,
    device: Device = None,
    time_limit: TimeLimit = 300.0,
) -> None:
    """Build a commit, put it on trial, and move the pin and the lock only if it passed.

    Exit status: 0 if the pin was moved, 1 if the candidate did not pass, 2 for a usage error; on 1
    and 2 pin and lock are as they were.
    """
    from .bump import Request
    from .bump import bump as move
    from .report import Context, check_report, write_report
    from .verify import NotProven

    settings = _settings(case, quick, seed, limit, device, time_limit)
    writable(lock, "--lock")
    writable(cmake, "--cmake")
    writable(report, "--report")
    check_report(report, lang)
    request = Request(name, to, cmake, build, lock, pin_name, checkout, accept_fault, not_worse)
    context = Context.gather(why=why, checkout=checkout, files={"cmake": [cmake]})
    try:
        made = move(request, settings, compare=report is not None)
    except NotProven as error:
        comparison = error.args[1]
        if report is not None and comparison is not None:
            write_report(comparison, context, report, lang)
        typer.echo(f"not bumped: {error.args[0]}")
        raise typer.Exit(1) from None
    if report is not None and made.comparison is not None:
        write_report(made.comparison, context, report, lang)
    certificate = made.certificate
    accepted = f" (accepted: {certificate.accepted})" if certificate.accepted else ""
    typer.echo(f"{cmake}: {made.before} -> {made.after}")
    typer.echo(f"{lock}: {name} locked: {certificate.summary}{accepted}")


@_one_line
def bisect(
    good: Annotated[str, typer.Option(help="A commit where it is right.")],
    bad: Annotated[str, typer.Option(help="A commit where it is wrong, before or after.")],
    checkout: Annotated[Path, typer.Option(help="A clean git checkout of its sources.")],
    build: Annotated[
        str,
        typer.Option(
            help="Run in the checkout at each commit; its last line of output is the directory or "
            "environment to import from. A commit where it fails is skipped."
        ),
    ],
    provider: Annotated[str, typer.Option(help="The provider's name.")] = "flash_mla",
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    case: Case = None,
    quick: Quick = False,
    seed: Seed = 0,
    limit: Limit = 1.7,
    device: Device = None,
    time_limit: TimeLimit = 300.0,
) -> None:
    """Find the commit where the gate's answers turn, with git bisect; run again to go on.

    Exit status: 0 if the commit was found, 1 if skipped commits leave several, 2 for a usage error.
    """
    import json as json_format

    from .bisect import Request
    from .bisect import bisect as search

    settings = _settings(case, quick, seed, limit, device, time_limit)
    writable(json, "--json")
    found = search(Request(provider, good, bad, checkout, build), settings, typer.echo)
    if json is not None:
        json.write_text(json_format.dumps(found.as_json()) + "\n", encoding="utf-8")
    word = "repaired" if found.repaired else "bad"
    if not found.commit:
        typer.echo(f"skipped commits leave {len(found.candidates)} that may be the first {word}:")
        for commit in found.candidates:
            typer.echo(f"  {commit}")
        raise typer.Exit(1)
    typer.echo(f"shown by {found.case}: {found.before} -> {found.after}")
    if found.left:
        typer.echo(f"left: {found.left}")
    about = "gone: " if found.repaired else ""
    typer.echo(f"{about}{found.diagnosis}")
    typer.echo(f"first {word} commit: {found.commit} {found.subject} [{found.fault or 'no name'}]")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (providers, compare, lock, verify, bump, bisect):
        app.command()(command)
