"""What adapters share: how a provider describes itself, and where its code comes from.

An adapter is a file of this package with

    TITLE, PACKAGE          what it is, and the top-level package it needs ("" for any)
    DISTRIBUTIONS           names under which that is installed
    ARCHITECTURES           GPUs that its kernels are built for
    load(name)              an Implementation; imports the package
    supports(provider, op, layout, machine)   (ok, reason), before a call is tried
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from ...arch import Arch
from ..case import Inputs

OPS = ("decode", "prefill", "dense_decode", "kv_write")


@dataclass(frozen=True)
class Offer:
    """Whether a provider takes an op over a layout on this machine, and why."""

    op: str
    layout: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Origin:
    """Where installed code comes from.

    Attributes:
        version: of the distribution, "" if unknown.
        commit: 40 hex digits, or fewer where only a prefix is known; "" if unknown.
        dirty: the code is a checkout with changes that are in no commit.
        location: the file or folder that was imported.
        url: of the repository, where the installation recorded it.
    """

    version: str = ""
    commit: str = ""
    dirty: bool = False
    location: str = ""
    url: str = ""


@dataclass(frozen=True)
class Description:
    """One provider as `sparse-mla providers` lists it."""

    name: str
    title: str
    installed: bool
    reason: str
    origin: Origin = field(default_factory=Origin)
    architectures: tuple[str, ...] = ()
    offers: tuple[Offer, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Description:
        fields = dict(data)
        fields["origin"] = Origin(**data["origin"])
        fields["architectures"] = tuple(data["architectures"])
        fields["offers"] = tuple(Offer(**offer) for offer in data["offers"])
        return cls(**fields)


def origin(distributions: Sequence[str], location: str | None) -> Origin:
    """Version and commit, from package metadata, the checkout, or the version's local part."""
    version, commit, url = "", "", ""
    for name in distributions:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if location and not _belongs(found, location):
            continue
        version = found.version
        recorded = _recorded(found)
        commit = str(recorded.get("vcs_info", {}).get("commit_id", ""))
        url = str(recorded.get("url", "")) if commit else ""
        break
    dirty = False
    if not commit and location:
        commit, dirty = _checkout_commit(Path(location))
    if not version:
        version = str(getattr(sys.modules.get(distributions[0]), "__version__", ""))
    if not commit and "+" in version:
        local = version.split("+", 1)[1].split(".")[0].removeprefix("g")
        if len(local) >= 7 and all(c in "0123456789abcdef" for c in local):
            commit = local
    return Origin(version, commit, dirty, location or "", url)


def _belongs(found: metadata.Distribution, location: str) -> bool:
    """Whether a distribution can own an imported file: it is beside it, or installed elsewhere.

    A checkout that comes first on sys.path is not the distribution of the same name behind it.
    """
    folder = Path(str(found.locate_file(""))).resolve()
    if Path(location).resolve().is_relative_to(folder):
        return True
    where = unquote(urlparse(_recorded(found).get("url", "")).path)
    return bool(where) and Path(location).resolve().is_relative_to(Path(where).resolve())


def _recorded(found: metadata.Distribution) -> dict[str, Any]:
    """What pip recorded of an installation from a repository or a folder (PEP 610)."""
    try:
        data = json.loads(found.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _checkout_commit(location: Path) -> tuple[str, bool]:
    """HEAD of the checkout that tracks this file, and whether its tracked files are changed."""
    folder = location if location.is_dir() else location.parent

    def git(*arguments: str) -> str | None:
        command = ("git", "-C", str(folder), *arguments)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside a repository is not tracked by it.
    if git("ls-files", "--error-unmatch", str(location)) is None:
        return "", False
    head = git("rev-parse", "HEAD")
    return (head or ""), bool(git("status", "--porcelain", "--untracked-files=no"))


def machine_word(machine: Arch) -> str:
    """sm_90 and the like, or "cpu"."""
    if machine.capability is None:
        return "cpu"
    return f"sm_{machine.capability[0]}{machine.capability[1]}"


def built_for(architectures: Sequence[str], machine: Arch) -> tuple[bool, str]:
    """Whether kernels built for these architectures run on this machine."""
    word = machine_word(machine)
    if word in architectures:
        return True, word
    there = "no GPU" if word == "cpu" else word
    return False, f"built for {', '.join(architectures)}; this machine has {there}"


def bf16_rows(inputs: Inputs) -> torch.Tensor | None:
    """The cache as prefill's kv tensor [s_kv, 1, d_qk] bf16, a view; None if it is not one."""
    cache = inputs.cache
    if cache.layout.quantised or cache.page_size != 1:
        return None
    return cache.rows_view().view(torch.bfloat16)
