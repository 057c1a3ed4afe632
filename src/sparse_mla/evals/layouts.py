"""What layouts and faults do to a real model's predictions: SmolLM2-135M on GSM8K's texts.

Every layout's cache with this library's kernels, then every fault of the library in the first
layout where it changes anything, against the model over bf16 rows: KL, top-1 agreement,
perplexity. docs/evaluation.md reads the result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..accuracy.case import Inputs, WriteInputs
from ..accuracy.faults import FAULTS, CleanKernel, Fault
from ..accuracy.faults_kernel import EmulatedKernel
from .fidelity import RESAMPLES, Interval, bootstrap
from .smollm import Arrangement, Attend, Write, append, arrangements, attending, bf16_rows, own

FORMAT = "sparse_mla.layouts/1"

OnRow = Callable[[str, str], None]


@dataclass(frozen=True)
class Row:
    """A way to attend, measured on the texts.

    Attributes:
        layout: the arrangement's name; "" for the reference.
        fault: "" for this library's kernels, "clean" for the emulated kernel without a fault.
        kl: KL(reference || model) per token in nats, over texts with the bootstrap's interval.
        agreement: share of tokens at which both would choose the same next one.
        perplexity: of the texts.
        excess: KL beyond that of the emulated kernel without the fault, in the same layout.
        lost: texts for which there are no predictions: they hold NaN.
    """

    layout: str
    fault: str
    kl: Interval
    agreement: float
    perplexity: Interval
    excess: Interval
    lost: int
    seconds: float

    @property
    def seen(self) -> bool:
        """Whether the excess tells it from a healthy kernel: the whole interval is above 0."""
        return self.lost > 0 or self.excess.low > 0


@dataclass(frozen=True)
class Found:
    """The whole experiment. `silent` names faults that change nothing in any layout here."""

    about: dict[str, Any]
    reference: Row
    layouts: list[Row]
    clean: list[Row]
    faults: list[Row]
    silent: list[str]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load_found(path: Path) -> Found:
    """Read what `Found.save` wrote; ValueError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        rows = {name: [_row(row) for row in data[name]] for name in ("layouts", "clean", "faults")}
        return Found(**{**data, **rows, "reference": _row(data["reference"])})
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what eval layouts wrote: {error}") from error


def _row(data: dict[str, Any]) -> Row:
    intervals = {name: Interval(**data[name]) for name in ("kl", "perplexity", "excess")}
    return Row(**{**data, **intervals})


@dataclass(frozen=True)
class _Read:
    """Texts as one kernel read them: per text KL, tokens that agree, negative log-likelihood."""

    kl: list[float]
    same: list[int]
    loss: list[float]
    tokens: list[int]
    seconds: float


@torch.no_grad()
def run_layouts(
    model: Any,
    texts: Sequence[torch.Tensor],
    *,
    with_faults: bool = True,
    on_row: OnRow | None = None,
    about: dict[str, Any] | None = None,
) -> Found:
    """Measure everything.

    Args:
        texts: token ids [1, n] each.
        on_row: called with layout and fault before each is measured.
    """
    told = on_row or (lambda layout, fault: None)
    begun = time.monotonic()
    told("reference", "")
    with bf16_rows(model):
        expected = [_predict(model, ids) for ids in texts]
        base = _read(model, texts, expected)
    reference = _made("", "", base, base)
    layouts = []
    for arrangement in arrangements():
        told(arrangement.name, "")
        with attending(model, arrangement):
            read = _read(model, texts, expected)
        layouts.append(_made(arrangement.name, "", read, read))
    recorded = {}
    for arrangement in arrangements() if with_faults else ():
        recorded[arrangement] = _recorded(model, texts[0], arrangement)
    clean: dict[str, _Read] = {}
    rows: list[Row] = []
    silent: list[str] = []
    for fault in FAULTS if with_faults else ():
        # In layouts that it cannot touch, and without extra caches, say, a fault is no fault.
        where = next((a for a, calls in recorded.items() if shows(fault, calls)), None)
        if where is None:
            silent.append(fault.name)
            continue
        if where.name not in clean:
            told(where.name, "clean")
            with attending(model, where, *_sides(CleanKernel(), None)):
                clean[where.name] = _read(model, texts, expected)
        told(where.name, fault.name)
        with attending(model, where, *_sides(fault.kernel(), fault.op)):
            read = _read(model, texts, expected)
        rows.append(_made(where.name, fault.name, read, clean[where.name]))
    facts = {
        **(about or {}),
        "texts": len(texts),
        "tokens": sum(base.tokens),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - begun),
    }
    made = [_made(name, "clean", read, read) for name, read in clean.items()]
    return Found(facts, reference, layouts, made, sorted(rows, key=_damage, reverse=True), silent)


def _damage(row: Row) -> tuple[int, float]:
    return row.lost, row.kl.mean


def _sides(kernel: EmulatedKernel, op: str | None) -> tuple[Attend, Write]:
    """What attends and what writes: the emulated kernel reads, and writes where it is a writer."""
    if op == "kv_write":
        whole = CleanKernel()
        return _attending_with(whole), kernel.write
    return _attending_with(kernel), append


def _attending_with(kernel: EmulatedKernel) -> Attend:
    state = kernel.new_state()
    return lambda inputs: kernel.run(inputs, state).out


@dataclass(frozen=True)
class _Calls:
    """What some layers are asked, and given to write, by a healthy kernel on one text."""

    reads: list[Inputs]
    writes: list[WriteInputs]


