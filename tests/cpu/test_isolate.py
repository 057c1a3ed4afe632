"""Providers in processes of their own: what they do wrong is a result, with one of four words."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from story_repository import EXACT, POWER_OF_TWO, kernel
from typer.testing import CliRunner

from sparse_mla.accuracy.case import Raised
from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.check import make_provider, run_check
from sparse_mla.accuracy.gate import (
    CRASHED,
    FAILED,
    HUNG,
    NOT_OFFERED,
    PASSED,
    run_case,
    run_catalogue,
)
from sparse_mla.cli import app
from sparse_mla.isolate import wire, worker
from sparse_mla.isolate.host import IsolatedProvider, Worker, find_home

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}

# A kernel that answers right, except where a call has a certain number of heads.
NAUGHTY = """
import ctypes, os, sys, time
from toy_mla import *
from toy_mla import flash_mla_with_kvcache as right

refused = []

def flash_mla_with_kvcache(q, *rest, **more):
    print("hello on standard output")
    heads = q.shape[2]
    if heads == 1:
        ctypes.string_at(0)
    if heads == 5:
        time.sleep(60)
    if q.shape[1] == 3:
        raise NotImplementedError("three query tokens")
    if heads == 20:
        os._exit(7)
    out, lse = right(q, *rest, **more)
    if heads == 64:
        out *= 1.1
    if heads == 96:
        refused.append(heads)
    if heads == 96 or (refused and refused.pop()):  # and the padded call after it
        raise RuntimeError("ninety-six\\nheads")
    if heads == 128:
        q.zero_()
    return out, lse
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naughty")
    (folder / "toy_mla.py").write_text(kernel(EXACT))
    (folder / "naughty_mla.py").write_text(NAUGHTY)
    return folder


@pytest.fixture(scope="module")
def naughty(home: Path) -> Iterator[IsolatedProvider]:
    with IsolatedProvider("naughty_mla", find_home(str(home)), CPU, limit=4.0) as provider:
        yield provider


@pytest.mark.parametrize(
    ("heads", "status", "text"),
    [
        (1, CRASHED, "SIGSEGV"),
        (5, HUNG, "no answer within 4 s"),
        (0, NOT_OFFERED, "three query tokens"),
        (20, CRASHED, "ended with status 7"),
        (64, FAILED, "row's budget"),
        (96, FAILED, "RuntimeError: ninety-six heads"),
        (128, FAILED, "call 1 changed its input q"),
    ],
)
def test_each_way_to_go_wrong_has_its_word(
    naughty: IsolatedProvider, heads: int, status: str, text: str
) -> None:
    name = f"decode/heads/{heads}" if heads else "decode/s_q/3_holes"
    result = run_case(naughty, BY_NAME[name])
    assert result.status == status, result.detail
    assert text in result.detail and "\n" not in result.detail
    # The next case is answered, by a new process where the old one is gone.
    assert run_case(naughty, BY_NAME["decode/topk/63"]).status == PASSED


def test_a_catalogue_goes_on_after_crashes(naughty: IsolatedProvider) -> None:
    names = ("decode/heads/1", "decode/heads/20", "decode/topk/63", "decode/heads/64")
    results = run_catalogue([naughty], [BY_NAME[name] for name in names])
    assert [r.status for r in results] == [CRASHED, CRASHED, PASSED, FAILED]


