"""The user's build command: run in a checkout, it prints where the result can be imported from."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


class BuildError(ValueError):
    """The build command failed, or did not say where its result is."""


@contextmanager
def built(command: str, checkout: Path, commit: str) -> Iterator[Path]:
    """Run the command in `checkout`; the environment or directory that its last line names.

    The command finds in its environment SPARSE_MLA_COMMIT, and SPARSE_MLA_BUILD: an empty directory
    of its own outside the checkout (for `pip install --target` and the like), removed afterwards.
    Relative paths in its last line are relative to the checkout.

    Raises:
        BuildError: status not 0, no output, or a last line that names nothing.
    """
    with TemporaryDirectory(prefix="sparse_mla_build_") as scratch:
        environment = {**os.environ, "SPARSE_MLA_COMMIT": commit, "SPARSE_MLA_BUILD": scratch}
        done = subprocess.run(
            command,
            shell=True,
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            tail = f": {said[-1].strip()[:200]}" if said else ""
            raise BuildError(
                f"build command ended with status {done.returncode} at {commit[:12]}{tail}"
            )
        lines = done.stdout.strip().splitlines()
        if not lines:
            raise BuildError(
                f"build command printed nothing at {commit[:12]}; the last line of its standard "
                "output must be the directory or environment to import from"
            )
        place = checkout / lines[-1].strip()
        if not place.exists():
            raise BuildError(
                f"build command's last line is {lines[-1].strip()[:200]!r} at {commit[:12]}, which "
                "is no directory or environment"
            )
        yield place
