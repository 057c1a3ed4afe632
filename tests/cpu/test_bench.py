"""The benchmark: it refuses wrong answers, pairs what was measured together, judges goals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_mla import KVCache
from sparse_mla.bench import figures, registry, rows, run, table, timing, workloads, writes
from sparse_mla.bench.rows import Row
from sparse_mla.bench.workloads import Workload
from sparse_mla.cli import app

SMALL = Workload("decode", "v32_fp8", 2, 1, 4, 128, 512)
CPU = torch.device("cpu")


def ignore(label: str) -> None:
    pass


def a_row(workload: Workload = SMALL, provider: str = "sparse_mla:cpu", **changes: object) -> Row:
    made = Row(
        run="run", **asdict(workload), provider=provider, p20_us=1.0, p50_us=1.0, p80_us=1.0,
        rel_l2=1.66e-3, gain=1e-6, ideal=1.66e-3, sm_clock_mhz=0, gpu="g", driver="d", torch="t",
        triton="r", commit="c", date="d",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CPU_WORKLOADS", (SMALL,))


@pytest.mark.usefixtures("small")
def test_rows_of_a_run_are_read_back_and_paired(tmp_path: Path) -> None:
    measured = run.run(CPU, 3, ignore).rows
    assert [r.provider for r in measured] == ["sparse_mla:cpu", "torch:gather_einsum"]
    assert len({r.run for r in measured}) == 1
    for row in measured:
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.multiple <= 1.01
        assert row.checked == 2
        assert row.lse_err is not None and row.lse_err < 1e-4
    path = tmp_path / "gpu" / "rows.jsonl"
    rows.append(path, measured)
    assert rows.read(path) == measured
    (line,) = table.lines(measured)
    assert line.ratio == pytest.approx(measured[1].p50_us / measured[0].p50_us)
    other = [replace(r, run="another") for r in measured if r.provider != "sparse_mla:cpu"]
    assert table.lines([measured[0], *other])[0].ratio is None


def scaled(factor: float, first_token_only: bool = False) -> Callable[[registry.Data], object]:
    def answer(data: registry.Data) -> registry.Answer:
        out, lse = registry.gather_einsum(data)
        wrong = out * factor
        if first_token_only:
            wrong[1:] = out[1:]
        return wrong, lse

    return answer


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("first_token_only", (False, True))
def test_a_wrong_answer_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, first_token_only: bool
) -> None:
    wrong = scaled(1.02, first_token_only)

    def with_a_wrong_one(data: registry.Data, *args: object) -> registry.Providers:
        calls = {
            "sparse_mla:cpu": lambda: wrong(data),
            "peer": lambda: registry.gather_einsum(data),
        }
        return registry.Providers(calls)

    monkeypatch.setattr(run, "providers", with_a_wrong_one)
    result = run.run(CPU, 3, ignore)
    assert [r.provider for r in result.rows] == ["peer"]
    (missing,) = result.wrong
    assert missing.provider == "sparse_mla:cpu" and missing.reason.endswith("not timed")


@pytest.mark.usefixtures("small")
def test_refusals_and_failures_are_shown_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(error: Exception) -> Callable[[], registry.Answer]:
        def call() -> registry.Answer:
            raise error

        return call

    def some(data: registry.Data, *args: object) -> registry.Providers:
        calls = {
            "sparse_mla:cpu": raising(RuntimeError("does not compile")),
            "peer": raising(RuntimeError("head dim must be 7")),
            "right": lambda: registry.gather_einsum(data),
        }
        return registry.Providers(calls, {"sparse_mla:other": "needs a GPU"})

    monkeypatch.setattr(run, "providers", some)
    result = run.run(CPU, 3, ignore)
    assert [r.provider for r in result.rows] == ["right"]
    said = {m.provider: (m.reason, m.wrong) for m in result.missing}
    assert said == {
        "sparse_mla:other": ("needs a GPU", False),
        "sparse_mla:cpu": ("RuntimeError: does not compile", True),
        "peer": ("RuntimeError: head dim must be 7", False),
    }
    fatal = {"right": raising(RuntimeError("CUDA error: an illegal memory access"))}
    monkeypatch.setattr(run, "providers", lambda *args: registry.Providers(fatal))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.run(CPU, 3, ignore)


def test_providers_of_this_machine() -> None:
    data = registry.make_data(SMALL, registry.make_cache("v32_fp8", 512, CPU))
    assert set(registry.providers(data).calls) == {"sparse_mla:cpu", "torch:gather_einsum"}
    assert set(registry.providers(data, peers=False).calls) == {"sparse_mla:cpu"}
    named = registry.providers(data, ["sm90"], peers=False)
    assert not named.calls and "Hopper" in named.refused["sparse_mla:sm90"]
    with pytest.raises(ValueError, match="backend is 'sm42'"):
        registry.providers(data, ["sm42"])


def test_newest_row_of_a_backend_wins_and_keeps_the_peer_of_its_run() -> None:
    peer = "torch:gather_einsum"
    old = [a_row(run="old"), a_row(run="old", provider=peer, p50_us=3.0)]
    new = [a_row(run="new", p50_us=2.0), a_row(run="new", provider=peer, p50_us=8.0)]
    (line,) = table.lines([*old, *new])
    assert line.ours.run == "new" and line.ratio == 4.0
    other = a_row(run="other", provider="sparse_mla:triton")
    first, second = table.lines([*old, *new, other])
    assert (first.ours.run, second.ours.run, second.peer) == ("new", "other", None)


def test_workloads_and_goals() -> None:
    for some in (workloads.GPU_WORKLOADS, workloads.CPU_WORKLOADS):
        assert len({w.label for w in some}) == len(some)
    known = set(workloads.GPU_WORKLOADS + workloads.CPU_WORKLOADS)
    assert {goal.workload for goal in workloads.GOALS} <= known
    assert set(workloads.HEADLINES) <= known
    keys = [(g.machine, g.backend, g.workload) for g in workloads.GOALS]
    assert len(set(keys)) == len(keys)


def test_only_matches_whole_words() -> None:
    chosen = workloads.choose(workloads.GPU_WORKLOADS, ["decode b=1 h=8", "s_kv=65536"])
    assert [(w.op, w.b, w.h_q, w.s_kv) for w in chosen] == [
        ("decode", 1, 8, 32768),
        ("prefill", 1, 128, 65536),
    ]
    with pytest.raises(ValueError, match=r"no workload's label has the words 'b=3'"):
        workloads.choose(workloads.GPU_WORKLOADS, ["decode", "b=3"])


@pytest.mark.parametrize(
    ("ours", "verdict"),
    (
        ({"p50_us": 10.0}, "met"),
        ({"p50_us": 10.8}, "met"),  # 1.85 as it is shown
        ({"p50_us": 11.0}, "not met: time"),
        ({"p50_us": 10.0, "rel_l2": 1.2 * 1.66e-3, "gain": -6e-5}, "not met: error, gain"),
    ),
)
def test_a_goal_is_met_or_it_is_said_what_is_not(ours: dict[str, float], verdict: str) -> None:
    goal = next(g for g in workloads.GOALS if (g.ratio, g.workload.h_q) == (1.85, 8))
    mine = a_row(goal.workload, "sparse_mla:sm90", gpu="NVIDIA H200", **ours)
    peer = a_row(goal.workload, "flash_mla", gpu="NVIDIA H200", p50_us=20.0)
    (line,) = table.lines([mine, peer])
    assert line.verdict == verdict
    assert verdict in table.goals([mine, peer])
    elsewhere = [replace(r, gpu="NVIDIA H100") for r in (mine, peer)]
    assert table.lines(elsewhere)[0].verdict == ""
    assert table.goals(elsewhere).count("not measured") == len(workloads.GOALS)
    assert table.lines([mine])[0].verdict == ""


def test_work_of_a_workload() -> None:
    one = Workload("decode", "v32_fp8", 1, 1, 64, 2048, 32768)
    assert one.flops == 2 * 64 * 2048 * (576 + 512)
    assert one.bytes == 2048 * 656 + 4 * 2048 + 2 * 64 * (576 + 512)
    assert replace(one, s_kv=100).bytes == one.bytes - 1948 * 656


def test_a_writer_beside_a_copy_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(workloads._write(layout, 128) for layout in ("v4_fp8", "bf16"))
    assert small[0].label == "kv_write v4_fp8 n=128"
    assert small[0].bytes == 128 * (1024 + 584 + 8) and small[0].flops == 0
    monkeypatch.setattr(run, "CPU_WORKLOADS", small)
    quantised, exact = run.run(CPU, 3, ignore).rows
    assert quantised.multiple == exact.multiple == 1.0
    assert 0.01 < quantised.rel_l2 < 0.05 and exact.rel_l2 < 1e-9
    data = writes.make_writes(small[0], CPU)
    assert data.check("cpu") == 0
    copy = data.copy()
    copy()

    def broken(self: KVCache, *args: object, backend: str, **more: object) -> None:
        real(self, *args, backend=backend, **more)  # type: ignore[arg-type]
        if backend == "cpu":
            self.pages[:, 5] ^= 1

    real = KVCache.append
    monkeypatch.setattr(KVCache, "append", broken)
    result = run.run(CPU, 3, ignore, only=["v4_fp8"])
    assert not result.rows and "2 bytes differ" in result.wrong[0].reason


@pytest.fixture
def many_rows() -> list[Row]:
    """A row for every workload of the H200 and provider; times are not meant to be likely."""
    made = []
    for number, workload in enumerate(workloads.GPU_WORKLOADS):
        for factor, provider in (
            (2, "flash_mla"),
            (1, "sparse_mla:sm90"),
            (3, "sparse_mla:triton"),
        ):
            us = factor * (10.0 + number)
            made.append(a_row(workload, provider, gpu="NVIDIA H200", p50_us=us))
    return made


def test_figures_are_the_same_bytes_and_know_their_data(
    many_rows: list[Row], tmp_path: Path
) -> None:
    figures.write_all(many_rows, tmp_path / "a")
    figures.write_all(many_rows, tmp_path / "b")
    names = [f"{figure.name}.svg" for figure in figures.FIGURES]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(figures.current(many_rows, tmp_path / "a").values())
    other = [replace(many_rows[0], p50_us=77.0), *many_rows[1:]]
    assert not all(figures.current(other, tmp_path / "a").values())
    assert not any(figures.current(many_rows, tmp_path / "nowhere").values())
    figures.write_all([], tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_budgets_are_drawn_from_their_file(tmp_path: Path) -> None:
    parts = {"consumers": {"QK": 300, "softmax": 200}, "loader": {"issue": 640, "wait": 20}}
    budget = {"title": "a kernel", "floors": {"gather": 600}, "warps": parts}
    (tmp_path / "budgets.json").write_text(json.dumps({"few": budget}))
    assert figures.current([], tmp_path) == {"budget_few": False}
    figures.write_all([], tmp_path)
    assert figures.current([], tmp_path) == {"budget_few": True}
    (tmp_path / "budgets.json").write_text(json.dumps({"few": {**budget, "title": "other"}}))
    assert figures.current([], tmp_path) == {"budget_few": False}
    (tmp_path / "budgets.json").write_text(json.dumps({"few": {"title": "a kernel"}}))
    with pytest.raises(ValueError, match=r"few has \['title'\]"):
        figures.current([], tmp_path)


def test_one_backend_or_a_few_rows_can_be_drawn(many_rows: list[Row], tmp_path: Path) -> None:
    for some in (many_rows[:2], [r for r in many_rows if r.backend != "sm90"]):
        figures.write_all(some, tmp_path)
        assert all(figures.current(some, tmp_path).values())


def test_providers_take_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[str] = []

    class Graph:
        def __init__(self, name: str) -> None:
            self.name = name

        def replay(self) -> None:
            replayed.append(self.name)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def elapsed_time(self, end: object) -> float:
            return 1.0

    monkeypatch.setattr(timing, "_capture", lambda call: Graph(call()))
    monkeypatch.setattr(timing.torch, "empty", lambda *args, **kwargs: torch.zeros(1))
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    calls = {name: lambda name=name: name for name in "abc"}
    times = timing.measure(calls, torch.device("cuda"), 4, warm_up=2)
    assert times == {name: [1000.0] * 4 for name in "abc"}
    assert "".join(replayed) == "bcacababc" * 2


@pytest.mark.usefixtures("small")
def test_bench_command(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    common = ["bench", "--device", "cpu", "--samples", "3"]
    done = CliRunner().invoke(
        app, [*common, "--rows", str(path), "--results", str(tmp_path / "results")]
    )
    assert done.exit_code == 0, done.output
    assert len(rows.read(path)) == 2
    (filed,) = (tmp_path / "results").glob("*/*.jsonl")
    assert rows.read(filed) == rows.read(path)
    assert filed.parent.name.startswith("cpu-")
    refused = CliRunner().invoke(app, [*common, "--backend", "sm90", "--no-peers"])
    assert refused.exit_code == 1, refused.output
    assert "refused: sparse_mla:sm90" in refused.output
    listed = CliRunner().invoke(app, ["bench", "--device", "cpu", "--list"])
    assert listed.output.splitlines() == [SMALL.label]
    nothing = CliRunner().invoke(app, ["bench", "--device", "cpu", "--only", "b=77"])
    assert nothing.exit_code == 2
    assert "no workload's label has the words 'b=77'" in nothing.output


@pytest.mark.usefixtures("small")
def test_bench_command_fails_on_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = scaled(1.02)
    monkeypatch.setattr(
        run,
        "providers",
        lambda data, *args: registry.Providers({"sparse_mla:cpu": lambda: wrong(data)}),
    )
    done = CliRunner().invoke(app, ["bench", "--device", "cpu", "--samples", "3"])
    assert done.exit_code == 1
    assert "WRONG: sparse_mla:cpu" in done.output


def test_rows_from_before_a_field_existed_are_read(tmp_path: Path) -> None:
    values = asdict(a_row())
    del values["lse_err"], values["checked"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(values) + "\n")
    assert rows.read(path) == [a_row()]


@pytest.mark.parametrize("arch", (None, "cpu", "sm_80", "sm_90", "sm_120"))
def test_explain_command(arch: str | None) -> None:
    arguments = ["explain", "--op", "decode", "--heads", "64", "--layout", "v32_fp8"]
    done = CliRunner().invoke(app, arguments + ([] if arch is None else ["--arch", arch]))
    assert done.exit_code == 0, done.output
    assert "runs" in done.output


def test_explain_two_caches() -> None:
    arguments = ["explain", "--layout", "v41_fp8_inline", "--extra-layout", "v41_fp4_inline"]
    done = CliRunner().invoke(app, [*arguments, "--arch", "cpu"])
    assert done.exit_code == 0, done.output
    assert "v41_fp8_inline + v41_fp4_inline" in done.output and "runs" in done.output


@pytest.mark.parametrize(
    ("option", "value"),
    (("--layout", "v9"), ("--extra-layout", "v9"), ("--op", "sort"), ("--arch", "sm_75")),
)
def test_explain_refuses_in_one_line(option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["explain", option, value])
    assert done.exit_code == 2
    assert repr(value) in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("op", ["prefill", "dense_decode", "kv_write"])
def test_explain_of_an_extra_cache_where_there_is_none(op: str) -> None:
    arguments = ["explain", "--op", op, "--layout", "v4_fp8", "--extra-layout", "v4_fp8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr == f"error: --extra-layout is 'v4_fp8', {op} takes no extra cache\n"


def test_dense_decode_is_checked_against_the_slots_of_its_pages() -> None:
    workload = workloads.Workload("dense_decode", "bf16", 3, 2, 4, 100, 3 * 128)
    assert workload.label == "dense_decode bf16 b=3 s_q=2 h=4 s_k=100"
    cache = registry.make_cache("bf16", workload.s_kv, torch.device("cpu"))
    data = registry.make_data(workload, cache)
    oracle = run.Oracle(data)
    (call,) = registry.providers(data, ["cpu"], peers=False).calls.values()
    accuracy = oracle.check("sparse_mla:cpu", call())
    assert accuracy.rel_l2 <= 1.001 * accuracy.ideal
    out, lse = call()
    with pytest.raises(run.WrongAnswer):
        oracle.check("sparse_mla:cpu", (out.flip(0), lse))


@pytest.mark.parametrize("lengths", (False, True))
def test_an_extra_cache_with_its_lists_and_sinks(lengths: bool) -> None:
    workload = Workload("decode", "v4_fp8", 2, 2, 4, 64, 512, 70, lengths)
    assert workload.label.endswith("topk=64 extra=70" + " lengths" * lengths)
    data = registry.make_data(workload, registry.make_cache("v4_fp8", workload.s_kv, CPU))
    assert data.extra is not None and (data.extra.lengths is not None) == lengths
    found = registry.providers(data, ["cpu"], peers=False)
    oracle = run.Oracle(data)
    out, lse = found.calls["sparse_mla:cpu"]()
    assert oracle.check("sparse_mla:cpu", (out, lse)).rel_l2 < 2e-3
    with pytest.raises(run.WrongAnswer):
        oracle.check("sparse_mla:cpu", (out * 2, lse))


@pytest.mark.usefixtures("small")
def test_peers_alone_are_not_success() -> None:
    result = CliRunner().invoke(app, ["bench", "--backend", "sm90", "--device", "cpu"])
    assert result.exit_code == 1, result.output
    assert "refused" in result.stdout and "torch:gather_einsum" not in result.stdout


def test_a_results_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.touch()
    for place in (file, file / "below"):
        result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--results", str(place)])
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr == f"error: --results {place}: Not a directory\n"
