"""The benchmark: it refuses wrong answers, and its rows pair what was measured together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_mla.bench import registry, rows, run, table
from sparse_mla.cli import app

SMALL = registry.Workload("decode", "v32_fp8", 2, 1, 4, 128, 512)
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CPU_WORKLOADS", (SMALL,))


@pytest.mark.usefixtures("small")
def test_rows_of_a_run_are_read_back_and_paired(tmp_path: Path) -> None:
    measured = run.run(CPU, 3, lambda label: None)
    assert [r.provider for r in measured] == ["sparse_mla:cpu", "torch:gather_einsum"]
    assert len({r.run for r in measured}) == 1
    for row in measured:
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.rel_l2 <= 1.01 * row.ideal
    path = tmp_path / "gpu" / "rows.jsonl"
    rows.append(path, measured)
    assert rows.read(path) == measured
    (line,) = table.lines(measured)
    assert line.ratio == pytest.approx(measured[1].p50_us / measured[0].p50_us)
    other = [replace(r, run="another") for r in measured if r.provider != "sparse_mla:cpu"]
    assert table.lines([measured[0], *other])[0].ratio is None


@pytest.mark.usefixtures("small")
def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(data: registry.Data) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = registry.gather_einsum(data)
        return out * 1.02, lse

    monkeypatch.setattr(run, "measure", lambda *args: pytest.fail("timed a wrong answer"))
    monkeypatch.setattr(run, "providers", lambda data: {"sparse_mla:cpu": lambda: wrong(data)})
    with pytest.raises(ValueError, match=r"sparse_mla:cpu answers decode .* not timed"):
        run.run(CPU, 3, lambda label: None)


def test_newest_run_of_a_shape_wins() -> None:
    data = registry.make_data(SMALL, registry.make_cache("v32_fp8", 512, CPU))
    assert set(registry.providers(data)) == {"sparse_mla:cpu", "torch:gather_einsum"}
    row = rows.Row(
        run="old", op="decode", layout="v32_fp8", b=1, s_q=1, h_q=1, topk=1, s_kv=1,
        provider="sparse_mla:cpu", p20_us=1, p50_us=1, p80_us=1, rel_l2=1, gain=0, ideal=1,
        sm_clock_mhz=0, gpu="g", driver="d", torch="t", triton="r", commit="c", date="d",
    )  # fmt: skip
    assert table.latest([row, replace(row, run="new")]) == [replace(row, run="new")]


@pytest.mark.usefixtures("small")
def test_bench_command(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(
        app, ["bench", "--device", "cpu", "--samples", "3", "--rows", str(path)]
    )
    assert done.exit_code == 0, done.output
    assert len(rows.read(path)) == 2
    nothing = CliRunner().invoke(app, ["bench", "--device", "cpu", "--only", "no such workload"])
    assert nothing.exit_code == 2
    assert "no workload's label holds 'no such workload'" in nothing.output


@pytest.mark.parametrize("arch", (None, "cpu", "sm_80", "sm_90", "sm_120"))
def test_explain_command(arch: str | None) -> None:
    arguments = ["explain", "--op", "decode", "--heads", "64", "--layout", "v32_fp8"]
    done = CliRunner().invoke(app, arguments + ([] if arch is None else ["--arch", arch]))
    assert done.exit_code == 0, done.output
    assert "runs" in done.output


@pytest.mark.parametrize(
    ("option", "value"), (("--layout", "v9"), ("--op", "sort"), ("--arch", "sm_75"))
)
def test_explain_refuses_in_one_line(option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["explain", option, value])
    assert done.exit_code == 2
    assert repr(value) in done.output
    assert "Traceback" not in done.output