def test_the_four_words_are_in_every_output(home: Path, tmp_path: Path) -> None:
    arguments = ["check", "--device", "cpu", "--provider", f"naughty_mla@{home}"]
    saved, page = tmp_path / "r.json", tmp_path / "r.html"
    result = CliRunner().invoke(
        app,
        [*arguments, "--case", "decode/[hs]*/[153]*", "--time-limit", "2", "--json", str(saved),
         "--html", str(page)],
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "2 crashed, 2 hung, 1 not offered" in result.stdout.splitlines()[-1]
    for text in (saved.read_text(), page.read_text(), result.stdout):
        for word in ("crashed", "hung", "failed"):
            assert word in text
    assert "not offered" in result.stdout and "not offered" in page.read_text()


ISOLATED_CASES = [
    *(case for case in CASES if case.quick),
    BY_NAME["decode/layout/fp8_tensor"],
    BY_NAME["decode/extra/v32_fp8+nvfp4_bf16_rope/hostile"],
]


@pytest.mark.parametrize("case", ISOLATED_CASES, ids=lambda c: c.name)
def test_our_backend_answers_the_same_from_another_process(
    case: object, isolated_cpu: IsolatedProvider
) -> None:
    assert run_case(isolated_cpu, case).status == PASSED  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def isolated_cpu() -> Iterator[IsolatedProvider]:
    made = make_provider("cpu", CPU, isolate=True)
    assert isinstance(made, IsolatedProvider)
    with made:
        yield made


def test_two_versions_of_one_package_in_one_run(tmp_path: Path) -> None:
    providers = []
    for name, scales in (("old", POWER_OF_TWO), ("new", EXACT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy_mla.py").write_text(kernel(scales))
        providers.append(make_provider(f"toy_mla@{tmp_path / name}", CPU))
    report = run_check(
        providers, [BY_NAME["decode/gaussian"]], seed=0, device=CPU, limit=1.7, diagnose=False
    )
    assert [row["status"] for row in report.results] == [FAILED, PASSED]
    assert "toy_mla" not in sys.modules
    for provider in providers:
        assert isinstance(provider, IsolatedProvider)
        provider.close()


def test_an_environment_with_its_own_interpreter(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (library,) = (environment / "lib").glob("python*/site-packages")
    packages = [*site.getsitepackages(), str(Path(torch.__file__).parents[1])]
    (library / "torch_from.pth").write_text("\n".join(packages))
    (library / "toy_mla.py").write_text(kernel(EXACT))
    provider = make_provider(f"toy_mla@{environment}", CPU)
    assert isinstance(provider, IsolatedProvider)
    with provider:
        assert run_case(provider, BY_NAME["decode/gaussian"]).status == PASSED
        assert str(environment) in provider.describe()["origin"]["location"]


def test_a_process_does_not_outlive_its_provider(home: Path) -> None:
    provider = IsolatedProvider("naughty_mla", find_home(str(home)), CPU)
    assert provider._worker is not None
    number = provider._worker.process.pid
    provider.close()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_hanging_import_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "sleepy_mla.py").write_text("import time; time.sleep(600)")
    started = time.monotonic()
    with pytest.raises(ValueError, match="no answer within 10 s, stopped"):
        make_provider(f"sleepy_mla@{tmp_path}", CPU, limit=1.0)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "no such interpreter or directory"),
        (lambda p: _file(p / "text", "not a program"), "not an interpreter"),
        (lambda p: _file(p / "venv" / "pyvenv.cfg", "").parent, "without an interpreter"),
    ],
)
def test_missing_interpreters_are_one_line(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    place = make(tmp_path)
    result = CliRunner().invoke(app, ["check", "--device", "cpu", "--provider", f"toy@{place}"])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def _file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_interpreter_that_is_none_of_ours(tmp_path: Path) -> None:
    program = _file(tmp_path / "python", "#!/bin/sh\necho no torch here >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match=r"ended with status 1 \(no torch here\)"):
        make_provider(f"toy_mla@{program}", CPU)


def test_a_module_that_is_missing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named 'toy_mla'") as info:
        make_provider(f"toy_mla@{tmp_path}", CPU)
    assert isinstance(info.value.__cause__, Raised)


@pytest.mark.parametrize("spec", ("@/tmp", "toy_mla@", ""))
def test_malformed_specs(spec: str) -> None:
    with pytest.raises(ValueError, match="expected NAME or NAME@PATH"):
        make_provider(spec, CPU)


def test_frames_hold_json_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "frame"
    with path.open("wb") as file:
        wire.write_frame(file, {"do": "x"})
    with path.open("rb") as file:
        assert wire.read_frame(file) == {"do": "x"}
        assert wire.read_frame(file) is None
    with pytest.raises(ValueError, match="frame of 4294967295 bytes"):
        wire.frame_length(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="frame holds list"):
        wire.parse_frame(b"[]")


def test_pieces_leave_out_zeros_wherever_they_begin() -> None:
    storage = torch.zeros(3 * wire.CHUNK + 5, dtype=torch.uint8)
    storage[wire.CHUNK + 3] = 1
    storage[-1] = 2
    assert [start for start, _ in wire.pieces(storage)] == [wire.CHUNK, 3 * wire.CHUNK]
    odd = list(wire.pieces(storage[wire.CHUNK + 3 :]))
    assert int(odd[0][1][0]) == 1 and odd[0][0] == 0


def test_a_lost_cuda_context_ends_the_process_and_is_a_crash(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the worker says when its context is gone, and what the tool makes of that."""
    server = worker.Server(torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setattr(worker, "context_lost", lambda device: True)
    reply, last = server.answer({"do": "state", "id": 0})
    assert (reply["kind"], last) == ("cuda", True)

    receive = Worker._receive
    with IsolatedProvider("toy_mla", find_home(str(home)), CPU) as provider:
        lost = [{"ok": False, "kind": "cuda", "type": "AcceleratorError", "text": "illegal access"}]
        ask = Worker.ask

        def asked(self: Worker, request: dict[str, object], limit: float | None = None) -> object:
            if request["do"] == "run" and lost:
                monkeypatch.setattr(Worker, "_receive", lambda *unused: lost.pop())
            try:
                return ask(self, request, limit)
            finally:
                monkeypatch.setattr(Worker, "_receive", receive)

        monkeypatch.setattr(Worker, "ask", asked)
        result = run_case(provider, BY_NAME["decode/topk/63"])
        assert result.status == CRASHED
        assert result.detail == "CUDA context lost: AcceleratorError: illegal access"
        assert run_case(provider, BY_NAME["decode/topk/63"]).status == PASSED


def test_buffers_filled_anew_are_sent_again() -> None:
    provider = make_provider("cpu", CPU, isolate=True)
    assert isinstance(provider, IsolatedProvider)
    with provider:
        for name in ("decode/stale/same_buffers", "prefill/stale/same_buffers"):
            result = run_case(provider, BY_NAME[name])
            assert result.status == PASSED, result.detail
