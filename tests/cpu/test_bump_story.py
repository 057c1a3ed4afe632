"""The real story, end to end, through the commands: bisect, compare, report, bump, verify."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from story_repository import Story, git, make_story
from typer.testing import CliRunner, Result

from sparse_mla.bump import bisect as bisecting
from sparse_mla.cli import app

# Enough to tell the faults apart, with prefill beside decode; the whole catalogue says the same.
CASES = ["--device", "cpu", "--case", "*/holes/[cl]*"]
SCALES = ["--device", "cpu", "--case", "decode/scales/*"]
BUILD = "sh build.sh"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("story") / "repository")


@pytest.fixture(scope="module")
def at(story: Story) -> dict[str, Path]:
    """Checkouts of the commits that matter."""
    made = {}
    for name in ("exact", "breaks", "repairs", "last"):
        made[name] = story.path.parent / name
        git(story.path, "worktree", "add", "-q", "--detach", str(made[name]), getattr(story, name))
    return made


@pytest.fixture
def build_tree(tmp_path: Path, story: Story) -> Path:
    """A copy of a FetchContent file that pins the broken commit, with odd formatting."""
    (tmp_path / "cmake").mkdir()
    file = tmp_path / "cmake" / "toy.cmake"
    file.write_bytes(
        b"include(FetchContent)\r\n# GIT_TAG 0123 is not this one\r\n"
        b"FetchContent_Declare(\r\n\trepo-toymla\r\n"
        + f"    GIT_REPOSITORY {story.path}\r\n    GIT_TAG   ".encode()
        + story.breaks.encode()
        + b" # old \xe2\x80\x94 slow\r\n    GIT_SHALLOW OFF\r\n)\r\n"
        b"FetchContent_Declare(cutlass GIT_REPOSITORY https://example.org/cutlass GIT_TAG "
        + b"1" * 40
        + b")"
    )
    return file


def bump_command(story: Story, build_tree: Path, to: str, *more: str | Path) -> Result:
    lock = build_tree.parents[1] / "kernels.lock"
    return run("bump", "toy_mla", "--to", to, "--cmake", build_tree, "--build", BUILD, "--lock",
               lock, *SCALES, *more)  # fmt: skip


def test_bisect_finds_the_break(story: Story, tmp_path: Path) -> None:
    before = (git(story.path, "rev-parse", "HEAD"), git(story.path, "status", "--porcelain"))
    saved = tmp_path / "found.json"
    result = run("bisect", "--provider", "toy_mla", "--good", story.commits[0], "--bad",
                 story.commits[6], "--checkout", story.path, "--build", BUILD, "--json", saved,
                 *CASES)  # fmt: skip
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"first bad commit: {story.breaks} Decode: scales by exponent")
    assert last.endswith("[scale_pow2_down]")
    assert "shown by decode/holes/" in result.stdout
    found = json.loads(saved.read_text())
    assert (found["commit"], found["fault"]) == (story.breaks, "scale_pow2_down")
    assert f"skip {story.unbuildable[:12]}" in result.stdout or found["skipped"] == 0
    assert (
        git(story.path, "rev-parse", "HEAD"),
        git(story.path, "status", "--porcelain"),
    ) == before
    assert git(story.path, "symbolic-ref", "--short", "HEAD") == "main"
    for name in ("sparse-mla-bisect.json", "BISECT_START", "BISECT_LOG"):
        assert not (story.path / ".git" / name).exists()


def test_bisect_finds_the_repair_and_skips_what_does_not_build(story: Story) -> None:
    result = run("bisect", "--provider", "toy_mla", "--good", story.repairs, "--bad", story.breaks,
                 "--checkout", story.path, "--build", BUILD, *CASES)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"first repaired commit: {story.repairs} Fix accuracy" in result.stdout
    assert "left: matches scale_bf16" in result.stdout
    assert "gone: matches scale_pow2_down" in result.stdout
    assert f"skip {story.unbuildable[:12]}" in result.stdout


@pytest.mark.parametrize("after", [0, 3])
def test_bisect_goes_on_after_an_interruption(
    story: Story, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    command = ["bisect", "--provider", "toy_mla", "--good", story.repairs, "--bad", story.breaks,
               "--checkout", story.path, "--build", BUILD, *CASES]  # fmt: skip
    measure = bisecting._Search.measure
    measured: list[str] = []

    def interrupted(self, commit, cases):  # type: ignore[no-untyped-def]
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append(commit)
        return measure(self, commit, cases)

    monkeypatch.setattr(bisecting._Search, "measure", interrupted)
    assert run(*command).exit_code != 0
    assert (story.path / ".git" / "sparse-mla-bisect.json").exists()
    other = run(*command[:4], story.exact, *command[5:])
    assert other.exit_code == 2 and "another bisect was interrupted here" in other.stderr
    assert len(other.stderr.splitlines()) == 1

    again: list[str] = []

    def counted(self, commit, cases):  # type: ignore[no-untyped-def]
        again.append(commit)
        return measure(self, commit, cases)

    monkeypatch.setattr(bisecting._Search, "measure", counted)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert f"first repaired commit: {story.repairs}" in result.stdout
    assert not set(measured) & set(again)
    assert git(story.path, "symbolic-ref", "--short", "HEAD") == "main"


def test_bisect_with_only_skipped_commits_left_says_which(story: Story) -> None:
    build = f"case $SPARSE_MLA_COMMIT in {story.repairs}|{story.breaks}) pwd;; *) exit 1;; esac"
    result = run("bisect", "--provider", "toy_mla", "--good", story.repairs, "--bad", story.breaks,
                 "--checkout", story.path, "--build", build, *CASES)  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "skipped commits leave" in result.stdout
    assert story.repairs in result.stdout
    assert git(story.path, "symbolic-ref", "--short", "HEAD") == "main"


def test_compare_says_better_and_what_remains(
    story: Story, at: dict[str, Path], tmp_path: Path
) -> None:
    outputs = [tmp_path / name for name in ("c.json", "c.xml", "c.html")]
    result = run("compare", f"toy_mla@{at['breaks']}", f"toy_mla@{at['repairs']}", *CASES,
                 "--json", outputs[0], "--junit", outputs[1], "--report", outputs[2],
                 "--checkout", story.path,
                 "--why", "GSM8K fell <script>alert(1)</script>")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("better: decode: ")
    data = json.loads(outputs[0].read_text())
    assert data["verdict"] == "better"
    assert data["diagnoses"]["base"]["fault"] == "scale_pow2_down"
    assert data["diagnoses"]["candidate"]["fault"] == "scale_bf16"
    for side, fault in (("base", "scale_pow2_down"), ("candidate", "scale_bf16")):
        wrong = [case[side] for case in data["cases"] if case[side]["status"] == "failed"]
        assert len(wrong) == 2 and {row["fault"] for row in wrong} == {fault}
    assert 1.6 < data["remains"]["median"] < 2.2 and data["remains"]["without"] < 1.4
    assert data["about"]["sides"]["candidate"]["origin"]["commit"] == story.repairs
    suites = ElementTree.parse(outputs[1]).getroot()
    assert len(suites.findall(".//testcase")) == len(data["cases"])
    assert not suites.findall(".//failure")
    page = outputs[2].read_text()
    assert "scale_pow2_down is gone; scale_bf16 remains" in page
    assert "An exact read of the scales would remove it" in page
    assert "at about 1.8" in page
    assert "Decode: multiply by the scales as stored" in page  # a later commit
    assert story.breaks in page and story.repairs in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_compare_the_other_way_is_worse_and_fails_ci(at: dict[str, Path], tmp_path: Path) -> None:
    xml = tmp_path / "c.xml"
    result = run(
        "compare", f"toy_mla@{at['exact']}", f"toy_mla@{at['breaks']}", *CASES, "--junit", xml
    )
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("worse: decode: ")
    failures = ElementTree.parse(xml).getroot().findall(".//failure")
    assert failures and all("failed where the base passed" in f.attrib["message"] for f in failures)


def test_compare_with_itself_is_same(at: dict[str, Path]) -> None:
    result = run("compare", f"toy_mla@{at['exact']}", f"toy_mla@{at['last']}", *CASES)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("same: ")


def test_compare_where_nothing_can_be_compared(at: dict[str, Path]) -> None:
    spec = f"toy_mla@{at['exact']}"
    result = run("compare", spec, spec, "--device", "cpu", "--case", "kv_write/skip")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("not comparable: ")


def test_report_in_chinese_and_markdown(story: Story, at: dict[str, Path], tmp_path: Path) -> None:
    pages = {}
    for suffix in ("html", "md"):
        path = tmp_path / f"r.{suffix}"
        result = run("compare", f"toy_mla@{at['breaks']}", f"toy_mla@{at['repairs']}", *SCALES,
                     "--report", path, "--lang", "zh", "--checkout", story.path)  # fmt: skip
        assert result.exit_code == 0, result.output
        pages[suffix] = path.read_text()
    for page in pages.values():
        for text in ("建议", "尚存问题", "精确读取缩放因子", "更好", "判定规则"):
            assert text in page
    assert 'lang="zh-CN"' in pages["html"]


def test_bump_moves_the_pin_and_verify_holds_it(
    story: Story, at: dict[str, Path], build_tree: Path
) -> None:
    before = build_tree.read_bytes()
    done = bump_command(story, build_tree, story.last)
    assert done.exit_code == 0, done.output
    assert f"{story.breaks} -> {story.last}" in done.stdout
    assert build_tree.read_bytes() == before.replace(story.breaks.encode(), story.last.encode())
    lock = build_tree.parents[1] / "kernels.lock"
    held = ["verify", "--lock", lock, "--provider", f"toy_mla@{at['last']}", "--device", "cpu"]
    result = run(*held)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "the lock holds"
    build_tree.write_bytes(
        build_tree.read_bytes().replace(story.last.encode(), story.exact.encode())
    )
    result = run(*held)
    assert result.exit_code == 1
    assert f"drift: {build_tree}:6 pins {story.exact}, the lock says {story.last}" in result.stdout
    assert run("verify", "--lock", lock, "--pins-only").exit_code == 1


def test_verify_notices_another_commit_and_worse_answers(
    story: Story, at: dict[str, Path], build_tree: Path
) -> None:
    assert bump_command(story, build_tree, story.last).exit_code == 0
    lock = build_tree.parents[1] / "kernels.lock"
    result = run(
        "verify", "--lock", lock, "--provider", f"toy_mla@{at['breaks']}", "--device", "cpu"
    )
    assert result.exit_code == 1
    assert f"drift: toy_mla is commit {story.breaks}" in result.stdout
    assert "decode/scales/amax failed, passed in the lock" in result.stdout


def test_a_candidate_that_fails_moves_nothing(
    story: Story, build_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = build_tree.read_bytes()
    result = bump_command(story, build_tree, story.repairs)
    assert result.exit_code == 1
    assert "not bumped: " in result.stdout and "matches scale_bf16" in result.stdout
    wrong = bump_command(story, build_tree, story.repairs, "--accept-fault", "scale_pow2_down")
    assert wrong.exit_code == 1 and "the failures are not scale_pow2_down" in wrong.stdout
    report = tmp_path_factory.mktemp("report") / "refused.md"
    refused = bump_command(story, build_tree, story.repairs, "--report", report)
    assert refused.exit_code == 1 and "scale\\_bf16 remains" in report.read_text()
    assert build_tree.read_bytes() == before
    assert sorted(os.listdir(build_tree.parents[1])) == ["cmake"]
    assert os.listdir(build_tree.parent) == ["toy.cmake"]


def test_a_named_fault_can_be_accepted_and_is_written_down(
    story: Story, build_tree: Path, tmp_path: Path
) -> None:
    report = tmp_path / "bump.html"
    result = bump_command(story, build_tree, story.repairs, "--accept-fault", "scale_bf16",
                          "--report", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert story.repairs.encode() in build_tree.read_bytes()
    assert 'accepted = "fault scale_bf16"' in (tmp_path / "kernels.lock").read_text()
    assert "scale_bf16 remains" in report.read_text()


def test_not_worse_is_enough_where_that_is_asked(story: Story, build_tree: Path) -> None:
    result = bump_command(story, build_tree, story.repairs, "--not-worse")
    assert result.exit_code == 0, result.output
    assert f"accepted: better, compared with {story.breaks}" in result.stdout


def test_lock_writes_what_the_build_pins(story: Story, at: dict[str, Path], tmp_path: Path) -> None:
    cmake = tmp_path / "deps.cmake"
    cmake.write_text(
        f"FetchContent_Declare(toy_mla GIT_REPOSITORY {story.path} GIT_TAG {story.last})"
    )
    lock = tmp_path / "kernels.lock"
    command = ["lock", f"toy_mla@{at['last']}", "--lock", lock, "--cmake", cmake, *SCALES]
    result = run(*command)
    assert result.exit_code == 0, result.output
    text = lock.read_text()
    lock.write_text(text.replace("schema = 1", "# kept\nschema = 1 # too"))
    assert run(*command).exit_code == 0
    assert "# kept\nschema = 1 # too" in lock.read_text()
    assert lock.read_text().count("[[provider]]") == 1


def test_as_a_process_with_a_failing_provider(at: dict[str, Path]) -> None:
    """The exit status that CI sees."""
    import sys

    code = "from sparse_mla.cli import app; app()"
    command = [sys.executable, "-c", code, "compare", f"toy_mla@{at['exact']}",
               f"toy_mla@{at['breaks']}", "--device", "cpu",
               "--case", "decode/scales/amax"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("worse: ")
