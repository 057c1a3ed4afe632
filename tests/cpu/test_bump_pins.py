"""The build's pins and the lock: reading, changing one tag, drift in every kind of file."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomlkit
from story_repository import git

from sparse_mla.accuracy.providers.base import Description, Origin
from sparse_mla.bump import cmake
from sparse_mla.bump.certificate import Certificate, OpResult, catalogue_hash, worse_than
from sparse_mla.bump.git import require_url
from sparse_mla.bump.lock import Entry, LockedPin, Source, lock_text, read_lock, write_all
from sparse_mla.bump.pins import all_pins, read_pin, read_requirements, read_submodules
from sparse_mla.bump.verify import check_pins, source_of

COMMIT, OTHER, SHA = "a" * 40, "b" * 40, "c" * 64

CMAKE = """
include(FetchContent) # FetchContent_Declare(repo-flashmla GIT_TAG main)
#[==[ FetchContent_Declare(flash_mla GIT_TAG nothing) ]==]
if(DEFINED ENV{FLASH_MLA_SRC_DIR})
  FetchContent_Declare(flashmla SOURCE_DIR $ENV{FLASH_MLA_SRC_DIR} CONFIGURE_COMMAND "" )
else()
  FETCHCONTENT_DECLARE(
        flashmla
        GIT_REPOSITORY https://github.com/vllm-project/FlashMLA
        GIT_TAG  # main, once ) [[
          #[[ GIT_TAG main ]] "TAG"   # keep ) this
        CONFIGURE_COMMAND "echo \\" GIT_TAG )"
  )
