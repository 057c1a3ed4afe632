"""Peers' own tests of sparse MLA attention, unmodified, on our kernels.

    python -m sparse_mla.compat.conformance CHECKOUT [SUITE...] [--json FILE]

CHECKOUT is a clone of the peer's repository. A suite is one file of tests there. The runner puts
`sparse_mla.compat.flash_mla` where the file imports the peer's module from and runs the file as the
peer does: as __main__, or by pytest. docs/conformance.md has what came of it.

What it does besides, without touching the files:

- FlashMLA's files decorate the function that runs one case with `torch.inference_mode()`. While a
  file runs, that decorator also counts the case, and can go on after one that failed (the file for
  decode would exit), stop after a while, or leave out those of other shards.
- The files look their kernels up in torch's profile by name. The profile's list of events shows
  our kernels under those names, all of a call's kernels that are ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from ..bench.rows import this_machine
from . import install as installer

MAX_FAILURES = 40
# Seconds that a case of one shard of several waits for memory.
MEMORY_WAIT = 60.0


@dataclass(frozen=True)
class Suite:
    """One file of a peer's tests.

    Attributes:
        name: what users give.
        peer: the repository on GitHub.
        file: path in its checkout.
        installs: the names that the file imports, directly or not.
        attention, combine: the names by which it finds the kernels' times; "" where it has none.
        pytest: arguments of pytest, for files that are made for it; None for scripts.
        packages: packages that only have to exist for the imports to work.
    """

    name: str
    peer: str
    file: str
    installs: tuple[str, ...] = installer.FLASH_MLA
    attention: str = ""
    combine: str = ""
    pytest: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()


_FLASH_MLA = "deepseek-ai/FlashMLA"
_WITHOUT_ENGINE = ("--noconftest", "-p", "no:cacheprovider", "-q", "--tb=line")

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "sparse_decode",
            _FLASH_MLA,
            "tests/test_flash_mla_sparse_decoding.py",
            attention="flash_fwd_splitkv_mla_fp8_sparse_kernel",
            combine="flash_fwd_mla_combine_kernel",
        ),
        Suite(
            "sparse_prefill",
            _FLASH_MLA,
            "tests/test_flash_mla_sparse_prefill.py",
            attention="sparse_attn_fwd",
        ),
        Suite(
            "dense_decode",
            _FLASH_MLA,
            "tests/test_flash_mla_dense_decoding.py",
            attention="flash_fwd_splitkv_mla_kernel",
        ),
        Suite(
            "sglang",
            "sgl-project/sglang",
            "sgl-kernel/tests/test_flashmla.py",
            installs=installer.SGLANG,
            pytest=_WITHOUT_ENGINE,
            packages=("sgl_kernel",),
        ),
        Suite(
            "vllm",
            "vllm-project/vllm",
            "tests/kernels/attention/test_flashmla_sparse.py",
            installs=installer.VLLM,
            pytest=(*_WITHOUT_ENGINE, "-k", "test_sparse_flashmla and not cache_writer"),
            packages=(
                "vllm",
                "vllm.v1",
                "vllm.v1.attention",
                "vllm.v1.attention.ops",
                "vllm.third_party",
            ),
        ),
    )
}


@dataclass
class Count:
    """What came of a suite's cases.

    Attributes:
        passed, failed: by the file's own checks.
        refused: raised NotImplementedError; pytest shows them as failed.
        skipped: by the file itself.
        left_out: not run, as the time was up, or another shard has them.
        timed: of the cases run, those with a timing part.
        failures: what the first ones said.
        timings: the lines that timing parts print, by case.
        ending: the file's last line, unless cases were left out or gone over.
    """

    passed: int = 0
    failed: int = 0
    refused: int = 0
    skipped: int = 0
    left_out: int = 0
    timed: int = 0
    seconds: float = 0.0
    exit_code: int = 0
    ending: str = ""
    failures: list[dict[str, str]] = field(default_factory=list)
    timings: list[dict[str, str]] = field(default_factory=list)

    @property
    def run(self) -> int:
        return self.passed + self.failed + self.refused

    @property
    def cases(self) -> int:
        return self.run + self.skipped + self.left_out

    def record(self, outcome: str, case: str, what: str = "") -> None:
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome in ("failed", "refused") and len(self.failures) < MAX_FAILURES:
            self.failures.append({"case": case, "outcome": outcome, "what": what[-2000:]})

    def add(self, other: Count) -> None:
        """The cases of another process, which left out those of this one, if it got that far."""
        cases = max(self.cases, other.cases)
        for name in ("passed", "failed", "refused", "skipped", "timed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.left_out = max(0, cases - self.run - self.skipped)
        self.seconds = max(self.seconds, other.seconds)
        self.exit_code = max(self.exit_code, other.exit_code)
        self.ending = self.ending or other.ending
        self.failures = (self.failures + other.failures)[:MAX_FAILURES]
        self.timings += other.timings


@dataclass(frozen=True)
class Options:
    """How a suite is run.

    Attributes:
        keep_going: a case that failed does not end the file.
        time_limit: seconds after which no case begins; 0 for none.
        shard, shards: run every `shards`-th case, beginning with `shard`.
        kinds: "all", "untimed" or "timed" cases.
        only: text in the printed form of the cases that are run.
        peer: run the peer's own installed module instead of ours.
        quiet: the files' output is not shown.
    """

    keep_going: bool = False
    time_limit: float = 0.0
    shard: int = 0
    shards: int = 1
    kinds: str = "all"
    only: str = ""
    peer: bool = False
    quiet: bool = False


class _Cases:
    """Stands in for `torch.inference_mode` while a file defines its function for one case."""

    def __init__(self, options: Options, log: TextIO) -> None:
        self.options = options
        self.count = Count()
        self.log = log
        self.start = self.said = time.monotonic()
        self.seen = 0
        self.real = torch.inference_mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self.real(*args, **kwargs)

        class Decorator:
            __enter__ = context.__enter__
            __exit__ = context.__exit__

            def __call__(inner, function: Callable[..., Any]) -> Callable[..., Any]:
                return self.watch(function, context(function))

        return Decorator()

    def watch(self, plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(case: Any) -> Any:
            number, self.seen = self.seen, self.seen + 1
            names = plain.__globals__
            if "_counter" in names and getattr(case, "seed", 0) == -1:
                # As the file does, whether or not the case is run: its data stay the same.
                case.seed = names["_counter"].next()
            timed = _is_timed(case)
            if not self.wants(number, timed, repr(case)):
                self.count.left_out += 1
                return _as_if_passed(names)
            self.count.timed += timed
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(_Tee(printed, self.log)):
                    result = self.with_memory(function, case)
            except Exception as error:
                refused = isinstance(error, NotImplementedError)
                self.count.record(
                    "refused" if refused else "failed",
                    repr(case),
                    printed.getvalue() + "".join(traceback.format_exception(error)[-3:]),
                )
                if not self.options.keep_going or "CUDA error" in str(error):
                    raise
                return _as_if_passed(names)
            finally:
                self.progress()
            good = _is_good(result)
            self.count.record("passed" if good else "failed", repr(case), printed.getvalue())
            if timed:
                line = ", ".join(re.findall(_TIMING, printed.getvalue(), re.MULTILINE))
                self.count.timings.append({"case": repr(case), "time": line})
            return _as_if_passed(names) if self.options.keep_going and not good else result

        return run

    def with_memory(self, function: Callable[..., Any], case: Any) -> Any:
        """function(case); where other processes have the GPU's memory, wait until there is some."""
        until = time.monotonic() + MEMORY_WAIT * (self.options.shards > 1)
        while True:
            try:
                return function(case)
            except torch.OutOfMemoryError:
                if time.monotonic() >= until:
                    raise
            torch.cuda.empty_cache()
            time.sleep(1)

    def wants(self, number: int, timed: bool, case: str) -> bool:
        options = self.options
        if options.time_limit and time.monotonic() - self.start > options.time_limit:
            return False
        if options.kinds != "all" and timed != (options.kinds == "timed"):
            return False
        return options.only in case and number % options.shards == options.shard

    def progress(self) -> None:
        if time.monotonic() - self.said < 5:
            return
        self.said = time.monotonic()
        count, took = self.count, self.said - self.start
        print(
            f"[{took:.0f} s: {count.run} cases run, {count.passed} passed, {count.failed} failed, "
            f"{count.refused} refused; number {self.seen}]",
            file=sys.stderr,
            flush=True,
        )


