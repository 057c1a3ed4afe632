"""`sparse-mla bisect`: git bisect driven by the gate, in the user's checkout, resumable.

The gate runs in full at both ends. The cases on which the bad end is worse tell the ends apart, and
on every commit between only those run (the `TELLING` most telling): a commit is like the end that
more of its cases are nearer to. So the ends need not pass or fail as a whole, and a repair is found
like a break: where the bad end is older, the first repaired commit is looked for.

What was measured is kept beside git's own bisect files until the end; after an interruption the
same command goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..accuracy.case import Case
from ..accuracy.gate import FAILED, NOT_OFFERED, NOT_RUN
from .build import BuildError, built
from .compare import WORSE, error_of, judge_case
from .git import git, is_ancestor, require_clean, require_repository, resolve, subject
from .trial import Settings, at, try_provider

FORMAT = "sparse_mla.bisect/1"
TELLING = 8
GOOD, BAD, SKIP = "good", "bad", "skip"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    provider: str
    good: str
    bad: str
    checkout: Path
    build: str


@dataclass(frozen=True)
class Found:
    """How a bisect ended.

    Attributes:
        commit: the first bad (or first repaired) commit; "" if only skipped ones are left.
        repaired: the bad end is the older one: this commit repairs.
        candidates: the commits it must be among, if `commit` is "".
        fault: the fault that the diagnosis names on the bad side of the turn, None if none.
        diagnosis: its sentence.
        left: the diagnosis after a repair, "" if nothing is wrong there.
        case: the case that shows the turn most clearly; `before` and `after` its errors.
    """

    commit: str
    subject: str
    repaired: bool
    candidates: tuple[str, ...]
    fault: str | None
    diagnosis: str
    left: str
    case: str
    before: str
    after: str
    tested: int
    skipped: int

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


class _State:
    """What is known so far, saved after every commit."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.head = ""
        self.ends: dict[str, dict[str, Any]] = {}
        self.telling: list[str] = []
        self.commits: dict[str, dict[str, Any]] = {}
        self.started = False

    def save(self) -> None:
        data = {"format": FORMAT, **{k: v for k, v in vars(self).items() if k != "path"}}
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(self.path)

    @classmethod
    def load(cls, path: Path, key: dict[str, Any]) -> _State:
        """The state of an interrupted run of the same command, or a new one.

        Raises:
            ValueError: another bisect was interrupted here.
        """
        state = cls(path, key)
        if not path.exists():
            return state
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = data["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to start again") from error
        if data.get("format") != FORMAT or known != key:
            raise ValueError(
                f"another bisect was interrupted here ({str(known.get('good'))[:12]} to "
                f"{str(known.get('bad'))[:12]}): finish it, or remove {path} and run "
                "`git bisect reset`"
            )
        for name in ("head", "ends", "telling", "commits", "started"):
            setattr(state, name, data[name])
        return state


def bisect(request: Request, settings: Settings, note: Note = lambda line: None) -> Found:
    """Find the commit between `good` and `bad` where the gate's answers turn.

    Raises:
        ValueError: bad input, an end that does not build, or ends that do not differ; the checkout
            is back where it was.
    """
    require_repository(request.checkout)
    folder = Path(git(request.checkout, "rev-parse", "--show-toplevel"))
    good, bad = resolve(folder, request.good), resolve(folder, request.bad)
    if good == bad:
        raise ValueError(f"good and bad are the same commit {good}")
    key = {
        "good": good,
        "bad": bad,
        "build": request.build,
        "provider": request.provider,
        "cases": settings.cases,
        "seed": settings.seed,
        "limit": settings.limit,
        "device": str(settings.device),
    }
    path = Path(git(folder, "rev-parse", "--git-path", "sparse-mla-bisect.json"))
    state = _State.load(path if path.is_absolute() else folder / path, key)
    under_way = _under_way(folder)
    if under_way and not state.started:
        raise ValueError(f"a git bisect is under way in {folder}: run git bisect reset first")
    if state.started and not under_way:
        state = _State(state.path, key)
    require_clean(folder)
    search = _Search(request, settings, folder, state, note)
    if not state.head:
        state.head = _head(folder)
        # Before anything is checked out: an interruption must not lose where the user was.
        state.save()
    try:
        search.measure_ends(good, bad)
        result = search.run(good, bad)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        search.give_up()
        raise
    search.give_up()
    return result


