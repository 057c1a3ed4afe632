"""What changed between two commits, from a local checkout: commits, files, and what they touch.

A file touches an op if it is source code and its path names the op, or its text at the later commit
holds one of the op's public functions. A commit is called related if its subject speaks of a
repair, or if it came after the candidate and touches the same files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .git import git, is_ancestor, resolve

SOURCE = re.compile(r"\.(cu|cuh|c|cc|cpp|cxx|h|hpp|py|pyx|inl|cmake)$|CMakeLists\.txt$")
PATHS = {
    "decode": re.compile(r"decode|splitkv|split_kv|combine|sched_meta|with_kvcache", re.I),
    "prefill": re.compile(r"prefill|sparse_?fwd|sparse_?mla_?fwd", re.I),
    "kv_write": re.compile(r"kv_?write|quant|append", re.I),
}
FUNCTIONS = {
    "decode": ("flash_mla_with_kvcache", "sparse_mla.decode", "def decode("),
    "prefill": ("flash_mla_sparse_fwd", "tilelang_sparse_fwd", "def prefill("),
    "kv_write": ("def append(", "quantize_k_cache"),
}
REPAIR = re.compile(
    r"\b(fix\w*|repair\w*|accura\w*|precis\w*|nan|overflow|race|revert\w*|wrong|incorrect|bug\w*"
    r"|hang\w*|crash\w*|scales?|rounding)\b",
    re.I,
)
LISTED = 200


@dataclass(frozen=True)
class Commit:
    hash: str
    date: str
    subject: str
    touches: tuple[str, ...]
    repair: bool


@dataclass(frozen=True)
class File:
    path: str
    added: int | None
    removed: int | None
    touches: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """Between the base's commit and the candidate's.

    Attributes:
        forward: the candidate descends from the base.
        commits: new in the candidate, newest first; `left_out` more were not listed.
        dropped: in the base and not in the candidate (not empty only if they diverged).
        later: after the candidate in the checkout, touching files of the ops under test.
    """

    before: str
    after: str
    forward: bool
    commits: tuple[Commit, ...]
    files: tuple[File, ...]
    dropped: tuple[Commit, ...]
    later: tuple[Commit, ...]
    left_out: int = 0

    @property
    def touching(self) -> list[File]:
        return [file for file in self.files if file.touches]


def read_changes(checkout: Path, before: str, after: str, ops: Sequence[str]) -> Changes:
    """Compare two commits of a checkout; ValueError if it lacks one of them."""
    old, new = resolve(checkout, before), resolve(checkout, after)
    text = _functions_at(checkout, new, ops)
    files = tuple(
        File(path, _count(added), _count(removed), _touches(path, ops, text))
        for added, removed, path in _numstat(checkout, old, new)
    )
    commits = _commits(checkout, f"{old}..{new}", ops, text)
    return Changes(
        before=old,
        after=new,
        forward=is_ancestor(checkout, old, new),
        commits=tuple(commits[:LISTED]),
        files=files,
        dropped=tuple(_commits(checkout, f"{new}..{old}", ops, text)[:LISTED]),
        later=tuple(_later(checkout, new, ops, text)),
        left_out=max(0, len(commits) - LISTED),
    )


def _numstat(checkout: Path, old: str, new: str) -> list[list[str]]:
    lines = git(
        checkout, "-c", "core.quotePath=false", "diff", "--numstat", "--no-renames", old, new
    )
    return [line.split("\t", 2) for line in lines.splitlines() if line.count("\t") >= 2]


def _count(text: str) -> int | None:
    """None for a binary file."""
    return int(text) if text.isdigit() else None


def _functions_at(checkout: Path, commit: str, ops: Sequence[str]) -> dict[str, set[str]]:
    """Per op, the files at a commit that hold one of its public functions."""
    found: dict[str, set[str]] = {}
    for op in ops:
        wanted = [part for name in FUNCTIONS.get(op, ()) for part in ("-e", name)]
        if not wanted:
            continue
        try:
            search = ("-c", "core.quotePath=false", "grep", "-l", "-I", "-F")
            lines = git(checkout, *search, *wanted, commit).splitlines()
        except ValueError:  # nothing matches
            lines = []
        found[op] = {line.partition(":")[2] for line in lines}
    return found


def _touches(path: str, ops: Sequence[str], text: dict[str, set[str]]) -> tuple[str, ...]:
    if not SOURCE.search(path):
        return ()
    return tuple(
        op for op in ops if (op in PATHS and PATHS[op].search(path)) or path in text.get(op, set())
    )


def _commits(
    checkout: Path, span: str, ops: Sequence[str], text: dict[str, set[str]]
) -> list[Commit]:
    lines = git(
        checkout, "-c", "core.quotePath=false", "log", "--no-renames", "--name-only",
        "--format=%x00%H%x1f%as%x1f%s", span,
    )  # fmt: skip
    found = []
    for block in lines.split("\0")[1:]:
        head, *paths = block.splitlines()
        commit, date, subject = head.split("\x1f", 2)
        touched = {op for path in paths if path for op in _touches(path, ops, text)}
        repair = REPAIR.search(subject) is not None
        found.append(Commit(commit, date, subject, tuple(sorted(touched)), repair))
    return found


def _later(checkout: Path, new: str, ops: Sequence[str], text: dict[str, set[str]]) -> list[Commit]:
    """Commits on the checkout's main branch that the candidate does not have."""
    for name in ("origin/HEAD", "origin/main", "origin/master", "main", "master", "HEAD"):
        try:
            tip = resolve(checkout, name)
        except ValueError:
            continue
        if tip != new and is_ancestor(checkout, new, tip):
            return [c for c in _commits(checkout, f"{new}..{tip}", ops, text) if c.touches]
        return []
    return []
