"""Bad input to the bump commands: one clear line, exit 2, nothing changed on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from story_repository import Story, git, make_story
from typer.testing import CliRunner

from sparse_mla.cli import app

CASE = ["--device", "cpu", "--case", "decode/scales/amax"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("bad") / "repository")


@pytest.fixture
def tree(tmp_path: Path, story: Story) -> Path:
    """A folder with a build file, a lock and a requirements file, all in order."""
    (tmp_path / "deps.cmake").write_text(
        f"FetchContent_Declare(toy_mla GIT_REPOSITORY {story.path} GIT_TAG {story.exact})\n"
    )
    (tmp_path / "kernels.lock").write_text(lock_text(story))
    return tmp_path


def lock_text(story: Story) -> str:
    return f"""schema = 1

[[provider]]
name = "toy_mla"
source = {{ kind = "git", url = "{story.path}", commit = "{story.exact}" }}

[[provider.pin]]
kind = "cmake"
file = "deps.cmake"
name = "toy_mla"

[provider.certificate]
date = "2026-01-01"
gate = "0.1.0"
catalogue = "sha256:0"
cases = "case:decode/scales/amax"
seed = 0
limit = 1.7
machine = {{ device = "x" }}
ops = {{ decode = {{ passed = 1, error = 1.3 }} }}
"""


def state(*folders: Path) -> dict[str, str]:
    """Every file's content, git's own included, but for what it notes of visits."""
    visits = ("index", "FETCH_HEAD", "ORIG_HEAD")
    found = {}
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in files:
                path = Path(root) / name
                if name not in visits and "logs" not in path.parts:
                    found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused(arguments: list[object], message: str, *folders: Path) -> None:
    before = state(*folders)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert state(*folders) == before


def bump(tree: Path, to: str, *more: object, build: str = "sh build.sh") -> list[object]:
    return ["bump", "toy_mla", "--to", to, "--cmake", tree / "deps.cmake", "--build", build,
            "--lock", tree / "kernels.lock", *CASE, *more]  # fmt: skip


@pytest.mark.parametrize("to", ["main", "v1.0", "HEAD", "abc1234", "A" * 40, "", "--help x"])
def test_moving_refs_are_refused(tree: Path, story: Story, to: str) -> None:
    refused(
        ["bump", "toy_mla", f"--to={to}", *bump(tree, "")[4:]], "full commit hash", tree, story.path
    )


def test_unreachable_commit(tree: Path, story: Story) -> None:
    refused(
        bump(tree, "1" * 40), f"commit {'1' * 40} cannot be had from {story.path}", tree, story.path
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no GIT_TAG that matches 'toy_mla'; declared with a tag: none"),
        ("FetchContent_Declare(toy_mla URL https://example.org/a.tgz)", "has no GIT_TAG"),
        ("# FetchContent_Declare(toy_mla GIT_TAG {c})", "has no GIT_TAG"),
        ("FetchContent_Declare(cutlass GIT_TAG {c})", "declared with a tag: cutlass"),
        (
            "FetchContent_Declare(repo-toymla GIT_TAG {c})\n"
            "FetchContent_Declare(toymla2 GIT_TAG {c})",
            "has 2 GIT_TAGs that match 'toy_mla': repo-toymla in line 1, toymla2 in line 2",
        ),
        ("FetchContent_Declare(toy_mla GIT_TAG {c} GIT_TAG {c})", "has 2 GIT_TAGs"),
    ],
)
def test_cmake_files_with_no_tag_or_several(
    tree: Path, story: Story, text: str, message: str
) -> None:
    (tree / "deps.cmake").write_text(text.replace("{c}", story.exact))
    refused(bump(tree, story.last), message, tree, story.path)


def test_cmake_file_that_is_missing_or_not_text(tree: Path, story: Story) -> None:
    (tree / "deps.cmake").write_bytes(b"\xff\xfe\x00")
    refused(bump(tree, story.last), "is not UTF-8", tree)
    (tree / "deps.cmake").unlink()
    refused(bump(tree, story.last), "No such file", tree)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("echo broken compiler >&2; exit 4", "ended with status 4 at {c}: broken compiler"),
        ("true", "printed nothing at {c}"),
        ("echo /no/such/place", "last line is '/no/such/place' at {c}"),
        ("no_such_command_here", "ended with status 127"),
    ],
)
def test_build_commands_that_fail_or_print_nothing(
    tree: Path, story: Story, build: str, message: str
) -> None:
    message = message.replace("{c}", story.last[:12])
    refused(bump(tree, story.last, build=build), message, tree, story.path)
    ends = ["--good", story.exact, "--bad", story.breaks]
    bisect = ["bisect", "--provider", "toy_mla", *ends, "--checkout", story.path, "--build", build]
    refused([*bisect, *CASE], message.replace(story.last[:12], story.exact[:12]), story.path)
    assert git(story.path, "symbolic-ref", "--short", "HEAD") == "main"


def test_unwritable_lock(tree: Path, story: Story) -> None:
    for place, message in ((tree, "Is a directory"), (tree / "no" / "k.lock", "No such file"),
                           (tree / "deps.cmake" / "k.lock", "Not a directory")):  # fmt: skip
        command = bump(tree, story.last)
        command[command.index(tree / "kernels.lock")] = place
        refused(command, message, tree)
        refused(["lock", f"toy_mla@{story.path}", "--lock", place, *CASE], message, tree)


def test_a_lock_elsewhere_cannot_name_the_build_file(tree: Path, story: Story) -> None:
    (tree / "sub").mkdir()
    command = bump(tree, story.last)
    command[command.index(tree / "kernels.lock")] = tree / "sub" / "kernels.lock"
    refused(command, "does not lie below", tree)


def changed(old: str, new: str):  # type: ignore[no-untyped-def]
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("schema = 1", "schema = 2"), "has schema 2, this version reads 1"),
        (changed("schema = 1\n", ""), "has schema None"),
        (changed("schema = 1", "schema = "), "is not TOML"),
        (lambda text: text + text.split("schema = 1\n")[1], "locks 'toy_mla' 2 times"),
        (
            changed("[provider.certificate]", '[[provider.pin]]\nkind = "cmake"\nfile = '
                    '"deps.cmake"\nname = "toy_mla"\n\n[provider.certificate]'),
            "has the pin 'toy_mla' of deps.cmake 2 times",
        ),
        (changed('kind = "git"', 'kind = "hg"'), "kind of source is 'hg'"),
        (changed('kind = "git"', 'evil = "x", kind = "git"'), "evil"),
        (changed('commit = "', 'commit = "main'), "full commit hash"),
        (changed('url = "', 'url = "ext::sh -c touch% /tmp/x '), "repository is"),
        (changed('url = "', 'url = "--upload-pack=x'), "repository is"),
        (changed('file = "deps.cmake"', 'file = "../deps.cmake"'), "below the lock's folder"),
        (changed('file = "deps.cmake"', 'file = "/etc/passwd"'), "below the lock's folder"),
        (changed('kind = "cmake"', 'kind = "exec"'), "kind of pin is 'exec'"),
        (changed("[provider.certificate]", "[provider.nothing]"), "lacks or garbles"),
        (changed("seed = 0", 'seed = "x"'), "provider 1"),
        (changed("limit = 1.7", "limit = inf"), "limit is inf, must be from 1 to 100"),
        (changed("limit = 1.7", "limit = nan"), "limit is nan"),
        (changed("limit = 1.7", "limit = 0.5"), "limit is 0.5"),
        (changed('"case:decode/scales/amax"', '"everything"'), "cases is 'everything'"),
        (changed('name = "toy_mla"', "name = 3"), "must be text"),
        (lambda text: "schema = 1\n", "locks no provider"),
        (lambda text: "\x00", "is not TOML"),
    ],
)  # fmt: skip
def test_locks_that_are_not_in_order(tree: Path, story: Story, change, message: str) -> None:  # type: ignore[no-untyped-def]
    lock = tree / "kernels.lock"
    lock.write_text(change(lock_text(story)))
    refused(["verify", "--lock", lock, "--device", "cpu", "--provider", f"toy_mla@{story.path}"],
            message, tree, story.path)  # fmt: skip


def test_bump_and_lock_leave_a_foreign_lock_alone(tree: Path, story: Story) -> None:
    (tree / "kernels.lock").write_text("schema = 9\n")
    refused(bump(tree, story.last), "has schema 9", tree)
    refused(["lock", f"toy_mla@{story.path}", "--lock", tree / "kernels.lock", "--cmake",
             tree / "deps.cmake", *CASE], "has schema 9", tree)  # fmt: skip


def test_verify_of_pins_where_none_is_locked(tree: Path, story: Story) -> None:
    """Nothing that was compared is nothing that agrees."""
    lock = tree / "kernels.lock"
    text = lock_text(story)
    start, end = text.index("[[provider.pin]]"), text.index("[provider.certificate]")
    lock.write_text(text[:start] + text[end:])
    refused(["verify", "--lock", lock, "--pins-only"], "holds no pin of a build", tree)


def test_verify_without_a_lock(tmp_path: Path) -> None:
    refused(["verify", "--lock", tmp_path / "none.lock"], "No such file", tmp_path)


def test_verify_with_a_provider_that_is_not_locked(tree: Path) -> None:
    command = ["verify", "--lock", tree / "kernels.lock", "--provider", "other@/tmp"]
    refused(command, "does not lock 'other'", tree)


def test_lock_refuses_what_is_not_the_pinned_commit(tree: Path, story: Story) -> None:
    lock = tree / "new.lock"
    command = ["lock", f"toy_mla@{story.path}", "--lock", lock, *CASE]
    message = f"is commit {story.last}, the pin says {story.exact}"
    refused([*command, "--cmake", tree / "deps.cmake"], message, tree)
    (tree / "deps.cmake").write_text("FetchContent_Declare(toy_mla GIT_TAG main)")
    refused([*command, "--cmake", tree / "deps.cmake"], "main is a branch or tag", tree)
    refused(command, "give it with --url", tree)


def test_dirty_checkout(story: Story) -> None:
    readme = story.path / "README.md"
    text = readme.read_text()
    readme.write_text("changed")
    try:
        refused(["bisect", "--provider", "toy_mla", "--good", story.exact, "--bad", story.breaks,
                 "--checkout", story.path, "--build", "pwd", *CASE],
                "has 1 uncommitted change(s), first: M README.md", story.path)  # fmt: skip
    finally:
        readme.write_text(text)


def test_bisect_with_ends_that_do_not_serve(story: Story, tmp_path: Path) -> None:
    def command(good: str, bad: str, checkout: Path = story.path) -> list[object]:
        return ["bisect", "--provider", "toy_mla", "--good", good, "--bad", bad,
                "--checkout", checkout, "--build", "sh build.sh", *CASE]  # fmt: skip

    refused(command(story.exact, "1" * 40), f"commit {'1' * 40} is not in", story.path)
    refused(command("no-such-branch", story.last), "commit no-such-branch is not in", story.path)
    refused(command(story.exact, story.exact), "are the same commit", story.path)
    refused(command(story.exact, story.commits[1]), "is not worse than the good one", story.path)
    refused(command(story.breaks, story.exact), "the other way round", story.path)
    refused(command(story.exact, story.breaks, tmp_path / "no"), "no such directory", story.path)
    refused(command(story.exact, story.breaks, tmp_path), "is not a git checkout", story.path)
    assert git(story.path, "symbolic-ref", "--short", "HEAD") == "main"


def test_bisect_beside_a_bisect_of_the_user(story: Story) -> None:
    git(story.path, "bisect", "start")
    try:
        refused(["bisect", "--provider", "toy_mla", "--good", story.exact, "--bad", story.breaks,
                 "--checkout", story.path, "--build", "pwd", *CASE],
                "a git bisect is under way", story.path)  # fmt: skip
    finally:
        git(story.path, "bisect", "reset")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "no_such_provider_here", "cpu", *CASE],
            "'no_such_provider_here' cannot be used",
        ),
        (
            ["compare", "toy_mla@/no/venv", "cpu", *CASE],
            "/no/venv: no such interpreter or directory",
        ),
        (["compare", "json", "cpu", *CASE], "flash_mla_with_kvcache"),
        (["compare", "flash_mla", "cpu", *CASE], "flash_mla"),
        (["compare", "cpu", "cpu", "--case", "no/such"], "no case matches"),
        (["compare", "cpu", "cpu", *CASE, "--lang", "fr"], "language is 'fr', allowed: en, zh"),
        (["compare", "cpu", "cpu", *CASE, "--report", "r.txt"], "must end in .html or .md"),
        (["compare", "cpu", "cpu", *CASE, "--json", "/no/such/x"], "No such file"),
        (["compare", "cpu", "cpu", *CASE, "--checkout", "/no/such"], "no such directory"),
        (["compare", "cpu", "cpu", *CASE, "--cmake", "/no/such"], "No such file"),
        (["compare", "cpu", "cpu", *CASE, "--speed", "--workload", "x y"], "no workload's label"),
        (["compare", "cpu", "cpu", "--device", "abacus"], "abacus"),
        (["providers", "toy@/no/such"], "no such interpreter or directory"),
        (["providers", "--json", "/no/such/x"], "No such file"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused(list(arguments), message, tmp_path)


def test_no_fault_of_that_name(tree: Path, story: Story) -> None:
    refused(bump(tree, story.repairs, "--accept-fault", "gremlin"), "fault is 'gremlin'", tree)


def test_a_write_that_fails_puts_everything_back(
    tree: Path, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses the second file, after the first was exchanged."""
    replace = os.replace
    done: list[object] = []

    def failing(source: object, target: object) -> None:
        done.append(target)
        if len(done) == 2:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "replace", failing)
    refused(bump(tree, story.last), "No space left on device; nothing was changed", tree)
    assert len(done) == 2