_TIMING = r"^(?:Time \(per\)|Splitkv time|Combine time|TFlops|GB/s|Prefill:|\d+\.\d+ ms).*$"


class _Tee(io.TextIOBase):
    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


def _is_timed(case: Any) -> bool:
    return getattr(case, "num_runs", 0) > 0 or getattr(case, "test_performance", False)


def _is_good(result: Any) -> bool:
    """The files answer with a result, a bool, or None after their asserts."""
    return bool(getattr(result, "is_correct", result is None or result))


def _as_if_passed(names: dict[str, Any]) -> Any:
    return names["Result"](True, *[0.0] * 6) if "Result" in names else True


def our_kernels() -> set[str]:
    """Names of the kernels in the modules of ours that are loaded."""
    from triton.runtime.jit import JITFunction

    found = set()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sparse_mla.ops."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    found.add(value.fn.__name__)
    return found


@contextlib.contextmanager
def kernels_named(attention: str, combine: str) -> Iterator[None]:
    """torch's profiler shows our kernels under these names, all under the first if it is alone."""
    profile: Any = torch.profiler.profile
    real = profile.events

    def events(self: Any) -> Any:
        found = real(self)
        ours = our_kernels()
        for event in found:
            if event.name in ours:
                merges = combine and any(word in event.name for word in ("combine", "merge"))
                event.name = combine if merges else attention
        return found

    profile.events = events
    try:
        yield
    finally:
        profile.events = real


