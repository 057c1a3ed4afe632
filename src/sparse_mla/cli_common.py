"""What the commands share: one-line errors, files that can be written, devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

MOST_IDEAL = 100.0
"""The largest budget that may be asked for: what is beyond it would pass anything."""
MOST_SECONDS = 86400.0


def usage_error(message: object) -> NoReturn:
    """One line on standard error, exit status 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def writable(path: Path | None, option: str) -> None:
    """Find out before the work, not after it, that a file cannot be written; nothing is touched."""
    if path is None:
        return
    folder = path.parent
    problem = 0
    if path.is_dir():
        problem = errno.EISDIR
    elif not folder.exists():
        problem = errno.ENOENT
    elif not folder.is_dir():
        problem = errno.ENOTDIR
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = errno.EACCES
    if problem:
        usage_error(f"{option} {path}: {os.strerror(problem)}")


def writable_folder(path: Path | None, option: str) -> None:
    """The same for a folder, which is made if it is not there."""
    if path is None:
        return
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        usage_error(f"{option} {path}: {os.strerror(errno.ENOTDIR)}")
    if not os.access(there, os.W_OK):
        usage_error(f"{option} {path}: {os.strerror(errno.EACCES)}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A file that cannot be written after all, as on a full disk: one line, exit status 2."""
    try:
        yield
    except OSError as error:
        usage_error(f"{path}: {error.strerror}")


def device_named(name: str | None):  # type: ignore[no-untyped-def]  # torch is imported lazily
    """The device to run on; ValueError if it does not exist here."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(name)
        torch.empty(0, device=made)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return made
