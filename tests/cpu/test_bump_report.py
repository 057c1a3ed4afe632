"""The report: data stays data, both languages say the same, every risk has its sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from story_repository import git
from test_bump_compare import row
from typer.testing import CliRunner

from sparse_mla.accuracy.faults import FAULTS
from sparse_mla.bump.changes import Changes, Commit, File, read_changes
from sparse_mla.bump.compare import Comparison, judge_report
from sparse_mla.bump.pins import Pin
from sparse_mla.bump.report import Context, finite, render
from sparse_mla.bump.risks import find_risks
from sparse_mla.bump.words import LANGUAGES, Words
from sparse_mla.cli import app

EVIL = (
    "<img src=x onerror=alert(1)>\n| a | **b** [c](javascript:d) `e` @f http://g.h www.i.j ~k~ "
    "{l} {0} $\\frac{$"
)
WORDS = Path(__file__).parents[2] / "src" / "sparse_mla" / "bump" / "words"


def side(**origin: Any) -> dict[str, Any]:
    known = {"version": "1.0", "commit": "a" * 40, "dirty": False, "location": "x", "url": ""}
    return {"spec": "flash_mla", "origin": {**known, **origin}, "architectures": ["sm_90"],
            "offers": [], "runtime": {"torch": "2.13"}}  # fmt: skip


def comparison(*rows: dict[str, Any], **sides: Any) -> Comparison:
    about = {"device": "NVIDIA H200", "torch": "2.13", "architecture": "sm_90", "date": "d",
             "sides": {"base": side(), "candidate": side(commit="b" * 40), **sides}}  # fmt: skip
    return judge_report(about, rows or [row("passed"), row("passed", side="candidate")])


@pytest.mark.parametrize("suffix", [".html", ".md"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_given_is_rendered(language: str, suffix: str) -> None:
    rows = [row("passed", about=EVIL, case=EVIL), row("failed", side="candidate", case=EVIL,
                                                      detail=EVIL, about=EVIL)]  # fmt: skip
    evil = {"spec": EVIL, "origin": {"commit": EVIL, "version": EVIL}, "architectures": [EVIL],
            "offers": [{"op": "decode", "layout": EVIL, "ok": False, "reason": EVIL}],
            "runtime": {"torch": EVIL}}  # fmt: skip
    made = comparison(*rows, base=evil, candidate=evil)
    made.diagnoses["candidate"] = {"fault": None, "text": EVIL}
    made.about["torch"] = EVIL
    timed = {"workload": EVIL, "op": "decode", "ratio": None, "base": None, "candidate": None,
             "base_why": EVIL, "candidate_why": EVIL}  # fmt: skip
    made = Comparison(**{**made.__dict__, "speed": (timed,)})
    pin = Pin("cmake", Path(EVIL.replace("/", "")), EVIL, EVIL, "", (), 3, "moving")
    page = render(made, Context(why=EVIL, pins=(pin,)), language, suffix)
    assert "<img src=x" not in page
    if suffix == ".md":
        for text in ("**b**", "[c](", "`e`", "@f", "http://g.h", "www.i", "~k~"):
            assert text not in page, text
        for line in page.splitlines():
            if line.startswith("| "):
                assert "onerror" not in line or line.count(r"\|") > 0
    else:
        assert re.findall(r"<(script|iframe|object|link)\b", page) == []
        assert "href" not in page


def test_a_link_is_a_link_only_if_it_is_one() -> None:
    for why in ("javascript:alert(1)", 'http://x" onclick="y', "http://x y", "https://"):
        assert "href" not in render(comparison(), Context(why=why), "en")
    url = "https://github.com/sgl-project/sglang/issues/21291"
    assert f'<a href="{url}"' in render(comparison(), Context(why=url), "en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_need_nothing_else(language: str) -> None:
    page = render(comparison(), Context(), language)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_languages_have_the_same_sentences() -> None:
    tables = {
        name: tomlkit.parse((WORDS / f"{name}.toml").read_text()).unwrap() for name in LANGUAGES
    }
    abouts = tables["zh"].pop("fault_about")
    assert set(tables["en"]) == set(tables["zh"])
    for key, text in tables["en"].items():
        other = tables["zh"][key]
        assert type(text) is type(other)
        if isinstance(text, str):
            assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", other)), key
    assert set(abouts) == {fault.name for fault in FAULTS}


RISKS = {
    "not_passed": lambda: (comparison(row("passed"), row("crashed", side="candidate")), None, ()),
    "lost": lambda: (comparison(row("passed"), row("not_offered", side="candidate")), None, ()),
    "op_not_covered": lambda: (
        comparison(
            row("not_offered", op="prefill"), row("not_offered", side="candidate", op="prefill")),
        None, (),
    ),
    "layout_not_covered": lambda: (
        comparison(candidate={**side(), "offers": [
            {"op": "decode", "layout": "bf16", "ok": False, "reason": "FP8 only"}]}), None, (),
    ),
    "not_run": lambda: (comparison(row("passed"), row("not_run", side="candidate")), None, ()),
    "selection": lambda: (chosen(3, 291), None, ()),
    "architecture": lambda: (
        comparison(candidate={**side(), "architectures": ["sm_90", "sm_100"]}), None, ()),
    "inside_budget": lambda: (
        comparison(row("passed", 1.0), row("passed", 1.3, "candidate")), None, ()),
    "lse_inside_budget": lambda: (comparison(row("passed"), grown_lse()), None, ()),
    "speed_unmeasured": lambda: (comparison(), None, ()),
    "speed_lost": lambda: (timed(1.2), None, ()),
    "speed_partly": lambda: (timed(None), None, ()),
    "dirty": lambda: (comparison(candidate=side(dirty=True)), None, ()),
    "unknown_commit": lambda: (comparison(candidate=side(commit="9241ae3")), None, ()),
    "other_torch": lambda: (comparison(base={**side(), "runtime": {"torch": "2.9"}}), None, ()),
    "diverged": lambda: (comparison(), changes(forward=False), ()),
    "later": lambda: (comparison(), changes(later=(COMMIT,)), ()),
    "moving_ref": lambda: (comparison(), None, (pin("cmake", "main", "w"),)),
    "unpinned": lambda: (
        comparison(), None, (pin("requirements", ">1", ">1 is not a pin"),)),
    "no_hash": lambda: (
        comparison(), None, (pin("requirements", "1", "pinned by version, without a sha256"),)),
}  # fmt: skip
COMMIT = Commit("c" * 40, "2026-01-01", "Fix NaN", ("decode",), True)


def pin(kind: str, value: str, weakness: str) -> Pin:
    return Pin(kind, Path("x"), "n", value, "", (), 1, weakness)


def changes(**more: Any) -> Changes:
    files = (File("x.cu", 1, None, ("decode",)),)
    known = {"before": "a", "after": "b", "forward": True, "commits": (COMMIT,), "files": files,
             "dropped": (), "later": ()}  # fmt: skip
    return Changes(**{**known, **more})  # type: ignore[arg-type]


def chosen(cases: int, catalogue: int) -> Comparison:
    made = comparison()
    made.about.update(cases=cases, catalogue=catalogue)
    return made


def grown_lse() -> dict[str, Any]:
    made = row("passed", side="candidate")
    made["metrics"]["lse_err"] = 5e-6
    return made


def timed(ratio: float | None) -> Comparison:
    one = {
        "workload": "w",
        "op": "decode",
        "ratio": ratio,
        "base": [1, 2, 3],
        "candidate": [1, 2, 3],
    }
    return Comparison(**{**comparison().__dict__, "speed": (one,)})


@pytest.mark.parametrize("kind", RISKS)
def test_each_risk_is_found_and_has_a_sentence(kind: str) -> None:
    made, between, pins = RISKS[kind]()
    found = find_risks(made, between, pins)
    assert kind in [risk.kind for risk in found]
    for risk in found:
        for language in LANGUAGES:
            assert Words(language)(f"risk_{risk.kind}", **risk.facts)


def test_a_clean_comparison_has_no_risk_but_that_speed_is_unmeasured() -> None:
    for made in (comparison(), chosen(291, 291)):
        assert [risk.kind for risk in find_risks(made, changes(), ())] == ["speed_unmeasured"]


def test_a_saved_comparison_is_drawn_again(tmp_path: Path) -> None:
    saved = tmp_path / "c.json"
    made = comparison(row("failed", 9.0), row("passed", 1.0, "candidate"))
    saved.write_text(json.dumps(finite(made.as_json())))
    for language, word in (("en", "Bump. No case is worse"), ("zh", "建议升级")):
        page = tmp_path / f"{language}.html"
        result = CliRunner().invoke(app, ["report", str(saved), str(page), "--lang", language])
        assert result.exit_code == 0, result.output
        assert word in page.read_text()


DAMAGES = [(key, [{"x": EVIL}]) for key in ("cases", "ops", "about", "verdict", "speed", "remains")]
DAMAGES += [
    ("speed", [{"workload": "w", "base": None, "candidate": None, "ratio": 2.0}]),
    ("speed", [{"workload": "w", "base": ["a", 1, 2], "candidate": None, "ratio": None}]),
    ("diagnoses", {"base": {"text": "t", "fault": "gremlin"}}),
    ("about", {"sides": {"base": side(), "candidate": {**side(), "offers": [{"ok": 1}]}}}),
]


@pytest.mark.parametrize(("key", "value"), DAMAGES)
def test_a_damaged_comparison_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    saved, page = tmp_path / "c.json", tmp_path / "c.html"
    data = finite(comparison().as_json())
    data[key] = value
    saved.write_text(json.dumps(data))
    result = CliRunner().invoke(app, ["report", str(saved), str(page)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1 and "is not what compare" in result.stderr
    assert not page.exists()


def test_what_changed_where_histories_part(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")

    def commit(subject: str, **files: bytes) -> str:
        for name, data in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", subject)
        return git(tmp_path, "rev-parse", "HEAD")

    first = commit("start", README=b"x\n")
    base = commit("only in the base", **{"csrc__decode__splitkv.cu": b"a\n"})
    git(tmp_path, "checkout", "-q", first)
    kernel = {"csrc__prefill__fwd.cu": b"a\nb\n", "docs__decode.md": b"x", "image.bin": b"\0\1"}
    candidate = commit("Fix NaN | in <prefill>", **kernel, **{"csrc__\u00fc.cu": b"def prefill("})
    later = commit("Speed", **{"csrc__prefill__fwd.cu": b"c\n"})
    git(tmp_path, "branch", "-f", "main", later)
    found = read_changes(tmp_path, base, candidate, ["decode", "prefill"])
    assert not found.forward
    assert [c.subject for c in found.dropped] == ["only in the base"]
    assert [(c.subject, c.repair, c.touches) for c in found.commits] == [
        ("Fix NaN | in <prefill>", True, ("prefill",))
    ]
    assert [c.subject for c in found.later] == ["Speed"]
    files = {file.path: file for file in found.files}
    assert files["csrc/prefill/fwd.cu"].touches == ("prefill",)
    assert files["csrc/\u00fc.cu"].touches == ("prefill",)
    assert files["docs/decode.md"].touches == ()
    assert files["csrc/decode/splitkv.cu"].touches == ("decode",)
    assert (files["image.bin"].added, files["image.bin"].touches) == (None, ())
    with pytest.raises(ValueError, match=r"commit 1+ is not in"):
        read_changes(tmp_path, "1" * 40, candidate, ["decode"])
