"""`sparse-mla bump`: move a pin to a commit that has passed the gate, or change nothing."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accuracy.check import Report
from . import cmake
from .build import built
from .certificate import Certificate, certify
from .compare import Comparison, run_comparison
from .git import is_full_hash, require_full_hash, source_at
from .lock import Entry, Source, lock_text, read_lock, write_all
from .pins import read_text
from .sides import side_of
from .trial import Settings, at, known_fault, refusal, try_provider
from .verify import NotProven, relative_pin


@dataclass(frozen=True)
class Request:
    """What to bump, and when that counts as proven.

    Attributes:
        name: the provider, as in --provider.
        commit: the full hash to move to.
        pin_name: what the CMake file calls it, default the provider's name.
        build: the build command (build.py).
        checkout: a local clone to take commits from, instead of GIT_REPOSITORY.
        accept_fault: a named fault that may be there.
        not_worse: enough if `compare` with the pinned commit says better or same.
    """

    name: str
    commit: str
    cmake_file: Path
    build: str
    lock: Path
    pin_name: str = ""
    checkout: Path | None = None
    accept_fault: str = ""
    not_worse: bool = False

    @property
    def pin(self) -> str:
        return self.pin_name or self.name


@dataclass(frozen=True)
class Bumped:
    """What `bump` did.

    Attributes:
        comparison: with the commit that was pinned, where that was built too.
    """

    before: str
    after: str
    certificate: Certificate
    comparison: Comparison | None


def bump(request: Request, settings: Settings, compare: bool = False) -> Bumped:
    """Build the commit, put it on trial, and only then write the pin and the lock.

    Args:
        compare: build the pinned commit too and compare, for the report.

    Raises:
        ValueError: bad input, or a build that failed.
        NotProven: the candidate did not pass; the comparison, if there is one, is its `args[1]`.
    """
    require_full_hash(request.commit, "--to")
    known_fault(request.accept_fault)
    text = read_text(request.cmake_file)
    fetch = cmake.find_tag(text, request.pin, str(request.cmake_file))
    pinned = fetch.tag.text
    if request.lock.exists():
        read_lock(request.lock)
    pin = relative_pin("cmake", request.cmake_file, fetch.name, request.lock)
    both = compare or request.not_worse
    if both and not is_full_hash(pinned):
        raise ValueError(
            f"{request.cmake_file} pins {pinned!r}, not a full commit hash: there is nothing to "
            "compare with"
        )
    comparison, report = None, None
    with ExitStack() as stack:
        source = stack.enter_context(source_at(fetch.url, request.commit, request.checkout))
        place = stack.enter_context(built(request.build, source, request.commit))
        if both:
            old = stack.enter_context(source_at(fetch.url, pinned, request.checkout))
            old_place = stack.enter_context(built(request.build, old, pinned))
            comparison = _compare(request, settings, (pinned, old_place), place)
            report = Report(
                comparison.about,
                comparison.side("candidate"),
                [comparison.diagnoses[s] for s in ("candidate",) if s in comparison.diagnoses],
            )
        else:
            report, _ = try_provider(at(request.name, place), settings)
    problem = refusal(report, request.accept_fault, settings)
    accepted = f"fault {request.accept_fault}" if request.accept_fault and not report.ok else ""
    if problem is not None and request.not_worse and comparison is not None and comparison.ok:
        problem, accepted = None, f"{comparison.verdict}, compared with {pinned}"
    if problem is not None:
        raise NotProven(problem, comparison)
    certificate = certify(report, settings.cases, settings.device, accepted)
    entry = Entry(
        request.name,
        Source("git", url=fetch.url, commit=request.commit),
        (pin, *_other_pins(request, pin)),
        certificate,
    )
    if read_text(request.cmake_file) != text:
        raise ValueError(f"{request.cmake_file} was changed by something else during the run")
    changed = cmake.replace_tag(text, fetch, request.commit)
    write_all([(request.cmake_file, changed), (request.lock, lock_text(request.lock, entry))])
    return Bumped(pinned, request.commit, certificate, comparison)


def _other_pins(request: Request, pin: Any) -> tuple[Any, ...]:
    """Pins of the same provider that the lock already has: `verify` must go on reading them."""
    if not request.lock.exists():
        return ()
    entries = [e for e in read_lock(request.lock) if e.name == request.name]
    return tuple(p for e in entries for p in e.pins if p != pin)


def _compare(
    request: Request, settings: Settings, old: tuple[str, Path], place: Path
) -> Comparison:
    pinned, old_place = old
    with (
        settings.provider(at(request.name, old_place), "base") as base,
        settings.provider(at(request.name, place), "candidate") as candidate,
    ):
        sides = {
            "base": {**side_of(request.name, base), "commit": pinned},
            "candidate": {**side_of(request.name, candidate), "commit": request.commit},
        }
        return run_comparison(
            base,
            candidate,
            settings.catalogue(),
            seed=settings.seed,
            device=settings.device,
            limit=settings.limit,
            sides=sides,
            on_result=settings.on_result,
        )