endif()
set(X [=[ FetchContent_Declare(flashmla GIT_TAG x) ]=])
ExternalProject_Add(cutlass GIT_REPOSITORY git@github.com:NVIDIA/cutlass.git GIT_TAG v4.0)
"""


def test_cmake_reader_sees_what_cmake_sees() -> None:
    found = cmake.fetches(CMAKE.replace('TAG"', f'{COMMIT}"'))
    assert [(f.name, f.tag.text) for f in found] == [("flashmla", COMMIT), ("cutlass", "v4.0")]
    assert found[0].url == "https://github.com/vllm-project/FlashMLA"
    assert found[0].line == 11


@pytest.mark.parametrize("name", ["flash_mla", "FlashMLA", "flashmla"])
def test_only_the_tag_changes(name: str) -> None:
    text = CMAKE.replace('TAG"', f'{COMMIT}"')
    made = cmake.replace_tag(text, cmake.find_tag(text, name, "x"), OTHER)
    assert made == CMAKE.replace('TAG"', f'{OTHER}"')


def test_a_declared_name_goes_before_a_likeness() -> None:
    text = f"FetchContent_Declare(mla GIT_TAG {COMMIT})\n"
    text += f"FetchContent_Declare(flash_mla GIT_TAG {OTHER})"
    assert cmake.find_tag(text, "mla", "x").tag.text == COMMIT


@pytest.mark.parametrize(
    ("value", "weakness"),
    [
        (COMMIT, ""), ("v1.0", "branch or tag"), ("abc1234", "short hash"),
        ("${FLASHMLA_TAG}", "a variable"), ("A" * 40, "branch or tag"),
    ],
)  # fmt: skip
def test_what_is_no_pin(tmp_path: Path, value: str, weakness: str) -> None:
    file = tmp_path / "x.cmake"
    file.write_text(f"FetchContent_Declare(flash_mla GIT_TAG {value})")
    found = read_pin("cmake", file, "flash_mla").weakness
    assert weakness in found and bool(weakness) == bool(found)


def test_requirements(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# a comment\n-r other.txt\n--index-url https://example.org\n\n"
        f"flash_mla==1.0.0 \\\n    --hash=sha256:{SHA} \\\n    --hash=sha256:{'d' * 64}\n"
        "Flashinfer.Python == 0.6.1  # no hash\n"
        "tilelang>=0.1\nsgl-kernel\nvllm==0.12.*\n"
        f"a @ git+https://github.com/x/a@{COMMIT}#egg=a\n"
        "b @ git+https://github.com/x/b@main\n"
        "c @ https://example.org/c-1.0.whl\n"
    )
    found = {pin.name: pin for pin in read_requirements(file)}
    assert found["flash_mla"].hashes == (SHA, "d" * 64) and not found["flash_mla"].weakness
    assert found["flash_mla"].line == 5
    assert "without a sha256" in found["Flashinfer.Python"].weakness
    assert read_pin("requirements", file, "flashinfer-python").value == "0.6.1"
    for name in ("tilelang", "sgl-kernel", "vllm"):
        assert "is not a pin" in found[name].weakness
    assert (found["a"].value, found["a"].url) == (COMMIT, "https://github.com/x/a")
    assert not found["a"].weakness
    assert "branch or tag" in found["b"].weakness
    assert "without a hash" in found["c"].weakness
    file.write_text("this is == not a requirement\n")
    with pytest.raises(ValueError, match=r"requirements\.txt:1: not a requirement"):
        read_requirements(file)


@pytest.fixture
def submodule(tmp_path: Path) -> Path:
    for name in ("kernel", "project"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "-q", "-b", "main")
    (tmp_path / "kernel" / "a").write_text("a")
    git(tmp_path / "kernel", "add", ".")
    git(tmp_path / "kernel", "commit", "-qm", "a")
    project = tmp_path / "project"
    git(project, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add",
        str(tmp_path / "kernel"), "third_party/flash-mla")  # fmt: skip
    git(project, "commit", "-qm", "submodule")
    return project


def test_submodules(submodule: Path) -> None:
    head = git(submodule / "third_party" / "flash-mla", "rev-parse", "HEAD")
    pin = read_pin("submodule", submodule, "flash_mla")
    assert (pin.value, pin.name, pin.weakness) == (head, "third_party/flash-mla", "")
    assert all_pins("submodule", submodule / ".gitmodules") == [pin]
    inside = submodule / "third_party" / "flash-mla"
    git(inside, "commit", "-q", "--allow-empty", "-m", "moved by hand")
    assert "the index says" in read_submodules(submodule)[0].weakness
    with pytest.raises(ValueError, match="0 entries for 'cutlass'"):
        read_pin("submodule", submodule, "cutlass")


def certificate(**more: object) -> Certificate:
    op = OpResult({"passed": 3, "failed": 1}, 1.3, 0.8, "decode/x", {"decode/y": "failed"})
    facts = {"date": "d", "gate": "g", "catalogue": "c", "cases": "all", "seed": 0, "limit": 1.7}
    return Certificate(**{**facts, "machine": {"device": "x"}, "ops": {"decode": op}, **more})  # type: ignore[arg-type]


def entry(source: Source, *pins: LockedPin, name: str = "flash_mla") -> Entry:
    return Entry(name, source, pins, certificate())


GIT = Source("git", url="https://github.com/deepseek-ai/FlashMLA", commit=COMMIT)
PACKAGE = Source("package", package="flash-mla", version="1.0.0", sha256=SHA)


def test_a_lock_comes_back_as_it_was(tmp_path: Path) -> None:
    lock = tmp_path / "kernels.lock"
    first = entry(GIT, LockedPin("cmake", "cmake/x.cmake", "flashmla"))
    lock.write_text(lock_text(lock, first))
    second = entry(PACKAGE, name="other")
    lock.write_text("# mine\n" + lock_text(lock, second))
    assert read_lock(lock) == [first, second]
    moved = entry(Source("git", url=GIT.url, commit=OTHER), *first.pins)
    lock.write_text(lock_text(lock, moved))
    assert read_lock(lock) == [moved, second]
    assert lock.read_text().startswith("# mine\n")
    tomlkit.parse(lock.read_text())


def test_nothing_in_a_lock_is_markup_or_code(tmp_path: Path) -> None:
    lock = tmp_path / "kernels.lock"
    evil = 'x"\n[[provider]]\nname = "y'
    made = Entry(evil, GIT, (), certificate(accepted=evil, machine={evil: evil}))
    lock.write_text(lock_text(lock, made))
    assert read_lock(lock) == [made]


@pytest.mark.parametrize(
    ("kind", "text", "source", "message"),
    [
        ("cmake", "FetchContent_Declare(flash_mla GIT_TAG {a})", GIT, ""),
        ("cmake", "FetchContent_Declare(flash_mla GIT_TAG {b})", GIT, "pins {b}, the lock"),
        ("cmake", "FetchContent_Declare(flash_mla GIT_TAG main)", GIT, "pins main"),
        ("cmake", "", GIT, "has no GIT_TAG"),
        ("requirements", "flash-mla==1.0.0 --hash=sha256:{c}", PACKAGE, ""),
        ("requirements", "flash-mla==1.0.1 --hash=sha256:{c}", PACKAGE, "pins 1.0.1, the lock"),
        ("requirements", "flash-mla==1.0.0 --hash=sha256:{d}", PACKAGE, "another sha256"),
        ("requirements", "flash-mla==1.0.0", PACKAGE, "has no sha256"),
        ("requirements", "flash-mla>=1.0.0", PACKAGE, "pins >=1.0.0"),
        ("requirements", "flash-mla @ git+https://github.com/x/y@{a}", GIT, ""),
        ("requirements", "flash-mla @ git+https://github.com/x/y@{b}", GIT, "pins {b}"),
        ("requirements", "", PACKAGE, "has 0 entries"),
    ],
)  # fmt: skip
def test_drift(tmp_path: Path, kind: str, text: str, source: Source, message: str) -> None:
    def put(text: str) -> str:
        for key, value in {"{a}": COMMIT, "{b}": OTHER, "{c}": SHA, "{d}": "d" * 64}.items():
            text = text.replace(key, value)
        return text

    (tmp_path / "file").write_text(put(text))
    (found,) = check_pins(
        entry(source, LockedPin(kind, "file", "flash_mla")), tmp_path / "kernels.lock"
    )
    assert found.ok == (message == "")
    assert put(message) in found.text


def test_drift_of_a_submodule(submodule: Path) -> None:
    head = git(submodule / "third_party" / "flash-mla", "rev-parse", "HEAD")
    pin = LockedPin("submodule", ".", "flash_mla")
    lock = submodule / "kernels.lock"
    assert check_pins(entry(Source("git", url="x", commit=head), pin), lock)[0].ok
    assert not check_pins(entry(GIT, pin), lock)[0].ok


def described(**origin: object) -> Description:
    return Description("flash_mla", "t", True, "", Origin(**origin))  # type: ignore[arg-type]


def test_what_is_locked_is_what_ran(tmp_path: Path) -> None:
    file = tmp_path / "x.cmake"
    file.write_text(f"FetchContent_Declare(flash_mla GIT_REPOSITORY u GIT_TAG {COMMIT})")
    pin = read_pin("cmake", file, "flash_mla")
    assert source_of("flash_mla", [pin], described(commit=COMMIT[:7])).commit == COMMIT
    assert (
        source_of("flash_mla", [], described(commit=COMMIT, url="https://x/y")).url == "https://x/y"
    )
    for given, message in (
        (described(commit="1234567"), "is commit 1234567, the pin says"),
        (described(commit=COMMIT, dirty=True), "uncommitted changes"),
    ):
        with pytest.raises(ValueError, match=message):
            source_of("flash_mla", [pin], given)
    for given, message in (
        (described(version="1.0"), r"known: 1\.0"),
        (described(commit=COMMIT), "with --url"),
        (described(commit=COMMIT, dirty=True, url="https://x/y"), "uncommitted changes"),
    ):
        with pytest.raises(ValueError, match=message):
            source_of("flash_mla", [], given)


def test_pins_that_disagree(tmp_path: Path) -> None:
    pins = []
    for name, commit in (("a", COMMIT), ("b", OTHER)):
        file = tmp_path / name
        file.write_text(f"FetchContent_Declare(flash_mla GIT_REPOSITORY u GIT_TAG {commit})")
        pins.append(read_pin("cmake", file, "flash_mla"))
    with pytest.raises(ValueError, match="pins disagree"):
        source_of("flash_mla", pins, described())


@pytest.mark.parametrize("url", ["ext::sh -c x", "-x", "--upload-pack=x", "", "a b", "fd::17"])
def test_urls_that_git_would_execute(url: str) -> None:
    with pytest.raises(ValueError, match="repository is"):
        require_url(url)


def test_worse_than_the_certificate() -> None:
    then = certificate()
    assert worse_than(then, then) == []

    def now(**more: object) -> Certificate:
        op = {"counts": {"passed": 3, "failed": 1}, "error": 1.3, "worst": 0.8, "worst_case": "",
              "bad": {"decode/y": "failed"}, **more}  # fmt: skip
        return certificate(ops={"decode": OpResult(**op)})  # type: ignore[arg-type]

    assert worse_than(now(error=1.36), then) == []
    assert "error 1.400x ideal" in worse_than(now(error=1.4), then)[0]
    assert (
        "decode/y crashed, failed in the lock"
        in worse_than(now(bad={"decode/y": "crashed"}), then)[0]
    )
    assert "no longer offered" in worse_than(now(counts={"passed": 2, "failed": 1}), then)[0]
    assert "decode: no case ran" in worse_than(certificate(ops={}), then)[0]
    assert worse_than(now(bad={}, counts={"passed": 4}), then) == []


def test_catalogue_hash_is_stable() -> None:
    assert catalogue_hash() == catalogue_hash()
    assert catalogue_hash().startswith("sha256:")


def test_write_all_keeps_modes_and_leaves_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    write_all([(link, "new"), (tmp_path / "b", "b")])
    assert file.read_text() == "new" and link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "link"]
    with pytest.raises(ValueError, match="nothing was changed"):
        write_all([(file, "newer"), (tmp_path / "no" / "c", "c")])
    assert file.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "link"]
