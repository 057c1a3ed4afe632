"""Short ways to write a case: one call that a `Draw` describes, or a function that makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .case import Case, Inputs
from .case_inputs import Draw, draw

Build = Callable[[int, str, torch.device], list[Inputs]]


def drawn(
    name: str,
    about: str,
    shows: tuple[str, ...] = (),
    *,
    repeats: int = 1,
    quick: bool = False,
    **fields: Any,
) -> Case:
    """A case of one call that a `Draw` describes."""
    spec = Draw(**fields)

    def build(seed: int, device: torch.device) -> list[Inputs]:
        return [draw(spec, seed, name, device)]

    return Case(name, spec.op, about, shows, build, repeats, quick)


def both(
    name: str, about: str, shows: tuple[str, ...] = (), *, layout: str = "bf16", **fields: Any
) -> list[Case]:
    """The same input for decode over v32_fp8 and for prefill over bf16 rows."""
    sizes = {"s_q": fields.pop("prefill_s_q", 4)}
    return [
        drawn(f"decode/{name}", about, shows, **fields),
        drawn(
            f"prefill/{name}",
            about,
            shows,
            **{**fields, "op": "prefill", "layout": layout, "page_size": 1, **sizes},
        ),
    ]


def made_case(
    name: str, about: str, shows: tuple[str, ...], build: Build, repeats: int = 1
) -> Case:
    """A case that a function makes, from the seed and the case's name."""

    def with_name(seed: int, device: torch.device) -> list[Inputs]:
        return build(seed, name, device)

    return Case(name, name.split("/")[0], about, shows, with_name, repeats)
