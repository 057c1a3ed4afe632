"""The GitHub Actions template: its steps, run by hand on the toy kernel."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from story_repository import Story, git, make_story
from typer.testing import CliRunner

from sparse_mla.cli import app

TEMPLATE = Path(__file__).parents[2] / "examples" / "bump-workflow.yml"


def steps() -> dict[str, str]:
    """The commands of the template's steps by name; enough YAML for this one file."""
    found = {}
    blocks = re.split(r"\n      - ", TEMPLATE.read_text())[1:]
    for block in blocks:
        name = re.match(r"name: (.*)", block)
        script = re.search(r"\n        run: (?:\|\n((?:          .*\n|\n)+)|(.*))", block + "\n")
        if name and script:
            found[name[1]] = textwrap.dedent(script[1]) if script[1] else script[2]
    return found


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Story]:
    """An engine's repository: a FetchContent pin and its lock, bumped in the last commit."""
    story = make_story(tmp_path / "kernel")
    engine = tmp_path / "engine"
    (engine / "cmake").mkdir(parents=True)
    (engine / "cmake" / "toy.cmake").write_text(
        f"FetchContent_Declare(toy_mla GIT_REPOSITORY {story.path} GIT_TAG {story.commits[0]})"
    )
    git(engine, "init", "-q", "-b", "main")
    for commit in (story.exact, story.last):
        command = ["bump", "toy_mla", "--to", commit, "--cmake", str(engine / "cmake/toy.cmake"),
                   "--build", "pwd", "--lock", str(engine / "kernels.lock"), "--device", "cpu",
                   "--case", "decode/scales/*"]  # fmt: skip
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        git(engine, "add", ".")
        git(engine, "commit", "-qm", f"bump to {commit}")
    return engine, story


def test_the_templates_steps(project: tuple[Path, Story], tmp_path: Path) -> None:
    engine, story = project
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "sparse-mla"
    # On CPU, and few cases: the only difference from what CI runs.
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom sparse_mla.cli import app\n"
        "few = ['--device', 'cpu', '--case', 'decode/scales/*']\n"
        "app(sys.argv[1:] + (few if sys.argv[1] == 'compare' else []))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tools / "python").symlink_to(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PROVIDER": "toy_mla",
        "SOURCE": str(story.path),
        "BUILD": "sh build.sh",
        "BASE": git(engine, "rev-parse", "HEAD^"),
    }

    def run(name: str) -> subprocess.CompletedProcess[str]:
        script = "set -eo pipefail\n" + steps()[name]
        return subprocess.run(
            ["bash", "-c", script], cwd=engine, env=environment, capture_output=True, text=True
        )

    names = ("Pins agree with the lock", "Build before and after", "Compare", "The lock holds")
    assert set(steps()) == {"Install", *names}
    for name in names:
        done = run(name)
        assert done.returncode == 0, (name, done.stdout, done.stderr)
    assert story.last in (engine / "report.html").read_text()
    assert "Decode: multiply by the scales as stored" in (engine / "report.html").read_text()
    assert (engine / "compare.xml").exists()

    pin = engine / "cmake" / "toy.cmake"
    pin.write_text(pin.read_text().replace(story.last, story.breaks))
    done = run("Pins agree with the lock")
    assert done.returncode == 1 and "drift" in done.stdout


def test_actions_are_pinned_by_full_hashes() -> None:
    used = re.findall(r"uses: (\S+)", TEMPLATE.read_text())
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in used)