def _head(folder: Path) -> str:
    """The branch that is checked out, or the commit."""
    try:
        return git(folder, "symbolic-ref", "--quiet", "--short", "HEAD")
    except ValueError:
        return git(folder, "rev-parse", "HEAD")


def _under_way(folder: Path) -> bool:
    path = Path(git(folder, "rev-parse", "--git-path", "BISECT_START"))
    return (path if path.is_absolute() else folder / path).exists()


class _Search:
    def __init__(
        self, request: Request, settings: Settings, folder: Path, state: _State, note: Note
    ) -> None:
        self.request, self.settings, self.folder = request, settings, folder
        self.state, self.note = state, note
        self.catalogue = settings.catalogue()

    def give_up(self) -> None:
        """Put the checkout back and forget what was measured."""
        git(self.folder, "reset", "--hard", "--quiet")
        if _under_way(self.folder):
            git(self.folder, "bisect", "reset")
        if _head(self.folder) != self.state.head:
            git(self.folder, "checkout", "--quiet", self.state.head)
        self.state.path.unlink(missing_ok=True)

    def measure_ends(self, good: str, bad: str) -> None:
        """The gate at both ends, and the cases on which they differ."""
        for name, commit in ((GOOD, good), (BAD, bad)):
            if name not in self.state.ends:
                self.note(f"{name} end {commit[:12]}")
                git(self.folder, "checkout", "--quiet", "--detach", commit)
                self.state.ends[name] = self.measure(commit, self.catalogue)
                git(self.folder, "reset", "--hard", "--quiet")
                self.state.save()
        if self.state.telling:
            return
        rows = {name: self.state.ends[name]["rows"] for name in (GOOD, BAD)}
        verdicts = [judge_case(rows[GOOD][name], rows[BAD][name]) for name in rows[GOOD]]
        worse = [v for v in verdicts if v.verdict == WORSE]
        if not worse:
            better = [v for v in verdicts if v.verdict == "better"]
            hint = ": is it the other way round?" if better else ""
            raise ValueError(
                f"the bad end is not worse than the good one in any of {len(verdicts)} cases{hint}"
            )
        # Cases past 2^31 bytes cost most and tell little that others do not.
        worse.sort(key=lambda v: ("offsets" in v.case, -_distance(v.base, v.candidate)))
        self.state.telling = [v.case for v in worse[:TELLING]]
        self.state.save()

    def measure(self, commit: str, cases: Sequence[Case]) -> dict[str, Any]:
        """Build what is checked out and run the gate; rows by case, and the diagnosis."""
        with built(self.request.build, self.folder, commit) as place:
            report, _ = try_provider(at(self.request.provider, place), self.settings, cases)
        told = report.diagnoses[0] if report.diagnoses else {"fault": None, "text": ""}
        return {
            "rows": {row["case"]: row for row in report.results},
            "fault": told["fault"],
            "text": told["text"],
            "summary": report.summary,
        }

    def run(self, good: str, bad: str) -> Found:
        """Drive git bisect to its end."""
        repaired = is_ancestor(self.folder, bad, good)
        old, new = (bad, good) if repaired else (good, bad)
        if not self.state.started:
            git(self.folder, "bisect", "start", "--term-old=before", "--term-new=after", new, old)
            self.state.started = True
            self.state.save()
        said = ""
        while True:
            found = self._ended(said, repaired, good, bad)
            if found is not None:
                return found
            commit = git(self.folder, "rev-parse", "HEAD")
            word = self.label(commit)
            term = "before" if (word == BAD) == repaired else "after"
            said = self._step("skip" if word == SKIP else term)

    def _step(self, term: str) -> str:
        git(self.folder, "reset", "--hard", "--quiet")
        try:
            return git(self.folder, "bisect", term)
        except ValueError as error:
            # "only skipped commits left" and "the merge base is bad" end with a status.
            if "skip" in str(error):
                return str(error)
            raise

    def label(self, commit: str) -> str:
        """good, bad or skip, measured or remembered."""
        known = self.state.commits.get(commit)
        if known is None:
            known = self._measure_label(commit)
            self.state.commits[commit] = known
            self.state.save()
        self.note(f"{known['label']:4} {commit[:12]} {subject(self.folder, commit)}")
        return str(known["label"])

    def _measure_label(self, commit: str) -> dict[str, Any]:
        names = set(self.state.telling)
        try:
            made = self.measure(commit, [c for c in self.catalogue if c.name in names])
        except BuildError as error:
            return {"label": SKIP, "text": str(error)}
        except ValueError as error:  # built, and cannot be imported
            return {"label": SKIP, "text": str(error)}
        votes = []
        for name, row in made["rows"].items():
            if row["status"] in (NOT_OFFERED, NOT_RUN):
                continue
            to_good = _distance(self.state.ends[GOOD]["rows"][name], row)
            votes.append(to_good <= _distance(self.state.ends[BAD]["rows"][name], row))
        if not votes:
            return {"label": SKIP, "text": "offers none of the telling cases"}
        for row in made["rows"].values():
            # Only the ends' single rows are compared; the state is saved after every commit.
            if row["metrics"]:
                row["metrics"] = {"multiple": row["metrics"]["multiple"]}
        return {"label": GOOD if 2 * sum(votes) >= len(votes) else BAD, **made}

    def _ended(self, said: str, repaired: bool, good: str, bad: str) -> Found | None:
        """The result, once git bisect has one."""
        log = git(self.folder, "bisect", "log")
        first = [line for line in log.splitlines() if line.startswith("# first after commit:")]
        if first:
            commit = first[0].split("[", 1)[1].split("]", 1)[0]
            return self._result(commit, (), repaired, good, bad)
        possible = [
            line.split("[", 1)[1].split("]", 1)[0]
            for line in log.splitlines()
            if line.startswith("# possible first after commit:")
        ]
        if possible:
            return self._result("", tuple(possible), repaired, good, bad)
        return None

    def _known(self, commit: str, good: str, bad: str) -> dict[str, Any] | None:
        """What was measured at a commit, the ends included."""
        if commit in (good, bad):
            return self.state.ends[GOOD if commit == good else BAD]
        found = self.state.commits.get(commit)
        return found if found and found["label"] != SKIP else None

    def _result(
        self, commit: str, candidates: tuple[str, ...], repaired: bool, good: str, bad: str
    ) -> Found:
        after = self._known(commit, good, bad) if commit else None
        parent = git(self.folder, "rev-parse", f"{commit}^") if commit else ""
        before = self._known(parent, good, bad) if parent else None
        old, new = (BAD, GOOD) if repaired else (GOOD, BAD)
        before, after = before or self.state.ends[old], after or self.state.ends[new]
        wrong, right = (before, after) if repaired else (after, before)
        case = max(self.state.telling, key=lambda c: _distance(right["rows"][c], wrong["rows"][c]))
        skipped = sum(c["label"] == SKIP for c in self.state.commits.values())
        return Found(
            commit=commit,
            subject=subject(self.folder, commit) if commit else "",
            repaired=repaired,
            candidates=candidates,
            fault=wrong["fault"],
            diagnosis=wrong["text"],
            left=right["text"],
            case=case,
            before=_in_words(before["rows"][case]),
            after=_in_words(after["rows"][case]),
            tested=len(self.state.commits) + len(self.state.ends) - skipped,
            skipped=skipped,
        )


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How unlike two results of a case are: log ratio of errors, more for another word."""
    if one["status"] == other["status"] != FAILED and one["status"] != "passed":
        return 0.0
    a, b = error_of(one), error_of(other)
    if a is None or b is None or math.isinf(a) or math.isinf(b):
        return 0.0 if one["status"] == other["status"] and a == b else 100.0
    return abs(math.log(max(a, 0.05) / max(b, 0.05)))


def _in_words(row: dict[str, Any]) -> str:
    error = error_of(row)
    word = row["status"].replace("_", " ")
    return word if error is None or math.isinf(error) else f"{word}, {error:.3g}x ideal"
