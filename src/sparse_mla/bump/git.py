"""Git as the commands use it: full hashes, clean checkouts, one-line errors."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_URL = re.compile(r"(https?|ssh|git|file)://\S+|[\w.-]+@[\w.-]+:\S+|[^-:\s][^:\s]*")


def is_full_hash(text: str) -> bool:
    return _HASH.fullmatch(text) is not None


def require_full_hash(text: str, what: str) -> str:
    """ValueError for a branch, a tag or an abbreviated hash: those can come to mean other code."""
    if not is_full_hash(text):
        raise ValueError(f"{what} is {text!r}, must be a full commit hash (40 hex digits)")
    return text


def require_url(text: str) -> str:
    """ValueError for what git would take as an option or as a command to run."""
    if not _URL.fullmatch(text):
        raise ValueError(
            f"repository is {text!r}, must be an https, ssh, git or file URL or a path"
        )
    return text


def git(folder: Path, *arguments: str) -> str:
    """What git prints; ValueError with its first line of complaint."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"git cannot be run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        words = [a for a in arguments if a != "-c" and "=" not in a]
        raise ValueError(f"git {words[0]} in {folder}: {said[0] if said else 'failed'}")
    return done.stdout.strip()


def require_repository(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory")
    try:
        git(folder, "rev-parse", "--git-dir")
    except ValueError:
        raise ValueError(f"{folder} is not a git checkout") from None


def require_clean(folder: Path) -> None:
    """ValueError if tracked files are changed: git would carry that from commit to commit."""
    changed = git(folder, "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        raise ValueError(
            f"{folder} has {len(changed)} uncommitted change(s), first: {changed[0].strip()}"
        )


def resolve(folder: Path, commit: str) -> str:
    """The full hash of a commit that the checkout has; ValueError if it has none of that name."""
    if commit.startswith("-"):
        raise ValueError(f"commit is {commit!r}")
    try:
        return git(folder, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    except ValueError:
        raise ValueError(f"commit {commit} is not in {folder}") from None


def is_ancestor(folder: Path, old: str, new: str) -> bool:
    command = ["git", "-C", str(folder), "merge-base", "--is-ancestor", old, new]
    return subprocess.run(command, capture_output=True).returncode == 0


def subject(folder: Path, commit: str) -> str:
    return git(folder, "log", "-1", "--format=%s", commit)


@contextmanager
def source_at(url: str, commit: str, local: Path | None = None) -> Iterator[Path]:
    """A temporary checkout of a commit, from a local clone if one is given, else from the URL.

    Raises:
        ValueError: the commit cannot be had.
    """
    source = str(local.absolute()) if local is not None else require_url(url)
    with TemporaryDirectory(prefix="sparse_mla_source_") as name:
        folder = Path(name)
        git(folder, "init", "--quiet")
        try:
            try:
                git(folder, "fetch", "--quiet", "--depth", "1", source, commit)
            except ValueError:
                # A server that gives out branches only: fetch them all and look.
                git(folder, "fetch", "--quiet", source, "+refs/*:refs/source/*")
            git(folder, "checkout", "--quiet", "--detach", commit)
        except ValueError as error:
            raise ValueError(f"commit {commit} cannot be had from {source}: {error}") from None
        yield folder
