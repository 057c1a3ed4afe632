"""The build's own pins: CMake FetchContent tags, pip requirements, git submodules."""

from __future__ import annotations

import configparser
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import cmake
from .git import git, is_full_hash

if TYPE_CHECKING:
    from packaging.requirements import Requirement

KINDS = ("cmake", "requirements", "submodule")


@dataclass(frozen=True)
class Pin:
    """What a build file says about one source.

    Attributes:
        kind: one of KINDS.
        file: the file it stands in; for a submodule, its folder.
        name: as the file calls it.
        value: a commit, or a version.
        url: of the repository, "" for a package.
        hashes: sha256 of the package's files, where given.
        line: in the file, 0 for a submodule.
        weakness: why this does not fix what is built, "" if it does.
    """

    kind: str
    file: Path
    name: str
    value: str
    url: str = ""
    hashes: tuple[str, ...] = ()
    line: int = 0
    weakness: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else str(self.file)


def read_text(path: Path) -> str:
    """A file with its line ends kept; ValueError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_pin(kind: str, path: Path, name: str) -> Pin:
    """The pin of `name`; ValueError if there is none or several."""
    if kind == "cmake":
        return cmake_pin(cmake.find_tag(read_text(path), name, str(path)), path)
    if kind == "requirements":
        found = [pin for pin in read_requirements(path) if _same_package(pin.name, name)]
    elif kind == "submodule":
        found = [pin for pin in read_submodules(path) if _is_submodule(pin, name)]
    else:
        raise ValueError(f"kind of pin is {kind!r}, allowed: {', '.join(KINDS)}")
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} entries for {name!r}, expected one")
    return found[0]


def all_pins(kind: str, path: Path) -> list[Pin]:
    """Every pin in a file, for the report's risks."""
    if kind == "cmake":
        return [cmake_pin(fetch, path) for fetch in cmake.fetches(read_text(path))]
    return read_requirements(path) if kind == "requirements" else read_submodules(path)


def cmake_pin(fetch: cmake.Fetch, path: Path) -> Pin:
    value = fetch.tag.text
    return Pin("cmake", path, fetch.name, value, fetch.url, (), fetch.line, _moving(value))


def _moving(value: str) -> str:
    if is_full_hash(value):
        return ""
    if "$" in value:
        return f"{value} is a variable"
    if re.fullmatch(r"[0-9a-f]{7,39}", value):
        return f"{value} is a short hash"
    return f"{value} is a branch or tag, which can move"


def read_requirements(path: Path) -> list[Pin]:
    """The requirements of a pip file; options other than --hash are left out."""
    from packaging.requirements import InvalidRequirement, Requirement

    pins = []
    number, start, line = 0, 0, ""
    for number, part in enumerate(read_text(path).splitlines(), start=1):
        start = start if line else number
        line += part.strip()
        if line.endswith("\\"):
            line = line[:-1] + " "
            continue
        whole, line = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip(), ""
        if not whole or whole.startswith("-"):
            continue
        text, _, options = whole.partition(" --")
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}:{start}: not a requirement: {reason}") from error
        hashes = re.findall(r"hash[= ]sha256:([0-9a-f]{64})", options)
        pins.append(_requirement_pin(requirement, path, start, tuple(hashes)))
    return pins


def _requirement_pin(
    requirement: Requirement, path: Path, line: int, hashes: tuple[str, ...]
) -> Pin:
    if requirement.url:
        url, _, commit = requirement.url.removeprefix("git+").partition("#")[0].rpartition("@")
        if not requirement.url.startswith("git+") or not url:
            url, commit = requirement.url, ""
            weakness = "" if hashes or "sha256=" in requirement.url else "a URL without a hash"
        else:
            weakness = _moving(commit)
        return Pin("requirements", path, requirement.name, commit, url, hashes, line, weakness)
    exact = [s for s in requirement.specifier if s.operator in ("==", "===")]
    if len(requirement.specifier) == 1 and exact and "*" not in exact[0].version:
        weakness = "" if hashes else "pinned by version, without a sha256"
        version = exact[0].version
        return Pin("requirements", path, requirement.name, version, "", hashes, line, weakness)
    weakness = f"{requirement.specifier or 'no version'} is not a pin"
    value = str(requirement.specifier)
    return Pin("requirements", path, requirement.name, value, "", hashes, line, weakness)


def _same_package(one: str, other: str) -> bool:
    from packaging.utils import canonicalize_name

    return canonicalize_name(one) == canonicalize_name(other)


def read_submodules(folder: Path) -> list[Pin]:
    """The submodules of the checkout in `folder` (or of the one with this .gitmodules file)."""
    folder = folder.parent if folder.name == ".gitmodules" else folder
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        lines = read_text(folder / ".gitmodules").splitlines()
        parser.read_string("\n".join(line.strip() for line in lines))
    except configparser.Error as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / '.gitmodules'} cannot be read: {reason}") from error
    pins = []
    for section in parser.sections():
        words = shlex.split(section)
        path, url = parser[section].get("path", ""), parser[section].get("url", "")
        if words[:1] != ["submodule"] or not path:
            continue
        entry = git(folder, "ls-files", "--stage", "--", path).split()
        commit = entry[1] if entry[:1] == ["160000"] else ""
        weakness = "" if commit else "the index has no commit for it"
        checked_out = folder / path / ".git"
        if commit and checked_out.exists():
            head = git(folder / path, "rev-parse", "HEAD")
            if head != commit:
                weakness = f"checked out at {head[:12]}, the index says {commit[:12]}"
        pins.append(Pin("submodule", folder, path, commit, url, (), 0, weakness))
    return pins


def _is_submodule(pin: Pin, name: str) -> bool:
    last = pin.name.rstrip("/").split("/")[-1]
    return pin.name == name or cmake.normal(last) == cmake.normal(name)