def run_script(suite: Suite, checkout: Path, options: Options) -> Count:
    """Run a file as __main__, its folder first on the path."""
    path = checkout / suite.file
    log: TextIO = io.StringIO() if options.quiet else sys.stdout
    cases = _Cases(options, log)
    before = list(sys.argv), list(sys.path)
    sys.argv, sys.path[:0] = [str(path)], [str(path.parent)]
    everything = io.StringIO()
    named = kernels_named(suite.attention, suite.combine) if not options.peer else None
    try:
        torch.inference_mode = cases  # type: ignore[assignment,misc]
        with contextlib.redirect_stdout(_Tee(everything, log)), named or contextlib.nullcontext():
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        cases.count.exit_code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:
        traceback.print_exc()
        cases.count.exit_code = 1
        everything.write(f"\n{type(error).__name__}: {error}")
    finally:
        torch.inference_mode = cases.real  # type: ignore[misc]
        sys.argv, sys.path[:] = before
    count = cases.count
    count.seconds = time.monotonic() - cases.start
    lines = re.sub(r"\x1b\[[\d;]*m", "", everything.getvalue()).strip().splitlines()
    # A file that was told that all is well says so: its last line counts only if all was.
    if lines and (count.exit_code or not count.left_out + count.failed + count.refused):
        count.ending = lines[-1].strip()
    return count


class _Reports:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.count = Count()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self.count.record("skipped", report.nodeid)
        elif report.failed:
            text = str(report.longrepr)
            refused = "NotImplementedError" in text
            self.count.record("refused" if refused else "failed", report.nodeid, text)
        elif report.when == "call":
            self.count.record("passed", report.nodeid)


def run_pytest(suite: Suite, checkout: Path, options: Options) -> Count:
    """Run a file by pytest in this process."""
    import pytest

    for name in suite.packages:
        if name not in sys.modules:
            package = type(sys)(name)
            package.__path__ = []
            sys.modules[name] = package
    reports = _Reports()
    start = time.monotonic()
    path = checkout / suite.file
    arguments = [str(path), f"--rootdir={path.parent}", "-c", os.devnull, *(suite.pytest or ())]
    if not options.keep_going:
        arguments.append("-x")
    reports.count.exit_code = int(pytest.main(arguments, plugins=[reports]))
    reports.count.seconds = time.monotonic() - start
    return reports.count


def run(suite: Suite, checkout: Path, options: Options) -> Count:
    """Run a suite in this process, which the file may leave with other defaults."""
    if not options.peer:
        installer.install(suite.installs)
    runner = run_script if suite.pytest is None else run_pytest
    try:
        return runner(suite, checkout, options)
    finally:
        installer.uninstall()


def in_processes(suite: Suite, checkout: Path, options: Options, processes: int) -> Count:
    """Run a suite's untimed cases in several processes, then the timed ones in one."""
    first, step = options.shard, options.shards
    jobs = [("untimed", first + step * i, step * processes) for i in range(processes)]
    total = _together(suite, checkout, options, jobs)
    if not options.time_limit or total.seconds < options.time_limit:
        timed = _together(suite, checkout, options, [("timed", first, step)])
        seconds = total.seconds + timed.seconds
        total.add(timed)
        total.seconds = seconds
    return total


