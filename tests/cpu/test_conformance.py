"""The runner of peers' tests, on files made like theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_mla.compat import conformance
from sparse_mla.compat.conformance import SUITES, Count, Options

SOURCE = Path(__file__).parents[2] / "src"

# As FlashMLA's: a case is a dataclass; the function that runs one is decorated; seeds are counted.
DECODE = """
import dataclasses, sys
import torch
import flash_mla
import helper

class Counter:
    def __init__(self): self.count = 0
    def next(self):
        self.count += 1
        return self.count - 1

@dataclasses.dataclass
class Case:
    number: int
    num_runs: int = 0
    seed: int = -1

@dataclasses.dataclass
class Result:
    is_correct: bool
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

_counter = Counter()

@torch.inference_mode()
def test(p):
    if p.seed == -1:
        p.seed = _counter.next()
    assert torch.is_inference_mode_enabled()
    print("Running on", p)
    if p.number in helper.RAISES:
        raise helper.RAISES[p.number]
    assert p.seed == p.number
    meta, _ = flash_mla.get_mla_metadata()
    assert isinstance(meta, flash_mla.flash_mla_interface.FlashMLASchedMeta)
    if p.num_runs:
        print("Time (per): 12.5 us")
    return Result(p.number not in helper.WRONG, 0, 0, 0, 0, 0, 0)

if __name__ == "__main__":
    results = []
    for case in [Case(i) for i in range(6)] + [Case(6, 10), Case(7, 10)]:
        results.append(test(case))
        if not results[-1].is_correct:
            sys.exit(1)
    print(f"\\033[42m{len(results)}/{len(results)} correctness cases passed\\033[0m")
"""

PYTEST = """
import pytest
from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

@pytest.mark.parametrize("number", range(3))
def test_good(number):
    assert get_mla_metadata()[1] is None

def test_bad():
    assert False

def test_refused():
    flash_mla_with_kvcache(None, None, None, None, 512, None, descale_q=1)

@pytest.mark.skipif(True, reason="of another age")
def test_skipped():
    pass
"""


def checkout(folder: Path, raises: str = "{}", wrong: str = "()") -> Path:
    tests = folder / "tests"
    tests.mkdir()
    (folder / SUITES["sparse_decode"].file).write_text(DECODE)
    (tests / "helper.py").write_text(f"RAISES = {raises}\nWRONG = {wrong}\n")
    sys.modules.pop("helper", None)
    return folder


def run(folder: Path, **options: Any) -> Count:
    return conformance.run(SUITES["sparse_decode"], folder, Options(quiet=True, **options))


def test_all_cases_pass(tmp_path: Path) -> None:
    count = run(checkout(tmp_path))
    assert (count.passed, count.run, count.timed, count.left_out) == (8, 8, 2, 0)
    assert count.exit_code == 0 and count.ending == "8/8 correctness cases passed"
    assert [t["time"] for t in count.timings] == ["Time (per): 12.5 us"] * 2
    assert "flash_mla" not in sys.modules
    assert isinstance(torch.inference_mode, type)


def test_the_file_ends_as_it_likes(tmp_path: Path) -> None:
    count = run(checkout(tmp_path, wrong="(2,)"))
    assert (count.passed, count.failed, count.exit_code) == (2, 1, 1)
    assert "Running on Case(number=2" in count.failures[0]["what"]


def test_an_exception_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = run(checkout(tmp_path, raises="{1: ValueError('q is 5')}"))
    assert (count.passed, count.failed, count.exit_code) == (1, 1, 1)
    assert count.ending == "ValueError: q is 5"
    assert "ValueError: q is 5" in count.failures[0]["what"]


def test_going_on_after_failures(tmp_path: Path) -> None:
    raises = "{1: AssertionError('no'), 3: NotImplementedError('not yet')}"
    count = run(checkout(tmp_path, raises, wrong="(6,)"), keep_going=True)
    assert (count.passed, count.failed, count.refused) == (5, 2, 1)
    # The file was told that all was well: what it says then is not kept.
    assert count.ending == ""
    assert [f["outcome"] for f in count.failures] == ["failed", "refused", "failed"]


def test_shards_keep_their_cases_data(tmp_path: Path) -> None:
    """The file asserts that a case's seed is its number."""
    checkout(tmp_path)
    total = Count()
    for shard in range(3):
        count = run(tmp_path, shard=shard, shards=3, kinds="untimed")
        assert count.passed + count.left_out == 8
        total.add(count)
    assert (total.passed, total.left_out) == (6, 2)
    total.add(run(tmp_path, kinds="timed", only="number=7"))
    assert (total.passed, total.failed, total.timed, total.left_out) == (7, 0, 1, 1)


