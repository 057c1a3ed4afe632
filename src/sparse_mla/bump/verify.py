"""`sparse-mla lock` and `verify`: write the proof down, and hold the build and the kernel to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..accuracy.providers.base import Description
from .certificate import Certificate, certify, worse_than
from .git import is_full_hash
from .lock import Entry, LockedPin, Source, lock_text, read_lock, write_all
from .pins import Pin, read_pin
from .trial import Settings, known_fault, refusal, try_provider


class NotProven(Exception):
    """The gate's answer is no; nothing was changed."""


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` looked at."""

    provider: str
    ok: bool
    text: str


def relative_pin(kind: str, file: Path, name: str, lock: Path) -> LockedPin:
    """A pin as the lock names it; ValueError if the file is not below the lock's folder."""
    folder = lock.absolute().parent.resolve()
    try:
        inside = file.absolute().resolve().relative_to(folder)
    except ValueError:
        raise ValueError(f"{file} does not lie below {folder}, the folder of {lock.name}") from None
    return LockedPin(kind, inside.as_posix(), name)


def source_of(name: str, pins: Sequence[Pin], description: Description, url: str = "") -> Source:
    """What to lock: what the build pins, or else what the installed provider says of itself.

    Raises:
        ValueError: the pins are weak or disagree, with each other or with what is installed.
    """
    origin = description.origin
    for pin in pins:
        if pin.weakness and not pin.weakness.startswith("pinned by version"):
            raise ValueError(f"{pin.where}: {pin.name} is no pin: {pin.weakness}")
    if len({pin.value for pin in pins}) > 1:
        text = ", ".join(f"{pin.where} says {pin.value}" for pin in pins)
        raise ValueError(f"the build's pins disagree: {text}")
    if pins:
        pin = next((p for p in pins if p.url), pins[0])
        problem = _not_what_is_installed(pin.value, description)
        if problem:
            raise ValueError(problem)
        if pin.url:
            return Source("git", url=url or pin.url, commit=pin.value)
        if len(pin.hashes) != 1:
            raise ValueError(
                f"{pin.where} has {len(pin.hashes)} sha256 for {pin.name}, a package is locked "
                "with exactly one"
            )
        return Source("package", package=pin.name, version=pin.value, sha256=pin.hashes[0])
    if not is_full_hash(origin.commit):
        known = origin.commit or origin.version or "nothing"
        raise ValueError(
            f"{name} does not say which full commit it is (known: {known}); give the build's pin "
            "with --cmake, --requirements or --submodule"
        )
    if origin.dirty:
        raise ValueError(f"{origin.location} has uncommitted changes: it is no commit")
    if not (url or origin.url):
        raise ValueError(f"the repository of {name} is not known; give it with --url")
    return Source("git", url=url or origin.url, commit=origin.commit)


def _not_what_is_installed(value: str, description: Description) -> str:
    """Why the provider that ran is not the pinned one; "" if it is, or does not say."""
    origin = description.origin
    if origin.dirty:
        return f"{origin.location} has uncommitted changes: it is not {value[:12]}"
    if is_full_hash(value):
        if origin.commit and not value.startswith(origin.commit):
            return f"{description.name} is commit {origin.commit}, the pin says {value}"
        return ""
    if origin.version and origin.version != value:
        return f"{description.name} is version {origin.version}, the pin says {value}"
    return ""


def lock_provider(
    spec: str,
    lock: Path,
    pin_files: Sequence[tuple[str, Path, str]],
    settings: Settings,
    *,
    url: str = "",
    accept_fault: str = "",
) -> Certificate:
    """Run the gate and write the provider's entry.

    Args:
        pin_files: (kind, file, name there) of the build's pins of it.

    Raises:
        ValueError: nothing can be locked; the lock is as it was.
        NotProven: the provider did not pass.
    """
    name = spec.partition("@")[0]
    known_fault(accept_fault)
    if lock.exists():
        read_lock(lock)
    pins = [read_pin(*entry) for entry in pin_files]
    locked = tuple(relative_pin(kind, file, pin, lock) for kind, file, pin in pin_files)
    report, description = try_provider(spec, settings)
    source = source_of(name, pins, description, url)
    problem = refusal(report, accept_fault, settings)
    if problem is not None:
        raise NotProven(problem)
    accepted = f"fault {accept_fault}" if accept_fault and not report.ok else ""
    certificate = certify(report, settings.cases, settings.device, accepted)
    write_all([(lock, lock_text(lock, Entry(name, source, locked, certificate)))])
    return certificate


def check_pins(entry: Entry, lock: Path) -> list[Finding]:
    """Whether the build still says what the lock says."""
    found = []
    for locked in entry.pins:
        path = lock.absolute().parent / locked.file
        try:
            pin = read_pin(locked.kind, path, locked.name)
        except ValueError as error:
            found.append(Finding(entry.name, False, f"drift: {error}"))
            continue
        hashes = set(pin.hashes)
        sha256 = entry.source.sha256
        if pin.value != entry.source.pin:
            text = f"drift: {pin.where} pins {pin.value}, the lock says {entry.source.pin}"
        elif pin.weakness and not (pin.weakness.startswith("pinned by version")):
            text = f"drift: {pin.where}: {pin.weakness}"
        elif sha256 and hashes and sha256 not in hashes:
            text = f"drift: {pin.where} has another sha256 than the lock"
        elif sha256 and not hashes:
            text = f"drift: {pin.where} has no sha256, the lock has one"
        else:
            found.append(Finding(entry.name, True, f"{pin.where} agrees: {pin.value}"))
            continue
        found.append(Finding(entry.name, False, text))
    return found


def verify_entry(entry: Entry, spec: str, settings: Settings) -> list[Finding]:
    """Run the gate as the certificate says, and compare."""
    then = entry.certificate
    chosen = replace(settings, cases=then.cases, seed=then.seed, limit=then.limit)
    report, description = try_provider(spec, chosen, diagnose=False)
    problem = _not_what_is_installed(entry.source.pin, description)
    found = [Finding(entry.name, False, f"drift: {problem}")] if problem else []
    now = certify(report, then.cases, settings.device)
    if now.catalogue != then.catalogue:
        text = f"the certificate is of another catalogue (gate {then.gate}): renew it with `lock`"
        found.append(Finding(entry.name, False, text))
    for line in worse_than(now, then):
        found.append(Finding(entry.name, False, line))
    same = "the same machine" if now.machine == then.machine else "another machine than the lock's"
    text = f"gate: {now.summary}, on {same}"
    return [*found, Finding(entry.name, not found, text)]


def verify(
    lock: Path, specs: Mapping[str, str], settings: Settings, pins_only: bool = False
) -> list[Finding]:
    """Hold the build's pins and the providers to the lock.

    Args:
        specs: where to find a provider: name -> NAME@PATH; by default NAME in this environment.

    Raises:
        ValueError: the lock cannot be read, or a provider cannot be run; or no pin is locked and
            nothing but pins is asked for.
    """
    entries = read_lock(lock)
    if not entries:
        raise ValueError(f"{lock} locks no provider")
    unknown = sorted(set(specs) - {entry.name for entry in entries})
    if unknown:
        raise ValueError(f"{lock} does not lock {unknown[0]!r}")
    if pins_only and not any(entry.pins for entry in entries):
        raise ValueError(f"{lock} holds no pin of a build: --pins-only has nothing to compare")
    found = []
    for entry in entries:
        found += check_pins(entry, lock)
        if not pins_only:
            found += verify_entry(entry, specs.get(entry.name, entry.name), settings)
    return found
