"""FetchContent pins in CMake files: find the GIT_TAG that belongs to a name, change just that.

A small reader of CMake's grammar (comments, brackets, quotes) that keeps positions, so that a new
tag replaces the old one's characters and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<bracket_comment>\#\[(?P<e1>=*)\[.*?\](?P=e1)\])
      | (?P<comment>\#[^\n]*)
      | (?P<bracket>\[(?P<e2>=*)\[.*?\](?P=e2)\])
      | (?P<quoted>"(?:[^"\\]|\\.)*")
      | (?P<open>\()
      | (?P<close>\))
      | (?P<space>\s+)
      | (?P<word>(?:[^\s()\#"\\]|\\.)+)
      | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Argument:
    """An argument's text without quotes, and where that text stands in the file."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Fetch:
    """A FetchContent_Declare or ExternalProject_Add with a git source.

    Attributes:
        name: what is declared.
        url: GIT_REPOSITORY, "" if it has none.
        tag: GIT_TAG.
        line: of the tag, from 1.
    """

    name: str
    url: str
    tag: Argument
    line: int


_DECLARES = ("fetchcontent_declare", "externalproject_add")


def commands(text: str) -> list[tuple[str, list[Argument]]]:
    """All commands of a file, names in lower case, arguments in order (nested ones flattened)."""
    found: list[tuple[str, list[Argument]]] = []
    name, depth = "", 0
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup if match.lastgroup not in ("e1", "e2") else None
        value = match.group()
        if value.startswith("#") or value.isspace():
            continue
        start, end = match.span()
        if kind == "open":
            depth += 1
            if depth == 1:
                found.append((name.lower(), []))
            continue
        if kind == "close":
            depth = max(0, depth - 1)
            continue
        if depth == 0:
            name = value
            continue
        if value.startswith('"') and len(value) > 1:
            start, end, value = start + 1, end - 1, value[1:-1]
        elif re.match(r"\[=*\[", value):
            edge = value.index("[", 1) + 1
            start, end, value = start + edge, end - edge, value[edge:-edge]
        found[-1][1].append(Argument(value, start, end))
    return found


def fetches(text: str) -> list[Fetch]:
    """Every declared git source that has a GIT_TAG."""
    found = []
    for command, arguments in commands(text):
        if command not in _DECLARES or not arguments:
            continue
        words = [argument.text for argument in arguments]
        url = words[words.index("GIT_REPOSITORY") + 1 :][:1] if "GIT_REPOSITORY" in words else []
        for place, word in enumerate(words[:-1]):
            if word == "GIT_TAG":
                tag = arguments[place + 1]
                line = text.count("\n", 0, tag.start) + 1
                found.append(Fetch(words[0], url[0] if url else "", tag, line))
    return found


def normal(name: str) -> str:
    """flash_mla, FlashMLA and repo-flashmla should meet."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def belongs(fetch: Fetch, name: str) -> bool:
    """Whether a declared source is the one of that name, or of a repository of that name."""
    wanted = normal(name)
    repository = re.split(r"[/:]", fetch.url.rstrip("/"))[-1].removesuffix(".git")
    return fetch.name == name or wanted in normal(fetch.name) or wanted == normal(repository)


def find_tag(text: str, name: str, where: str) -> Fetch:
    """The one GIT_TAG of `name`; ValueError if there is none, or several."""
    every = fetches(text)
    exact = [fetch for fetch in every if fetch.name == name]
    found = exact or [fetch for fetch in every if belongs(fetch, name)]
    if len(found) == 1:
        return found[0]
    if found:
        lines = ", ".join(f"{fetch.name} in line {fetch.line}" for fetch in found)
        raise ValueError(f"{where} has {len(found)} GIT_TAGs that match {name!r}: {lines}")
    names = ", ".join(sorted({fetch.name for fetch in every})) or "none"
    raise ValueError(f"{where} has no GIT_TAG that matches {name!r}; declared with a tag: {names}")


def replace_tag(text: str, fetch: Fetch, commit: str) -> str:
    """The file with another tag; every other character as it was."""
    return text[: fetch.tag.start] + commit + text[fetch.tag.end :]
