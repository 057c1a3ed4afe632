"""The command: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparse_mla
from sparse_mla.accuracy.cases import CASES
from sparse_mla.cli import app

runner = CliRunner()
SMALL = ["check", "--device", "cpu", "--backend", "cpu"]


def last_line(text: str) -> str:
    return text.rstrip("\n").splitlines()[-1]


def test_passes_and_ends_with_the_summary() -> None:
    result = runner.invoke(app, [*SMALL, "--case", "decode/gaussian"])
    assert result.exit_code == 0, result.output
    assert last_line(result.stdout) == "3 cases passed, 0 failed"
    assert "decode/gaussian/bf16" in result.stdout


def wrong_provider(name: str, gain: float) -> None:
    def decode(q, k_cache, table, lengths, d_v, meta, splits, scale, causal, fp8, indices, *rest):  # type: ignore[no-untyped-def]
        cache = sparse_mla.KVCache.from_tensor(k_cache, "v32_fp8" if fp8 else "bf16")
        sink, _, _, length, _ = rest
        out, lse = sparse_mla.decode(
            q, cache, indices, scale=scale, topk_length=length, attn_sink=sink, backend="cpu"
        )
        lse = torch.where(lse.isinf(), float("inf"), lse)
        return out * gain, lse.transpose(1, 2)

    module = types.ModuleType(name)
    module.flash_mla_with_kvcache = decode  # type: ignore[attr-defined]
    sys.modules[name] = module


def test_a_wrong_kernel_exits_1_and_is_explained(tmp_path: Path) -> None:
    wrong_provider("wrong_peer", 1.01)
    saved, page = tmp_path / "r.json", tmp_path / "r.html"
    arguments = ["check", "--device", "cpu", "--provider", "wrong_peer", "--case", "gaussian"]
    result = runner.invoke(app, [*arguments, "--json", str(saved), "--html", str(page)])
    assert result.exit_code == 1, result.output
    line = last_line(result.stdout)
    assert line.startswith("0 cases passed, ") and "not offered" in line
    assert "diagnosis" in result.stdout
    assert "no flash_mla_sparse_fwd" in result.stdout
    data = json.loads(saved.read_text())
    assert {r["status"] for r in data["results"]} == {"failed", "not_offered"}
    assert "<img" in page.read_text()
    redrawn = runner.invoke(app, ["report", str(saved), str(tmp_path / "again.html")])
    assert redrawn.exit_code == 0
    assert (tmp_path / "again.html").read_text().count("<img") == page.read_text().count("<img")


def test_nothing_passed_is_not_success() -> None:
    wrong_provider("decode_only_peer", 1.0)
    arguments = ["check", "--device", "cpu", "--provider", "decode_only_peer"]
    result = runner.invoke(app, [*arguments, "--case", "prefill/gaussian/bf16_nope"])
    assert result.exit_code == 1
    assert last_line(result.stdout) == "0 cases passed, 0 failed, 1 not offered"


def test_random_cases_are_counted_not_listed() -> None:
    result = runner.invoke(app, [*SMALL, "--case", "decode/topk/65", "--random", "5"])
    assert result.exit_code == 0, result.output
    assert last_line(result.stdout) == "7 cases passed, 0 failed"
    assert "random/" not in result.stdout


def test_list_names_the_cases() -> None:
    result = runner.invoke(app, ["check", "--list", "--quick"])
    assert result.exit_code == 0
    assert "decode/gaussian" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "no_such_module_here"], "no_such_module_here"),
        (["--provider", "json"], "flash_mla_with_kvcache"),
        (["--backend", "abacus"], "available: "),
        (["--case", "no/such/case"], "no/such/case"),
        (["--device", "abacus"], "abacus"),
        (["--json", "/no/such/folder/x.json", "--case", "decode/topk/1"], "No such file"),
        (["--html", "/no/such/folder/x.html", "--case", "decode/topk/1"], "No such file"),
    ],
)
def test_usage_errors_are_one_line_on_stderr(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["check", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("limit", ["inf", "nan", "0.5", "1e9"])
def test_a_limit_that_passes_anything_is_refused(limit: str) -> None:
    result = runner.invoke(app, ["check", "--case", "decode/topk/1", "--limit", limit])
    assert result.exit_code == 2, result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_full_disk_is_no_verdict(option: str) -> None:
    """Status 1 would say that a case failed; the results are shown all the same."""
    result = runner.invoke(app, [*SMALL, "--case", "decode/topk/1", option, "/dev/full"])
    assert result.exit_code == 2, result.output
    assert result.stderr == "error: /dev/full: No space left on device\n"
    assert "0 failed" in result.stdout


def test_results_say_how_much_of_the_catalogue_they_are(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        more = ["--random", "2"] if name == "b.json" else []
        arguments = [*SMALL, "--case", "decode/topk/1", "--json", str(tmp_path / name), *more]
        assert runner.invoke(app, arguments).exit_code == 0
        about = json.loads((tmp_path / name).read_text())["about"]
        assert 0 < about["cases"] < about["catalogue"] == len(CASES)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_no_terminal_is_so_narrow_that_a_verdict_is_cut(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    cases = ["--case", "decode/layout/v41_fp8_planar", "--backend", "cpu"]
    result = runner.invoke(app, ["check", *cases])
    passed = int(result.stdout.splitlines()[-1].split()[0])
    assert passed > 1 and result.stdout.count(" passed") == passed + 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": "sparse_mla.check/1", "about": {}, "resu',
        "[]",
        '{"format": "other"}',
        '{"format": "sparse_mla.check/1", "about": {}, "results": [{"case": "x"}]}',
        '{"format": "sparse_mla.check/1", "about": {}, "results": 3}',
        "\x00\x01\x02",
    ],
)
def test_foreign_files_are_one_line_errors(tmp_path: Path, text: str) -> None:
    source = tmp_path / "r.json"
    source.write_text(text)
    result = runner.invoke(app, ["report", str(source), str(tmp_path / "r.html")])
    assert result.exit_code == 2
    assert str(source) in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_report_escapes_what_it_is_given(tmp_path: Path) -> None:
    source = tmp_path / "r.json"
    row = {
        "case": "<script>alert(1)</script>", "op": "decode", "about": "<b>", "status": "failed",
        "implementation": "<i>", "detail": "<u>", "metrics": None,
    }  # fmt: skip
    about = {"device": "<img src=x>"}
    source.write_text(
        json.dumps({"format": "sparse_mla.check/1", "about": about, "results": [row]})
    )
    result = runner.invoke(app, ["report", str(source), str(tmp_path / "r.html")])
    assert result.exit_code == 0
    page = (tmp_path / "r.html").read_text()
    for tag in ("<script>", "<b>", "<i>", "<u>", "<img src=x>"):
        assert tag not in page


def test_as_a_process() -> None:
    command = [sys.executable, "-c", "from sparse_mla.cli import app; app()", *SMALL]
    done = subprocess.run(
        [*command, "--case", "decode/topk/63"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout) == "1 cases passed, 0 failed"
    assert done.stderr == ""