def _recorded(model: Any, ids: torch.Tensor, arrangement: Arrangement) -> _Calls:
    """The calls of the first, the middle and the last layer."""
    layers = model.config.num_hidden_layers
    kept = (0, layers // 2, layers - 1)
    calls = _Calls([], [])
    pending: list[WriteInputs] = []

    def write(inputs: WriteInputs) -> None:
        # As it is before the tokens are written.
        before = replace(inputs.cache, pages=inputs.cache.pages.clone())
        pending.append(replace(inputs, cache=before))
        append(inputs)

    def watch(layer: int, inputs: Inputs) -> None:
        if layer in kept:
            calls.reads.append(inputs)
            calls.writes.extend(pending)
        pending.clear()

    with attending(model, arrangement, own, write, watch):
        model(ids, use_cache=False, logits_to_keep=1)
    return calls


def shows(fault: Fault, calls: _Calls) -> bool:
    """Whether the fault changes an output, or for a writer a byte, of these calls."""
    kernel, whole = fault.kernel(), CleanKernel()
    if fault.op == "kv_write":
        return any(_written_apart(kernel, whole, given) for given in calls.writes)
    state = kernel.new_state()
    for inputs in calls.reads:
        wrong = kernel.run(inputs, state).out
        right = whole.run(inputs, whole.new_state()).out
        if not torch.equal(wrong.nan_to_num(1e30), right.nan_to_num(1e30)):
            return True
    return False


def _written_apart(kernel: EmulatedKernel, whole: EmulatedKernel, given: WriteInputs) -> bool:
    pages = []
    for writer in (kernel, whole):
        cache = replace(given.cache, pages=given.cache.pages.clone())
        writer.write(replace(given, cache=cache))
        pages.append(cache.pages)
    return not torch.equal(*pages)


def _predict(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n - 1, vocabulary] of the tokens after the first."""
    return model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)


def _read(model: Any, texts: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> _Read:
    begun = time.monotonic()
    kl, same, loss, tokens = [], [], [], []
    for ids, want in zip(texts, expected, strict=True):
        got = _predict(model, ids)
        kl.append(float((want.exp() * (want - got)).sum(-1).mean()))
        same.append(int((want.argmax(-1) == got.argmax(-1)).sum()))
        loss.append(-float(got.gather(1, ids[0, 1:, None]).sum()))
        tokens.append(got.shape[0])
    return _Read(kl, same, loss, tokens, time.monotonic() - begun)


def _made(layout: str, fault: str, read: _Read, clean: _Read) -> Row:
    kept = [i for i, value in enumerate(read.kl) if math.isfinite(value)]
    zero = Interval(0.0, 0.0, 0.0)
    return Row(
        layout=layout,
        fault=fault,
        kl=bootstrap([read.kl[i] for i in kept]) if kept else zero,
        agreement=sum(read.same[i] for i in kept) / max(1, sum(read.tokens[i] for i in kept)),
        perplexity=_perplexity(
            [read.loss[i] for i in kept], [read.tokens[i] for i in kept]
        ) if kept else zero,
        excess=bootstrap([read.kl[i] - clean.kl[i] for i in kept]) if kept else zero,
        lost=len(read.kl) - len(kept),
        seconds=round(read.seconds, 1),
    )  # fmt: skip


def _perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Interval:
    """exp of the mean loss per token, texts drawn again for the interval."""
    loss, count = np.asarray(losses), np.asarray(tokens)
    drawn = np.random.default_rng(0).integers(0, len(loss), (RESAMPLES, len(loss)))
    low, high = np.quantile(np.exp(loss[drawn].sum(1) / count[drawn].sum(1)), (0.025, 0.975))
    return Interval(float(np.exp(loss.sum() / count.sum())), float(low), float(high))


def tables(found: Found) -> list[list[str]]:
    """Two Markdown tables as lines: layouts, then faults from the worst to the least."""
    head = "| layout | KL to bf16, nats per token | top-1 agreement | perplexity |"
    lines = [head, "|---|---|---|---|"]
    plain = _interval(found.reference.perplexity, ".2f")
    lines.append(f"| none: the model over bf16 rows | 0 | 100 % | {plain} |")
    for row in found.layouts:
        lines.append(
            f"| `{row.layout}` | {_interval(row.kl, '.2g')} | {100 * row.agreement:.1f} % | "
            f"{_interval(row.perplexity, '.2f')} |"
        )
    if not found.faults:
        return [lines]
    healthy = {row.layout: row.kl.mean for row in found.clean}
    head = (
        "| | fault | layout | KL to bf16 | of the healthy kernel's | top-1 agreement | perplexity |"
    )
    worse = [head, "|---|---|---|---|---|---|---|"]
    for place, row in enumerate(found.faults, 1):
        if row.lost == found.about["texts"]:
            numbers = "predictions are NaN | - | - | -"
        else:
            share = f"{row.kl.mean / healthy[row.layout]:.3g}x" if row.seen else "not told apart"
            lost = f", NaN in {row.lost} of {found.about['texts']} texts" if row.lost else ""
            numbers = (
                f"{_interval(row.kl, '.2g')}{lost} | {share} | {100 * row.agreement:.1f} % | "
                f"{row.perplexity.mean:.4g}"
            )
        worse.append(f"| {place} | `{row.fault}` | `{row.layout}` | {numbers} |")
    return [lines, worse]


def _interval(one: Interval, form: str) -> str:
    return f"{one.mean:{form}} ({one.low:{form}} to {one.high:{form}})"
