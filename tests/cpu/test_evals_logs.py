"""Logs, paired comparison, intervals and problem files: what needs no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_mla import KVCache
from sparse_mla.accuracy.case import Inputs
from sparse_mla.cli import app
from sparse_mla.evals import model as models
from sparse_mla.evals.compare import compare
from sparse_mla.evals.fidelity import bootstrap, fidelity
from sparse_mla.evals.generate import common_prefix, cut, padded
from sparse_mla.evals.log import Answered, Log, load_log
from sparse_mla.evals.problems import held_out
from sparse_mla.evals.tasks import problem_set


def log_of(rights: list[bool], first: int = 0, **about) -> Log:
    answered = [
        Answered(i, f"question {i}", str(i), str(i if right else -1), right, f" text\n#### {i}")
        for i, right in enumerate(rights, first)
    ]
    return Log({"layout": "bf16", "fault": None, **about}, answered)


def test_a_log_comes_back(tmp_path):
    log = log_of([True, False, True], task="problems")
    log.save(tmp_path / "a.jsonl")
    assert load_log(tmp_path / "a.jsonl") == log
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "format None"),
        ("{", "truncated"),
        ("[1]\n", "format None"),
        ('{"format": "other"}\n', "format 'other'"),
        ('{"format": "sparse_mla.eval/1"}\n', "no problems"),
        ('{"format": "sparse_mla.eval/1"}\n{"number": 1}\n', "not a problem's"),
    ],
)
def test_other_files_are_refused(tmp_path, text, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_log(path)


def test_wilson_and_mcnemar_are_what_textbooks_say():
    pytest.importorskip("scipy", reason="scipy is missing: pip install 'sparse-mla[eval]'")
    from sparse_mla.evals.shares import mcnemar, wilson

    share = wilson(81, 263)
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)  # Newcombe 1998
    assert wilson(5, 5).high == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 * 2**-10)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    with pytest.raises(ValueError, match="there must be answers"):
        wilson(0, 0)


def test_logs_are_compared_problem_by_problem():
    pytest.importorskip("scipy", reason="scipy is missing: pip install 'sparse-mla[eval]'")
    a = log_of([True, True, True, False, False])
    b = log_of([True, False, False, True, False, True])
    found = compare(a, b)
    assert (found.both, found.only_a, found.only_b, found.neither) == (1, 2, 1, 1)
    assert found.pairs == 5 and found.p == 1.0
    assert [one.number for one, _ in found.disagreements] == [1, 2, 3]


def test_logs_of_other_problems_are_not_compared():
    with pytest.raises(ValueError, match="no problem in common"):
        compare(log_of([True]), log_of([True], first=5))
    other = log_of([True])
    other.answered[0] = Answered(0, "another", "0", "0", True, "")
    with pytest.raises(ValueError, match="not the same"):
        compare(log_of([True]), other)


def test_compare_command(tmp_path):
    pytest.importorskip("scipy", reason="scipy is missing: pip install 'sparse-mla[eval]'")
    log_of([True, True, False]).save(tmp_path / "a.jsonl")
    log_of([True, False, False], fault="scale_bf16").save(tmp_path / "b.jsonl")
    done = CliRunner().invoke(
        app, ["eval", "compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    )
    assert done.exit_code == 0
    assert "only A 1, only B 0" in done.output
    assert "McNemar exact p = 1" in done.output
    assert "bf16 with scale_bf16" in done.output
    assert "not compared" not in done.output
    assert "question 1" in done.output


def test_compare_command_says_what_it_left_out(tmp_path):
    pytest.importorskip("scipy", reason="scipy is missing: pip install 'sparse-mla[eval]'")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    log_of([True, True, False]).save(paths[0])
    log_of([True, True], first=1).save(paths[1])
    done = CliRunner().invoke(app, ["eval", "compare", *map(str, paths)])
    assert "of 2 problems both answer 1" in done.output
    assert "not compared: 1 problems that only A holds, 0 that only B does" in done.output


def test_generated_problems_are_the_held_out_ones():
    found = problem_set("problems", limit=3)
    assert found.asked == held_out(3)
    assert len(found.shots) == 6


def write_gsm8k(folder: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for side in ("train", "test"):
        (folder / f"{side}.jsonl").write_text(text)


def test_gsm8k_from_local_files(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a\n#### 1,00{i}"} for i in range(7)]
    write_gsm8k(tmp_path, rows)
    found = problem_set("gsm8k", str(tmp_path), limit=2)
    assert [p.question for p in found.shots] == ["q0", "q1", "q2", "q3", "q4"]
    assert [p.target for p in found.asked] == ["1000", "1001"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"question": "q"}], "line 1 has no 'question' and 'answer'"),
        ([{"question": "q", "answer": "a"}], "no line '#### number'"),
        (["text"], "no 'question'"),
    ],
)
def test_files_in_another_form_are_refused(tmp_path, rows, problem):
    write_gsm8k(tmp_path, rows)
    with pytest.raises(ValueError, match=problem):
        problem_set("gsm8k", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("nothing",), "task is 'nothing', allowed: problems, gsm8k"),
        (("problems", "somewhere"), "need none"),
        (("problems", None, 0), "limit is 0"),
        (("gsm8k", "./nowhere"), "must be a folder"),
    ],
)
def test_wrong_tasks_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        problem_set(*arguments)


def test_a_missing_side_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train.jsonl: No such file"):
        problem_set("gsm8k", str(tmp_path))


def test_the_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[5], [6, 7]]) == 0


def test_padding_stands_behind_the_prefix():
    tokens, mask = padded([1, 2], [[1, 2, 3], [1, 2, 4, 5]], 9, torch.device("cpu"))
    assert tokens.tolist() == [[1, 2, 9, 3], [1, 2, 4, 5]]
    assert mask.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]


def test_answers_end_before_the_first_stop():
    assert cut("a\n\nQuestion: b", ["Question:", "\n\n"]) == "a"
    assert cut("a", ["\n\n"]) == "a"


def test_kl_of_known_predictions():
    half = torch.tensor([[0.5, 0.5]]).log()
    quarter = torch.tensor([[0.25, 0.75]]).log()
    same = fidelity([half, half], [half, half])
    assert same.kl.mean == 0.0 and same.agreement == 1.0
    other = fidelity([half], [quarter])
    assert other.kl.mean == pytest.approx(0.14384, abs=1e-5)
    assert other.tokens == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        fidelity([half], [])


def test_the_bootstrap_interval_holds_the_mean():
    found = bootstrap([1.0, 2.0, 3.0, 4.0])
    assert found.low < found.mean == 2.5 < found.high
    assert bootstrap([2.0]).low == 2.0


def small_call() -> Inputs:
    cache = KVCache.empty(3, 64, "v32_fp8")
    cache.append(torch.randn(192, 512), torch.randn(192, 64), torch.arange(192))
    indices = torch.randint(-1, 192, (2, 9, 32), dtype=torch.int32)
    return Inputs("decode", torch.randn(2, 9, 3, 576).bfloat16(), cache, indices, 0.05)


@pytest.mark.parametrize("fault", [models.CLEAN, "scale_pow2_down", "scale_bf16"])
def test_an_emulated_kernel_answers_in_blocks_as_in_one(fault):
    call = small_call()
    kernel = models.kernel_named(fault)
    whole = kernel.run(call, kernel.new_state()).out
    blocks = models.Emulated(kernel)(call.q, call.cache, call.indices, call.scale)
    assert torch.equal(blocks, whole)


@pytest.mark.parametrize(
    ("name", "problem"), [("no_such", "fault is 'no_such'"), ("writer_packed_stride", "writer's")]
)
def test_faults_that_attention_cannot_have(name, problem):
    with pytest.raises(ValueError, match=problem):
        models.kernel_named(name)


def test_a_fault_needs_a_layout():
    with pytest.raises(ValueError, match="needs a layout"):
        models.attach(None, "transformers", "scale_bf16")
