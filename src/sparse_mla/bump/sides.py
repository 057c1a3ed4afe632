"""`sparse-mla compare`: start both sides in processes of their own, compare, and time them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..isolate.host import IsolatedProvider
from .compare import Comparison, Row, run_comparison
from .speed import compare_speed, workloads_on
from .trial import Settings, describe


def side_of(spec: str, provider: IsolatedProvider) -> dict[str, Any]:
    """What a report says of a side; where it lies in this machine's file system is not in it."""
    about = describe(provider).as_json()
    about["origin"]["location"] = Path(about["origin"]["location"]).name
    return {**about, "spec": spec, "runtime": provider.about}


def compare_sides(
    base: str,
    candidate: str,
    settings: Settings,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    *,
    speed: bool | None = None,
    samples: int = 20,
    only: str = "",
    note: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare two providers given as NAME or NAME@PATH.

    Args:
        speed: time both sides too; None where there is a GPU.
        only: time only workloads whose label holds this.

    Raises:
        ValueError: a provider that cannot be used, or no such workload.
    """
    timed = settings.device.type == "cuda" if speed is None else speed
    workloads = workloads_on(settings.device, only) if timed else []
    settings = replace(settings, on_result=on_result)
    with settings.provider(base, "base") as old, settings.provider(candidate, "candidate") as new:
        sides = {"base": side_of(base, old), "candidate": side_of(candidate, new)}

        def time_them() -> list[Row]:
            return compare_speed(old, new, workloads, settings.device, samples, note)

        with torch.no_grad():
            return run_comparison(
                old,
                new,
                settings.catalogue(),
                seed=settings.seed,
                device=settings.device,
                limit=settings.limit,
                sides=sides,
                speed=time_them if timed else None,
                on_result=settings.on_result,
            )
