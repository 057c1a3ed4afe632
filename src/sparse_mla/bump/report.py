"""The bump report: one self-contained file, HTML or Markdown, English or Chinese.

Everything that comes from providers, repositories and users is data: HTML is escaped by jinja2,
Markdown by `_cell`, and links are made only of http and https addresses.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..accuracy.gate import BAD, CRASHED, HUNG
from .changes import Changes, Commit, read_changes
from .compare import (
    BETTER,
    NOT_COMPARABLE,
    SAID,
    SAME,
    WORSE,
    CaseVerdict,
    Comparison,
    error_of,
    passes,
)
from .git import is_full_hash, require_repository
from .pins import Pin, all_pins
from .risks import find_risks
from .words import Words

SHOWN_FILES = 30
SHOWN_COMMITS = 20
SHOWN_CASES = 30


@dataclass(frozen=True)
class Context:
    """What the user gives a report besides the comparison."""

    why: str = ""
    checkout: Path | None = None
    commits: tuple[str, str] = ("", "")
    pins: tuple[Pin, ...] = ()

    @classmethod
    def gather(
        cls,
        *,
        why: str = "",
        checkout: Path | None = None,
        commits: tuple[str, str] = ("", ""),
        files: dict[str, list[Path]] | None = None,
    ) -> Context:
        """Read the build files; ValueError for one that cannot be read."""
        if checkout is not None:
            require_repository(checkout)
        pins = [
            pin
            for kind, paths in (files or {}).items()
            for path in paths
            for pin in all_pins(kind, path)
        ]
        return cls(why, checkout, commits, tuple(pins))


def check_report(path: Path | None, language: str) -> None:
    """ValueError for a language or a kind of file that there is not."""
    Words(language)
    if path is not None and path.suffix not in (".html", ".md"):
        raise ValueError(f"--report {path}: must end in .html or .md")


def write_report(comparison: Comparison, context: Context, path: Path, language: str) -> None:
    check_report(path, language)
    path.write_text(render(comparison, context, language, path.suffix), encoding="utf-8")


def redraw(source: Path, target: Path, language: str) -> str | None:
    """Draw the report of a saved comparison; its summary, None if the file is none.

    Raises:
        ValueError: a comparison that is damaged, a language or kind of file that there is not.
        OSError: the report cannot be written.
    """
    from .saved import comparison_from, is_comparison

    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not is_comparison(data):
        return None
    comparison = comparison_from(data, str(source))
    write_report(comparison, Context(), target, language)
    return comparison.summary


def render(comparison: Comparison, context: Context, language: str, suffix: str = ".html") -> str:
    """The report's text."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sparse_mla.bump"),
        autoescape=suffix == ".html",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    view = View(comparison, context, Words(language))
    environment.filters["cell"] = _cell
    environment.filters["link"] = _is_link
    plots = {}
    if suffix == ".html":
        from . import plots as drawing

        plots = {
            "errors": drawing.errors(view.moved(drawing.SHOWN)),
            "speed": drawing.speed(comparison.speed),
        }
    template = environment.get_template(f"bump{suffix}.j2")
    return template.render(v=view, w=view.words, c=comparison, plots=plots)