def _together(
    suite: Suite, checkout: Path, options: Options, jobs: Sequence[tuple[str, int, int]]
) -> Count:
    running = []
    for kinds, shard, shards in jobs:
        command = [sys.executable, "-m", __spec__.name, str(checkout), suite.name]
        command += ["--json", "-", "--quiet", "--kinds", kinds, "--shard", f"{shard}/{shards}"]
        command += ["--keep-going"] * options.keep_going + ["--peer"] * options.peer
        command += ["--only", options.only]
        if options.time_limit:
            command += ["--time-limit", str(options.time_limit)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    total = Count()
    for process in running:
        out, _ = process.communicate()
        lines = out.strip().splitlines()
        try:
            total.add(Count(**json.loads(lines[-1])["suites"][suite.name]["count"]))
        except (IndexError, ValueError, KeyError):
            total.exit_code = max(total.exit_code, process.returncode or 1)
            total.ending = "a process ended without a result: " + (lines[-1] if lines else "")
    return total


def commit_of(checkout: Path) -> str:
    """The checkout's commit, "unknown" where git does not say."""
    command = ("git", "-C", str(checkout), "rev-parse", "--short", "HEAD")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_mla.compat.conformance",
        description="Run a peer's own tests, unmodified, on the kernels of sparse_mla.",
    )
    parser.add_argument("checkout", type=Path, help="a clone of the peer's repository")
    parser.add_argument(
        "suites", nargs="*", help=f"{', '.join(SUITES)}; default all that CHECKOUT has"
    )
    parser.add_argument("--json", help="file for the result, - for stdout")
    parser.add_argument("--commit", help="the checkout's commit, if git does not say")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failed case")
    parser.add_argument("--time-limit", type=float, default=0.0, help="seconds for each suite")
    parser.add_argument("--processes", type=int, default=1, help="that share the untimed cases")
    parser.add_argument("--kinds", choices=("all", "untimed", "timed"), default="all")
    parser.add_argument("--only", default="", help="text in the cases' printed form, as d_qk=576")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth case, from the Ith on")
    parser.add_argument("--peer", action="store_true", help="run the installed peer, not ours")
    parser.add_argument("--quiet", action="store_true", help="do not show the files' output")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    there = [s.name for s in SUITES.values() if (given.checkout / s.file).exists()]
    for name in given.suites:
        if name not in SUITES:
            parser.error(f"suite is {name!r}, allowed: {', '.join(SUITES)}")
        if name not in there:
            parser.error(f"{given.checkout} has no {SUITES[name].file}")
    names = given.suites or there
    if not names:
        parser.error(f"{given.checkout} has none of {', '.join(s.file for s in SUITES.values())}")
    shard, _, shards = given.shard.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        parser.error(f"--shard is {given.shard!r}, must be I/N with I < N")
    options = Options(
        given.keep_going,
        given.time_limit,
        int(shard),
        int(shards),
        given.kinds,
        given.only,
        given.peer,
        given.quiet,
    )
    separate = given.processes > 1 or len(names) > 1
    counts: dict[str, Count] = {}
    for name in names:
        suite = SUITES[name]
        if separate and suite.pytest is None and given.processes > 1:
            counts[name] = in_processes(suite, given.checkout, options, given.processes)
        elif separate:
            counts[name] = _together(
                suite, given.checkout, options, [(given.kinds, int(shard), int(shards))]
            )
        else:
            counts[name] = run(suite, given.checkout, options)
        _say(name, counts[name])
    if given.json:
        _write(given.json, given.commit or commit_of(given.checkout), counts, given.peer)
    return int(any(c.exit_code or c.failed or c.refused for c in counts.values()))


def _say(name: str, count: Count) -> None:
    print(
        f"{name}: {count.run} cases run, {count.passed} passed, {count.failed} failed, "
        f"{count.refused} refused, {count.skipped} skipped, {count.left_out} left out, "
        f"{count.timed} of them timed, {count.seconds:.0f} s, exit code {count.exit_code}; "
        f"it ended with: {count.ending}",
        file=sys.stderr,
        flush=True,
    )


def _write(where: str, commit: str, counts: dict[str, Count], peer: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device("cpu")
    result = {
        "machine": asdict(this_machine(device)),
        "implementation": "peer" if peer else "sparse_mla",
        "suites": {
            name: {
                "peer": SUITES[name].peer,
                "file": SUITES[name].file,
                "commit": commit,
                "count": asdict(count),
            }
            for name, count in counts.items()
        },
    }
    if where == "-":
        print(json.dumps(result), flush=True)
    else:
        Path(where).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
