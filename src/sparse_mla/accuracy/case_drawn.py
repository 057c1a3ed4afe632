"""Cases of one call that a `Draw` describes, in one line each."""

from __future__ import annotations

from typing import Any

import torch

from .case import Case, Inputs
from .case_inputs import Draw, draw


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