class _Full(dict):
    """Out of memory twice, as while other processes hold it."""

    tries = 0

    def __contains__(self, number: object) -> bool:
        _Full.tries += number == 0
        return number == 0 and _Full.tries <= 2

    def __missing__(self, number: int) -> Exception:
        return torch.OutOfMemoryError("CUDA out of memory")


def test_a_shard_waits_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance.time, "sleep", lambda seconds: None)
    raises = f"__import__('sys').modules[{__name__!r}]._Full()"
    checkout(tmp_path, raises)
    for shards, tries, passed in ((2, 3, 4), (1, 1, 7)):
        _Full.tries = 0
        sys.modules.pop("helper", None)
        count = run(tmp_path, shards=shards, keep_going=True)
        assert (_Full.tries, count.passed, count.failed) == (tries, passed, shards == 1)


def test_time_is_up(tmp_path: Path) -> None:
    count = run(checkout(tmp_path), time_limit=1e-9)
    assert (count.run, count.left_out, count.ending) == (0, 8, "")


def test_pytest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgl_kernel", "sgl_kernel.flash_mla"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = tmp_path / SUITES["sglang"].file
    path.parent.mkdir(parents=True)
    path.write_text(PYTEST)
    count = conformance.run(SUITES["sglang"], tmp_path, Options(keep_going=True))
    assert (count.passed, count.failed, count.refused, count.skipped) == (3, 1, 1, 1)
    assert count.exit_code == 1
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    checkout(tmp_path, wrong="(3,)")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "sparse_mla.compat.conformance", str(tmp_path), "--quiet"]
    command += [
        "sparse_decode",
        "--processes",
        "2",
        "--keep-going",
        "--json",
        str(out),
        "--commit",
        "abc1234",
    ]
    environment = {"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert "sparse_decode: 8 cases run, 7 passed, 1 failed" in done.stderr
    result = json.loads(out.read_text())
    suite = result["suites"]["sparse_decode"]
    assert suite["commit"] == "abc1234" and suite["peer"] == "deepseek-ai/FlashMLA"
    assert suite["count"]["passed"] == 7 and suite["count"]["left_out"] == 0
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "suite is 'nosuch', allowed: sparse_decode, "),
        (["dense_decode"], "has no tests/test_flash_mla_dense_decoding.py"),
        (["--shard", "2/2"], "--shard is '2/2'"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        conformance.main([str(checkout(tmp_path)), *arguments])
    assert said in capsys.readouterr().err


def test_a_folder_without_their_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        conformance.main([str(tmp_path)])
    assert "has none of tests/test_flash_mla_sparse_decoding.py" in capsys.readouterr().err


def test_our_kernels_bear_the_names_that_the_files_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [SimpleNamespace(name=n) for n in ("attend", "combine_splits", "at::fill", "attend")]
    monkeypatch.setattr(conformance, "our_kernels", lambda: {"attend", "combine_splits"})
    monkeypatch.setattr(torch.profiler.profile, "events", lambda self: events)
    real = torch.profiler.profile.events
    with conformance.kernels_named("theirs", "their_combine"):
        named = torch.profiler.profile.events(None)  # type: ignore[arg-type]
        assert [e.name for e in named] == ["theirs", "their_combine", "at::fill", "theirs"]
    assert torch.profiler.profile.events is real


def test_names_of_our_kernels() -> None:
    pytest.importorskip("triton")
    from sparse_mla.ops.kv_write import triton_kernel
    from sparse_mla.ops.sparse_decode import triton as launcher

    assert launcher and triton_kernel
    assert {"attend", "combine", "write_tokens"} <= conformance.our_kernels()
