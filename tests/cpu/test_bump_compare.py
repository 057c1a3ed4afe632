"""The rule of `compare`, its statistics, and what JUnit and JSON hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from story_repository import EXACT, POWER_OF_TWO, kernel
from typer.testing import CliRunner

from sparse_mla.accuracy.check import Report
from sparse_mla.bench import registry
from sparse_mla.bump import speed
from sparse_mla.bump.compare import (
    BETTER,
    NOT_COMPARABLE,
    SAME,
    WORSE,
    judge_all,
    judge_case,
    judge_op,
    judge_report,
)
from sparse_mla.bump.junit import junit
from sparse_mla.bump.paired import compare_pairs
from sparse_mla.bump.trial import Settings, refusal
from sparse_mla.cli import app


def row(
    status: str, error: float | None = 1.0, side: str = "base", rows: int = 64, **more: Any
) -> dict[str, Any]:
    metrics = None
    if error is not None:
        noise = np.random.default_rng(0).uniform(0.8, 1.2, rows)
        metrics = {"multiple": error, "budget": 1.7, "gain": 0.0, "lse_err": 1e-7,
                   "lse_budget": 1e-5, "row_multiples": list(error * noise)}  # fmt: skip
    known = {"case": "decode/x", "op": "decode", "about": "a", "implementation": side}
    return {**known, "status": status, "detail": "d", "seconds": 0.1, "metrics": metrics, **more}


STATUS_TABLE = {
    ("passed", "failed"): WORSE, ("passed", "crashed"): WORSE, ("passed", "hung"): WORSE,
    ("failed", "passed"): BETTER, ("crashed", "passed"): BETTER, ("hung", "passed"): BETTER,
    ("failed", "crashed"): WORSE, ("crashed", "failed"): BETTER, ("failed", "hung"): WORSE,
    ("crashed", "crashed"): SAME, ("crashed", "hung"): SAME, ("hung", "hung"): SAME,
    ("passed", "not_offered"): WORSE, ("failed", "not_offered"): BETTER,
    ("not_offered", "passed"): BETTER, ("not_offered", "failed"): WORSE,
    ("not_offered", "crashed"): WORSE, ("not_offered", "not_offered"): NOT_COMPARABLE,
    ("passed", "not_run"): NOT_COMPARABLE, ("not_run", "failed"): NOT_COMPARABLE,
    ("passed", "passed"): SAME, ("failed", "failed"): SAME,
}  # fmt: skip


@pytest.mark.parametrize(("words", "verdict"), STATUS_TABLE.items())
def test_words_decide_first(words: tuple[str, str], verdict: str) -> None:
    found = judge_case(row(words[0]), row(words[1], side="candidate"))
    assert found.verdict == verdict, found.reason


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (1.0, 1.04, SAME), (1.0, 1.06, WORSE), (1.06, 1.0, BETTER), (2.0, 1.0, BETTER),
        (0.0, 0.0, SAME), (math.nan, 2.0, BETTER), (2.0, math.nan, WORSE),
        (math.nan, math.nan, SAME),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", ["passed", "failed"])
def test_errors_decide_beyond_the_margin(
    status: str, before: float, after: float, verdict: str
) -> None:
    if math.isnan(before + after) and status == "passed":
        pytest.skip("a case that passed has an error")
    sides = [None if math.isnan(e) else e for e in (before, after)]
    found = judge_case(row(status, sides[0]), row(status, sides[1], "candidate"))
    assert found.verdict == verdict, found.reason
    assert not found.by_status or math.isnan(before + after)


def test_rows_that_disagree_are_chance() -> None:
    before, after = row("passed", 1.0), row("passed", 1.1, "candidate")
    flipped = sorted(after["metrics"]["row_multiples"], reverse=True)
    after["metrics"]["row_multiples"] = [v * (0.8 + 0.4 * (k % 2)) for k, v in enumerate(flipped)]
    before["metrics"]["row_multiples"] = flipped
    assert judge_case(before, after).verdict == SAME


@pytest.mark.parametrize(("after", "verdict"), [(1.5, SAME), (2.1, WORSE), (100.0, WORSE)])
def test_few_rows_need_a_factor_of_two(after: float, verdict: str) -> None:
    found = judge_case(row("passed", 1.0, rows=4), row("passed", after, "candidate", rows=4))
    assert found.verdict == verdict


def op_of(*pairs: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    return judge_op("decode", [judge_case(base, candidate) for base, candidate in pairs])


def test_an_op_is_worse_if_one_case_lost_its_word() -> None:
    better = (row("failed", 9.0), row("passed", 1.0, "candidate"))
    worse = (row("passed", 1.0), row("failed", 9.0, "candidate"))
    assert op_of(better, better).verdict == BETTER
    assert op_of(better, better, worse).verdict == WORSE
    assert "1 broken" in op_of(better, worse).reason


def test_an_op_by_errors() -> None:
    worse = (row("passed", 1.0), row("passed", 1.2, "candidate"))
    better = (worse[1], worse[0])
    same = (row("passed", 1.0), row("passed", 1.0, "candidate"))
    assert op_of(worse, worse).verdict == WORSE
    assert op_of(better, better).verdict == BETTER
    assert op_of(better, worse).verdict == SAME
    assert op_of(worse, *[same] * 9).verdict == SAME  # a risk, not a verdict
    assert op_of(*[same] * 3).verdict == SAME
    nothing = (row("not_offered", None), row("not_offered", None, "candidate"))
    assert op_of(nothing).verdict == NOT_COMPARABLE
    assert op_of(nothing, better).verdict == BETTER


def test_all_ops_and_speed() -> None:
    same = op_of((row("passed"), row("passed", side="candidate")))
    worse = op_of((row("passed"), row("failed", side="candidate")))
    better = op_of((row("failed"), row("passed", side="candidate")))
    none = op_of((row("not_offered"), row("not_offered", side="candidate")))
    slower, faster = [{"ratio": 1.3}, {"ratio": None}], [{"ratio": 0.7}]
    assert judge_all([same, better])[0] == BETTER
    assert judge_all([same, better, worse])[0] == WORSE
    assert judge_all([none])[0] == NOT_COMPARABLE
    assert judge_all([])[0] == NOT_COMPARABLE
    assert judge_all([same, none], slower)[0] == WORSE
    assert judge_all([same], faster)[0] == BETTER
    assert judge_all([better], slower)[0] == BETTER
    assert judge_all([worse], faster)[0] == WORSE


def test_sign_flips() -> None:
    draws = np.random.default_rng(1).uniform(1, 2, 200)
    shifted = compare_pairs(list(draws), list(draws * 1.1))
    assert shifted is not None
    assert shifted.ratio == pytest.approx(1.1) and shifted.p < 0.001 and shifted.higher == 1.0
    noise = np.random.default_rng(2).lognormal(0, 0.1, 200)
    chance = compare_pairs(list(draws), list(draws * noise))
    assert chance is not None and chance.p > 0.01
    same = compare_pairs([1.0, 2.0], [1.0, 2.0])
    assert same is not None and same.p == 1.0
    below = compare_pairs([0.001], [0.04])
    assert below is not None and below.ratio == 1.0
    assert compare_pairs([], []) is None
    with pytest.raises(ValueError, match="1 and 2 values are not pairs"):
        compare_pairs([1.0], [1.0, 2.0])


def test_p_is_calibrated() -> None:
    """Where nothing differs, p < 0.05 is seen in about one of twenty."""
    generator = np.random.default_rng(3)
    seen = []
    for _ in range(100):
        found = compare_pairs(
            list(generator.lognormal(0, 1, 30)), list(generator.lognormal(0, 1, 30))
        )
        assert found is not None
        seen.append(found.p)
    assert 0 <= sum(p < 0.05 for p in seen) <= 12


def comparison(**more: Any) -> Any:
    rows = [row("passed"), row("failed", side="candidate", detail="\x00<b>&\ud800", **more)]
    rows += [
        row("not_run", None, case="decode/y"),
        row("passed", None, "candidate", case="decode/y"),
    ]
    return judge_report({"sides": {}}, rows)


def test_junit_survives_any_message() -> None:
    suites = ElementTree.fromstring(junit(comparison()).partition("\n")[2])
    (suite,) = suites
    assert (suite.attrib["failures"], suite.attrib["skipped"], suite.attrib["tests"]) == (
        "1",
        "1",
        "2",
    )
    failure = suites.find(".//failure")
    assert failure is not None and "?<b>&?" in failure.attrib["message"]


def test_json_has_no_nan() -> None:
    from sparse_mla.bump.report import finite

    data = finite(comparison().as_json())
    json.dumps(data, allow_nan=False)
    assert "row_multiples" not in json.dumps(data)


SMALL = (
    registry.Workload("decode", "v32_fp8", 2, 1, 4, 64, 512),
    registry.Workload("decode", "bf16", 2, 1, 4, 64, 512),
)


def test_speed_of_both_sides_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, with small workloads; the toy kernel refuses bf16 caches."""
    monkeypatch.setattr(speed, "CPU_WORKLOADS", SMALL)
    for name, scales in (("old", EXACT), ("new", EXACT.replace("scales", "(slow(), scales)[1]"))):
        (tmp_path / name).mkdir()
        slow = "import time\ndef slow():\n    time.sleep(0.05)\n"
        (tmp_path / name / "toy_mla.py").write_text(slow + kernel(scales))
    saved, page = tmp_path / "c.json", tmp_path / "c.html"
    result = CliRunner().invoke(
        app,
        ["compare", f"toy_mla@{tmp_path / 'old'}", f"toy_mla@{tmp_path / 'new'}", "--device", "cpu",
         "--case", "decode/scales/amax", "--speed", "--samples", "3", "--json", str(saved),
         "--report", str(page)],
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "accuracy is the same" in result.stdout.splitlines()[-1]
    first, second = json.loads(saved.read_text())["speed"]
    assert first["ratio"] > 2 and first["candidate"][1] > 50_000
    assert first["base_error"] == pytest.approx(1.3, abs=0.5)
    assert first["base_how"] == "wall clock"
    assert second["ratio"] is None and "one FP8 cache" in second["base_why"]
    text = page.read_text()
    assert "slower, most in decode v32_fp8" in text
    assert "workloads that could not be timed on both sides: 1" in text


def test_given_commits_are_kept_for_later_reports(tmp_path: Path) -> None:
    saved, page = tmp_path / "c.json", tmp_path / "c.md"
    commits = ("1" * 40, "2" * 40)
    result = CliRunner().invoke(
        app,
        ["compare", "cpu", "cpu", "--device", "cpu", "--case", "decode/topk/1",
         "--base-commit", commits[0], "--candidate-commit", commits[1], "--json", str(saved)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["report", str(saved), str(page)])
    assert result.exit_code == 0, result.output
    assert all(commit in page.read_text() for commit in commits)


def test_a_kernel_whose_heads_are_padded_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FlashMLA: only 64 heads, and metadata that remember a call's heads, refused or not."""
    monkeypatch.setattr(speed, "CPU_WORKLOADS", SMALL[:1])
    from sparse_mla.accuracy.check import make_provider
    from sparse_mla.isolate.host import IsolatedProvider

    picky = """
class Metadata:
    heads = None

def get_mla_metadata():
    return Metadata(), None

def flash_mla_with_kvcache(q, *arguments):
    metadata = arguments[4]
    metadata.heads = metadata.heads or q.shape[2]
    assert metadata.heads == q.shape[2], "inconsistent with sched_meta"
    assert q.shape[2] == 64, "h_q must be 64"
    return any_heads(q, *arguments)
"""
    plain = kernel(EXACT).replace("def flash_mla_with_kvcache(", "def any_heads(")
    (tmp_path / "toy_mla.py").write_text(plain + picky)
    provider = make_provider(f"toy_mla@{tmp_path}", torch.device("cpu"), label="base")
    assert isinstance(provider, IsolatedProvider)
    with provider:
        (found,) = speed.compare_speed(provider, provider, SMALL[:1], torch.device("cpu"), 3)
    assert found["ratio"] is not None, found["base_why"]
    assert "heads and topk padded beforehand" in found["base_how"]


def test_a_wrong_answer_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CPU_WORKLOADS", SMALL[:1])
    from sparse_mla.accuracy.check import make_provider
    from sparse_mla.isolate.host import IsolatedProvider

    (tmp_path / "toy_mla.py").write_text(kernel(POWER_OF_TWO))
    provider = make_provider(f"toy_mla@{tmp_path}", torch.device("cpu"), label="base")
    assert isinstance(provider, IsolatedProvider)
    with provider:
        (found,) = speed.compare_speed(provider, provider, SMALL[:1], torch.device("cpu"), 3)
    assert found["ratio"] is None and "not timed" in found["base_why"]
    assert "relative L2" in found["base_why"]


@pytest.mark.parametrize(
    ("rows", "fault", "message"),
    [
        ([row("passed")], "", None),
        ([row("not_offered", None)], "", "nothing passed"),
        ([row("passed"), row("failed", 9.0)], "", "1 cases passed, 1 failed"),
        (
            [row("failed", 9.0), row("crashed", None, case="decode/z")],
            "scale_bf16",
            "decode/z crashed, which no fault explains",
        ),
        ([row("failed", 9.0)], "scale_bf16", "the failures are not scale_bf16"),
    ],
)
def test_what_is_not_acceptable(rows: list[Any], fault: str, message: str | None) -> None:
    found = refusal(Report({}, rows), fault, Settings(torch.device("cpu"), "quick"))
    assert found == message if message is None else message in str(found)


def test_a_fault_that_is_larger_than_its_model_is_not_accepted() -> None:
    """Named right, but twenty times as far off as rounding the scales to bf16 is."""
    settings = Settings(torch.device("cpu"), "quick")
    told = [{"implementation": "base", "fault": "scale_bf16", "text": "t"}]
    for error, message in ((1.9, None), (38.0, "scale_bf16 does not explain decode/gaussian")):
        rows = [row("failed", error, case="decode/gaussian"), row("passed")]
        found = refusal(Report({}, rows, told), "scale_bf16", settings)
        assert found == message if message is None else message in str(found)