class View:
    """What the templates show, put into words."""

    def __init__(self, comparison: Comparison, context: Context, words: Words) -> None:
        self.comparison, self.context, self.words = comparison, context, words
        sides = comparison.about.get("sides", {})
        self.sides = {
            name: _side(sides.get(name, {}), context.commits[k])
            for k, name in enumerate(("base", "candidate"))
        }
        self.why = context.why or str(comparison.about.get("why", ""))
        self.changes = self._changes()
        names = [str(self.sides[side]["spec"]).partition("@")[0] for side in self.sides]
        self.name = " → ".join(dict.fromkeys(names))
        self.good = passes(
            [c.candidate for c in comparison.cases if c.candidate["status"] != "not_offered"]
        )

    def _changes(self) -> Changes | None:
        old, new = (self.sides[side]["commit"] for side in ("base", "candidate"))
        checkout = self.context.checkout
        if checkout is None or not (is_full_hash(old) and is_full_hash(new)):
            return None
        ops = [op.op for op in self.comparison.ops if op.verdict != NOT_COMPARABLE]
        try:
            return read_changes(checkout, old, new, ops)
        except ValueError:
            return None

    @property
    def summary(self) -> str:
        """The report in one sentence."""
        w = self.words
        old, new = (self.sides[side]["short"] for side in ("base", "candidate"))
        parts = [self._numbers(), *self._fault_changes()]
        what = f"{self.name} {old} → {new}" if "→" not in self.name else self.name
        head = f"{what}{w.colon}{w(self.comparison.verdict)}"
        return w.sentence(head + w.comma + w.comma.join(part for part in parts if part))

    def _numbers(self) -> str:
        moved = [
            (error_of(c.base), error_of(c.candidate))
            for c in self.comparison.cases
            if c.verdict in (BETTER, WORSE)
        ]
        pairs = [(a, b) for a, b in moved if a is not None and b is not None]
        finite = [(a, b) for a, b in pairs if math.isfinite(a + b)]
        if not finite:
            return "" if moved else self.words("summary_same")
        before, after = median(a for a, _ in finite), median(b for _, b in finite)
        return self.words("summary_numbers", before=before, after=after)

    def _fault_changes(self) -> list[str]:
        old, new = (self._fault(side) for side in ("base", "candidate"))
        found = []
        if old and old != new:
            found.append(self.words("gone", fault=old))
        if new:
            found.append(self.words("stays" if new == old or old else "comes", fault=new))
        return found

    def _fault(self, side: str) -> str | None:
        name = self.comparison.diagnoses.get(side, {}).get("fault")
        return None if name is None else str(name)

    @property
    def recommendation(self) -> str:
        w, verdict = self.words, self.comparison.verdict
        if verdict == WORSE:
            return w("dont", reason=w(self._why_worse()))
        if verdict == NOT_COMPARABLE:
            return w("undecided")
        if verdict == BETTER:
            return w("do" if self.good else "do_knowing")
        return w("neutral" if self.good else "neutral_bad")

    def _why_worse(self) -> str:
        worse = [case for case in self.comparison.cases if case.verdict == WORSE and case.by_status]
        if any(case.kind == "broken" for case in worse):
            return "reason_status"
        if worse:
            return "reason_lost"
        accuracy = any(op.verdict == WORSE for op in self.comparison.ops)
        return "reason_error" if accuracy else "reason_speed"

    @property
    def remaining(self) -> str:
        """What is left of the error, and what would remove it."""
        w, left = self.words, self.comparison.remains
        if left is None:
            bad = sum(case.candidate["status"] in BAD for case in self.comparison.cases)
            return w("remain_other", n=bad) if bad else w("remain_nothing")
        facts = {"n": left["cases"], "median": left["median"], "without": left["without"] or "?"}
        if not left["fault"]:
            return w("remain_unnamed", **facts)
        key = "remain_exact" if left["exact_read"] else "remain_fault"
        return w(key, fault=w.fault(left["fault"], left["about"]), **facts)

    def told(self, side: str) -> str:
        """The fault named on a side."""
        w, entry = self.words, self.comparison.diagnoses.get(side)
        if entry is None:
            rows = self.comparison.side(side)
            return w("unnamed") if any(r["status"] in BAD for r in rows) else w("none_named")
        if entry.get("fault"):
            from ..accuracy.faults import get_fault

            return w.fault(entry["fault"], get_fault(entry["fault"]).about)
        if self.words.language == "en":
            return str(entry["text"])
        tied = re.findall(r"[a-z]+(?:_[a-z0-9]+)+", str(entry["text"]))
        return w("unnamed") + (f"（{'、'.join(tied)}）" if tied else "")

    @property
    def risks(self) -> list[tuple[bool, str]]:
        """(grave, sentence)."""
        found = find_risks(self.comparison, self.changes, self.context.pins)
        return [
            (r.grave, self.words.sentence(self.words(f"risk_{r.kind}", **r.facts))) for r in found
        ]

    @property
    def machine(self) -> list[tuple[str, str]]:
        about = self.comparison.about
        kept = ("device", "driver", "torch", "triton", *SAID)
        return [(key, str(about[key])) for key in kept if key in about]

    @property
    def related(self) -> tuple[list[Commit], list[Commit]]:
        """Repairs within the change, and later commits on the same files."""
        if self.changes is None:
            return [], []
        inside = [c for c in self.changes.commits if c.repair]
        return inside[:SHOWN_COMMITS], list(self.changes.later[:SHOWN_COMMITS])

    @property
    def files(self) -> list[Any]:
        """Those that touch the ops first."""
        if self.changes is None:
            return []
        return sorted(self.changes.files, key=lambda f: not f.touches)[:SHOWN_FILES]

    def moved(self, most: int = SHOWN_CASES) -> list[CaseVerdict]:
        """The cases that differ most, in the catalogue's order."""
        comparable = [
            case
            for case in self.comparison.cases
            if case.verdict != NOT_COMPARABLE and case.op != "kv_write"
        ]
        kept = {case.case for case in sorted(comparable, key=_moved, reverse=True)[:most]}
        return [case for case in comparable if case.case in kept]

    def op_error(self, op: Any) -> str:
        if op.errors is None:
            return "–"
        return f"{op.errors.ratio:.3g} (p {op.errors.p:.2g}, n {op.errors.pairs})"

    def told_by_case(self, side: str) -> str:
        """How many failed cases each fault explains, and how many crashed or hung."""
        rows = self.comparison.side(side)
        counts = Counter(
            row["fault"] or self.words("unnamed") for row in rows if "fault" in row
        ) + Counter(self.words(row["status"]) for row in rows if row["status"] in (CRASHED, HUNG))
        return ", ".join(f"{name} {n}" for name, n in counts.most_common())

    def op_cases(self, op: Any) -> str:
        order = (BETTER, SAME, WORSE, NOT_COMPARABLE)
        counts = [f"{op.cases[word]} {self.words(word)}" for word in order if word in op.cases]
        return ", ".join(counts)

    @property
    def how_timed(self) -> str:
        found = {
            row.get(f"{s}_how") for row in self.comparison.speed for s in ("base", "candidate")
        }
        return "; ".join(sorted(h for h in found if h))

    def metric(self, row: dict[str, Any], name: str, form: str) -> str:
        value = (row["metrics"] or {}).get(name)
        return format(value, form) if isinstance(value, (int, float)) else "–"

    def timed(self, row: dict[str, Any], side: str) -> str:
        if row[side] is None:
            return str(row.get(f"{side}_why", "–"))
        low, middle, high = row[side]
        return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def _side(side: dict[str, Any], given: str) -> dict[str, Any]:
    origin = side.get("origin", {})
    commit = given or side.get("commit") or origin.get("commit", "")
    version = origin.get("version", "")
    short = commit[:7] if commit else version or str(side.get("spec", "?")).partition("@")[0]
    return {
        "commit": commit,
        "version": version,
        "short": short,
        "spec": str(side.get("spec", "?")),
        "architectures": list(side.get("architectures", ())),
    }


def _moved(case: CaseVerdict) -> tuple[float, float]:
    """How much a case moved; then how large its error is."""
    after = error_of(case.candidate) or 0.0
    if case.by_status and case.verdict != SAME:
        return (1e6, after)
    ratio = case.ratio
    if ratio is None or ratio <= 0 or not math.isfinite(ratio):
        return (0.0, 0.0)
    return (abs(math.log(ratio)), after)


def _cell(value: Any) -> str:
    """Text for Markdown: nothing in it is markup, a link, HTML or the end of a table's cell."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)
    # What GitHub would turn into links or mentions by itself.
    return re.sub(r"(https?):(?=//)|\b(www)\.|@", lambda m: _broken(m.group()), text)


def _broken(text: str) -> str:
    return {"@": "&#64;", "www.": "www&#46;"}.get(text, text.replace(":", "&#58;"))


def _is_link(text: str) -> bool:
    return re.fullmatch(r"https?://[\w./#?=&%~+:@,-]+", text) is not None


def finite(value: Any) -> Any:
    """A copy for JSON, which has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [finite(entry) for entry in value]
    return value
