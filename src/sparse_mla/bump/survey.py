"""`sparse-mla providers`: what each adapter finds, asked in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import dispatch
from ..accuracy import providers
from ..accuracy.case import Crashed, Hung, NotOffered, Raised
from ..accuracy.check import make_provider
from ..accuracy.providers.base import Description
from ..isolate.host import IsolatedProvider


def survey(specs: Sequence[str], time_limit: float) -> list[Description]:
    """Describe the given providers, or all that have an adapter.

    A package that is found is imported in a process of its own: one that crashes or hangs while it
    is imported is listed with that word.

    Raises:
        ValueError: a spec that names no interpreter or directory.
    """
    if specs:
        return [_one(spec, time_limit) for spec in specs]
    others = [name for name in providers.ADAPTERS if name != "sparse_mla"]
    return [*_ours(), *(_one(name, time_limit) for name in others)]


def _ours() -> list[Description]:
    """This library's backends, those that do not run here included: their reasons say why."""
    from ..accuracy.providers.ours import Backend

    names = [b.name for b in dispatch.backends_of("decode")]
    available = dispatch.available_backends()
    return [
        replace(
            providers.describe(name, Backend(name)),
            reason="runs here" if name in available else "does not run here",
        )
        for name in names
    ]


def _one(spec: str, time_limit: float) -> Description:
    name, elsewhere, _ = spec.partition("@")
    known = providers.describe(name, None) if not elsewhere else None
    if known is not None and not known.installed:
        return known
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        provider = make_provider(spec, device, isolate=True, limit=time_limit)
    except ValueError as error:
        cause = error.__cause__
        if elsewhere and not isinstance(cause, (Raised, Crashed, Hung, NotOffered)):
            raise
        words = {Crashed: "crashed", Hung: "hung", NotOffered: "refuses", Raised: "not importable"}
        word = words.get(type(cause), "not importable")  # type: ignore[arg-type]
        title = known.title if known is not None else providers.adapter(name).TITLE
        return Description(spec, title, True, f"{word}: {cause}")
    assert isinstance(provider, IsolatedProvider)
    with provider:
        return replace(Description.from_json(provider.describe()), name=spec)
