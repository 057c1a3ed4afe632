"""Comparisons that `compare --json` wrote, read back to draw their report again."""

from __future__ import annotations

from typing import Any

from ..accuracy.check import STATUS_WORDS
from ..accuracy.faults import get_fault
from .compare import BETTER, FORMAT, NOT_COMPARABLE, SAME, WORSE, CaseVerdict, Comparison, OpVerdict
from .paired import Paired

_VERDICTS = (BETTER, SAME, WORSE, NOT_COMPARABLE)
_ROW_TEXTS = ("case", "op", "about", "implementation", "detail")


def is_comparison(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == FORMAT


def comparison_from(data: dict[str, Any], where: str) -> Comparison:
    """The comparison in a JSON object; ValueError if it is not one that compare wrote."""
    try:
        cases = tuple(_case(entry) for entry in data["cases"])
        ops = tuple(_op(entry) for entry in data["ops"])
        about, diagnoses = dict(data["about"]), dict(data["diagnoses"])
        for entry in diagnoses.values():
            _text(entry["text"])
            if entry.get("fault") is not None:
                get_fault(_text(entry["fault"]))
        about["sides"] = {side: _side(about["sides"][side]) for side in ("base", "candidate")}
        return Comparison(
            about,
            _one_of(data["verdict"], _VERDICTS),
            _text(data["reason"]),
            ops,
            cases,
            diagnoses,
            tuple(_speed(row) for row in data["speed"]),
            None if data["remains"] is None else _remains(data["remains"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is not what compare --json wrote: {error!r}") from error


def _case(entry: dict[str, Any]) -> CaseVerdict:
    return CaseVerdict(
        _text(entry["case"]),
        _text(entry["op"]),
        _text(entry["about"]),
        _one_of(entry["verdict"], _VERDICTS),
        _text(entry["reason"]),
        bool(entry["by_status"]),
        _text(entry["kind"]),
        _row(entry["base"]),
        _row(entry["candidate"]),
        _paired(entry["rows"]),
    )


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    row = dict(entry)
    for name in _ROW_TEXTS:
        _text(row[name])
    _one_of(row["status"], tuple(STATUS_WORDS))
    row["metrics"] = None if row["metrics"] is None else dict(row["metrics"])
    row["seconds"] = float(row["seconds"])
    return row


def _op(entry: dict[str, Any]) -> OpVerdict:
    counts = {_one_of(word, _VERDICTS): int(n) for word, n in entry["cases"].items()}
    verdict = _one_of(entry["verdict"], _VERDICTS)
    errors = _paired(entry["errors"])
    return OpVerdict(_text(entry["op"]), verdict, _text(entry["reason"]), counts, errors)


def _paired(entry: dict[str, Any] | None) -> Paired | None:
    if entry is None:
        return None
    numbers = {name: float(entry[name]) for name in ("ratio", "p", "lower", "higher")}
    return Paired(int(entry["pairs"]), **numbers)


def _side(entry: dict[str, Any]) -> dict[str, Any]:
    side = dict(entry)
    _text(side["spec"])
    side["origin"] = dict(side["origin"])
    for key in ("commit", "version"):
        _text(side["origin"].get(key, ""))
    side["architectures"] = [_text(name) for name in side.get("architectures", [])]
    for offer in side.get("offers", []):
        texts = [_text(offer[key]) for key in ("op", "layout", "reason")]
        if len(texts) != 3 or not isinstance(offer["ok"], bool):
            raise ValueError(f"{offer!r} is no offer")
    runtime = side.get("runtime", {})
    side["runtime"] = {"torch": _text(runtime["torch"])} if "torch" in runtime else {}
    return side


def _speed(entry: dict[str, Any]) -> dict[str, Any]:
    row = dict(entry)
    _text(row["workload"])
    for side in ("base", "candidate"):
        if row[side] is not None:
            low, middle, high = row[side]
            row[side] = [float(low), float(middle), float(high)]
    if row["ratio"] is not None:
        row["ratio"] = float(row["ratio"])
        if row["base"] is None or row["candidate"] is None:
            raise ValueError("a ratio of times that are not there")
    return row


def _remains(entry: dict[str, Any]) -> dict[str, Any]:
    fault, without = entry["fault"], entry["without"]
    return {
        "fault": None if fault is None else _text(fault),
        "about": _text(entry["about"]),
        "exact_read": bool(entry["exact_read"]),
        "cases": int(entry["cases"]),
        "median": float(entry["median"]),
        "without": None if without is None else float(without),
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be text")
    return value


def _one_of(value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return str(value)
