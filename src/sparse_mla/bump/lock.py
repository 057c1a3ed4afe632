"""kernels.lock: which commit of which kernel, and the proof that it was right. docs/bump.md.

The file is data. Reading it executes nothing, takes only the keys that the schema has, and opens
only files below the lock's own folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any

from ..cli_common import MOST_IDEAL
from .certificate import STATUSES, Certificate, OpResult
from .git import require_full_hash, require_url
from .pins import KINDS

SCHEMA = 1
HEADER = "Written by `sparse-mla lock` and `bump`; docs/bump.md describes the schema."


@dataclass(frozen=True)
class Source:
    """Where a provider's code comes from: a commit, or a released package."""

    kind: str
    url: str = ""
    commit: str = ""
    package: str = ""
    version: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.kind == "git":
            require_url(self.url)
            require_full_hash(self.commit, "commit")
        elif self.kind == "package":
            if not self.package or not self.version:
                raise ValueError("a package source needs package and version")
            if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
                raise ValueError(f"sha256 is {self.sha256!r}, must be 64 hex digits")
        else:
            raise ValueError(f"kind of source is {self.kind!r}, allowed: git, package")

    @property
    def pin(self) -> str:
        """What a build file must say to agree: the commit, or the version."""
        return self.commit if self.kind == "git" else self.version


@dataclass(frozen=True)
class LockedPin:
    """A place in the build that pins the same source; `file` is relative to the lock's folder."""

    kind: str
    file: str
    name: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file)
        if self.kind not in KINDS:
            raise ValueError(f"kind of pin is {self.kind!r}, allowed: {', '.join(KINDS)}")
        if path.is_absolute() or ".." in path.parts or not self.name:
            raise ValueError(
                f"pin {self.file!r} ({self.name!r}) must have a name and lie below the lock's "
                "folder"
            )


@dataclass(frozen=True)
class Entry:
    """One locked provider."""

    name: str
    source: Source
    pins: tuple[LockedPin, ...]
    certificate: Certificate


def read_lock(path: Path) -> list[Entry]:
    """The entries of a lock file; ValueError names what is wrong with it."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    from .pins import read_text

    try:
        data: dict[str, Any] = tomlkit.parse(read_text(path)).unwrap()
    except TOMLKitError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')!r}, this version reads {SCHEMA}")
    tables = data.get("provider", [])
    if not isinstance(tables, list):
        raise ValueError(f"{path}: provider must be an array of tables")
    entries: list[Entry] = []
    for number, table in enumerate(tables, start=1):
        try:
            entries.append(_entry(table))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: provider {number} lacks or garbles {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: provider {number}: {error}") from error
    _no_duplicates(entries, path)
    return entries


def _no_duplicates(entries: Sequence[Entry], path: Path) -> None:
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} locks {name!r} {names.count(name)} times")
    pins = [pin for entry in entries for pin in entry.pins]
    for pin in pins:
        if pins.count(pin) > 1:
            raise ValueError(
                f"{path} has the pin {pin.name!r} of {pin.file} {pins.count(pin)} times"
            )


def _entry(table: dict[str, Any]) -> Entry:
    proof = table["certificate"]
    ops = {
        _text(op): OpResult(
            counts={status: int(values[status]) for status in STATUSES if status in values},
            error=_number(values.get("error")),
            worst=_number(values.get("worst")),
            worst_case=_text(values.get("worst_case", "")),
            bad={_text(case): _text(word) for case, word in values.get("bad", {}).items()},
        )
        for op, values in proof["ops"].items()
    }
    certificate = Certificate(
        date=_text(proof["date"]),
        gate=_text(proof["gate"]),
        catalogue=_text(proof["catalogue"]),
        cases=_text(proof["cases"]),
        seed=int(proof["seed"]),
        limit=_limit(proof["limit"]),
        machine={_text(key): _text(value) for key, value in proof["machine"].items()},
        ops=ops,
        accepted=_text(proof.get("accepted", "")),
    )
    source = Source(**{key: _text(value) for key, value in table["source"].items()})
    pins = tuple(
        LockedPin(_text(pin["kind"]), _text(pin["file"]), _text(pin["name"]))
        for pin in table.get("pin", [])
    )
    return Entry(_text(table["name"]), source, pins, certificate)


def _limit(value: Any) -> float:
    limit = float(value)
    # With nothing above it every kernel would agree with the lock.
    if not 1.0 <= limit <= MOST_IDEAL:
        raise ValueError(f"limit is {limit}, must be from 1 to {MOST_IDEAL:g}")
    return limit


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be text")
    return value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def as_toml(entry: Entry) -> dict[str, Any]:
    """The entry as plain tables, in the schema's order, without what is empty."""
    proof = entry.certificate
    ops = {}
    for op, result in proof.ops.items():
        ops[op] = {
            **result.counts,
            **_some(error=_short(result.error), worst=_short(result.worst)),
            **_some(worst_case=result.worst_case or None, bad=result.bad or None),
        }
    table: dict[str, Any] = {
        "name": entry.name,
        "source": {key: value for key, value in vars(entry.source).items() if value},
    }
    if entry.pins:
        table["pin"] = [dict(vars(pin)) for pin in entry.pins]
    table["certificate"] = {
        "date": proof.date,
        "gate": proof.gate,
        "catalogue": proof.catalogue,
        "cases": proof.cases,
        "seed": proof.seed,
        "limit": proof.limit,
        **_some(accepted=proof.accepted or None),
        "machine": proof.machine,
        "ops": ops,
    }
    return table


def _some(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def lock_text(path: Path, entry: Entry) -> str:
    """The lock file with this entry added or replaced; everything else in it stays as it was.

    Raises:
        ValueError: there is a file already and it is not a lock of this schema.
    """
    import tomlkit

    from .pins import read_text

    if path.exists():
        others = [e for e in read_lock(path) if e.name != entry.name]
        _no_duplicates([*others, entry], path)
        document = tomlkit.parse(read_text(path))
    else:
        document = tomlkit.document()
        document.add(tomlkit.comment(HEADER))
        document["schema"] = SCHEMA
    if "provider" not in document:
        document["provider"] = tomlkit.aot()
    tables: Any = document["provider"]
    made = tomlkit.item(as_toml(entry))
    for number, table in enumerate(tables):
        if table["name"] == entry.name:
            tables[number] = made
            break
    else:
        tables.append(made)
    return tomlkit.dumps(document)


def write_all(changes: Sequence[tuple[Path, str]]) -> None:
    """Write several files or none: all new texts are on disk before the first one is exchanged.

    Raises:
        ValueError: a file cannot be written; the others are as they were.
    """
    staged: list[tuple[Path, Path]] = []
    undo: list[Callable[[], object]] = []
    path = Path()
    try:
        for path, text in changes:
            target = path.resolve()
            with NamedTemporaryFile(
                "w", encoding="utf-8", newline="", dir=target.parent, prefix=f".{path.name}.",
                delete=False,
            ) as file:  # fmt: skip
                staged.append((Path(file.name), target))
                file.write(text)
            mode = target.stat().st_mode if target.exists() else 0o666 & ~_umask()
            os.chmod(file.name, mode & 0o7777)
        for temporary, path in staged:
            before = path.read_bytes() if path.exists() else None
            os.replace(temporary, path)
            undo.append(_restore(path, before))
    except OSError as error:
        for put_back in reversed(undo):
            put_back()
        raise ValueError(f"{path}: {error.strerror}; nothing was changed") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _restore(path: Path, before: bytes | None) -> Callable[[], object]:
    if before is None:
        return lambda: path.unlink(missing_ok=True)
    return lambda: path.write_bytes(before)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
