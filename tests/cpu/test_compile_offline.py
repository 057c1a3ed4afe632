"""Every kernel compiled for every architecture it claims, with no GPU: what it takes.

offline.py compiles; kernel_usage/ holds what was recorded, by triton version, and `make
kernel-usage` writes it anew after a kernel or a launch has changed. This process compiles with the
installed triton, the newest where pip chose it: a kernel that the next users cannot compile is
found here. The version that the H200's rows were measured with, installed beside it by `make
test`, compiles everything for Hopper in a process of its own: what was measured stays.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from triton.runtime.jit import JITFunction  # noqa: E402

import offline  # noqa: E402
import sanitize  # noqa: E402
import sass  # noqa: E402
import usage  # noqa: E402
from offline import Build  # noqa: E402
from sparse_mla.ops.sparse_decode.backends import MIN_CAPABILITY  # noqa: E402
from usage import Usage  # noqa: E402

BUILDS = offline.builds()
MEASURED = Path(sys.prefix) / "triton-3.6.0"


@pytest.fixture(scope="module")
def usages(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Usage]]]:
    """The selected builds, compiling side by side."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    named = [p.params.get("build") for p in parameters if p]
    wanted = [build for build in named if isinstance(build, Build)]
    with offline.pool() as threads:
        yield {build.name: threads.submit(build.compile) for build in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_takes_no_more_than_recorded(build: Build, usages: dict[str, Future[Usage]]) -> None:
    assert not offline.problems(build, usages[build.name].result())


@pytest.mark.slow
def test_hopper_kernels_with_the_triton_they_were_measured_with() -> None:
    if not (MEASURED / "triton").is_dir():
        pytest.skip(f"{MEASURED} does not exist; `make test` installs it")
    assert usage.recorded(MEASURED.name.removeprefix("triton-")) is not None
    command = [sys.executable, offline.__file__, "--check", "--only", "sm_90"]
    environment = {**os.environ, "PYTHONPATH": str(MEASURED)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"(\d+) kernels compiled with triton 3.6.0, 0 amiss", done.stdout)
    assert said and int(said[1]) > 20


def test_every_architecture_is_there_and_the_table_is_complete() -> None:
    assert offline.CAPABILITIES[0] == MIN_CAPABILITY
    assert {b.capability for b in BUILDS} == set(offline.CAPABILITIES)
    table = usage.recorded(triton.__version__)
    if table is not None:
        assert set(table) == {b.name for b in BUILDS}, "run `make kernel-usage`"


@pytest.mark.skipif(not offline.hopper_supported(), reason="not with this version of triton")
def test_both_ops_of_the_hopper_backend_are_compiled() -> None:
    names = [b.name for b in BUILDS if b.name.startswith("sm_90-sm90-")]
    for part in ("decode-v32_fp8-h8", "decode-v32_fp8-h64", "prefill-bf16-h64", "-options"):
        assert any(part in name for name in names), part


class _Pausing:
    """Garbage in a cycle: collected at any allocation, and another thread runs then."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        time.sleep(0)


def test_kernels_are_parsed_side_by_side() -> None:
    kernels = list({id(b.launched.kernel): b.launched.kernel for b in BUILDS}.values())[:8]

    def parse(kernel: JITFunction[Any]) -> str:
        _Pausing()
        return str(kernel.parse().body[0].name)

    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        with offline.pool() as threads:
            named = list(threads.map(parse, kernels * 20))
    finally:
        gc.set_threshold(*before)
    assert named == [kernel.fn.__name__ for kernel in kernels] * 20


USAGE = Usage(168, 12, 8, 230_000, 24, 3, 5, ("C7510",), ("232:12/8", "40:0/0"))


def test_a_row_of_the_table_is_read_back() -> None:
    assert Usage.from_row(USAGE.row().split()) == USAGE
    plain = Usage(255, 0, 0, 0, 0, 0, 0, (), ())
    assert Usage.from_row(plain.row().split()) == plain


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({}, ""),
        ({"registers": 160, "spilled": 0, "scoreboards": 4, "warnings": ()}, ""),
        ({"registers": 169}, "registers: 169"),
        ({"spilled": 16}, "spilled: 16"),
        ({"looped": 12}, "looped: 12"),
        ({"shared": 230_001}, "shared"),
        ({"warnings": ("C7510", "C7512")}, "ptxas warns: C7512"),
        ({"scoreboards": 2}, "scoreboards of loads: 2"),
        ({"partitions": ("232:4/4", "40:8/8")}, "partition of 40 registers spills 8"),
    ),
)
def test_what_is_worse_is_named(changes: dict[str, object], said: str) -> None:
    found = Usage(**{**USAGE.__dict__, **changes}).worse_than(USAGE)
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_lines_that_the_sanitizer_may_name_exist() -> None:
    for file, explained in sanitize.HANDED_OVER.items():
        lines = {line.strip() for line in (sanitize.SOURCE / file).read_text().splitlines()}
        assert set(explained) <= lines, file


SUMS = """
    bra.uni $L_sums;
$L_worker:
    ld.shared.b32 %r9, [global_smem+8];
    barrier.sync 1;
    bra.uni $L_worker;
$L_sums:
    bar.sync 0, 128;
    @%p1 ld.shared.b32 %r1, [global_smem+64];
    @%p2 bra $L_sums;
    bra.uni $L_start;
$L_start:
    st.shared.v2.b32 [global_smem+96], {0, 16843009};
    st.shared.v2.b32 [global_smem+64], {%r1, %r2};
    barrier.sync 1;
"""


def test_sums_that_captures_replace_are_found() -> None:
    assert usage.unordered_captures(SUMS)
    met = SUMS.replace("$L_start:", "$L_start:\n    bar.sync 0, 128;")
    assert not usage.unordered_captures(met)
    plain = SUMS.partition("$L_start:")[0]
    assert not usage.unordered_captures(plain), "no partitions"
    with pytest.raises(ValueError, match="starts none"):
        usage.unordered_captures(plain + "setmaxnreg.dec.sync.aligned.u32 120;")


MADE = """
    %full = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared1, #smem, mutable>
    %free = ttg.local_alloc : () -> !ttg.memdesc<1xi64, #shared1, #smem, mutable>
    %0 = ttg.memdesc_index %full[%c1_i32] : !ttg.memdesc<2x1xi64, #shared1, #smem, mutable>
    ttng.init_barrier %0, 2 : !ttg.memdesc<1xi64, #shared1, #smem, mutable>
    ttng.init_barrier %free, 1 : !ttg.memdesc<1xi64, #shared1, #smem, mutable>
    ttg.warp_specialize(%heads, %full, %free) attributes {requestedRegisters = array<i32: 168>}
"""


def test_barriers_that_no_partition_uses_are_found() -> None:
    assert usage.unused_barriers(MADE) == []
    assert usage.unused_barriers(MADE.replace(", %free)", ")")) == ["%free"]
    assert usage.unused_barriers(MADE.replace(" %full, ", " ")) == ["%full"]
    assert usage.unused_barriers(MADE.partition("ttg.warp_specialize")[0]) == []
    for name in ("ttg.warp_specialize", "ttng.init_barrier"):
        with pytest.raises(ValueError, match="not found"):
            usage.unused_barriers(MADE.replace(name, "renamed." + name.partition(".")[2] + "_2"))


def _listing(*lines: str) -> str:
    """Lines as nvdisasm prints them; "label:" or "[scoreboard] instruction"."""
    text = []
    for number, line in enumerate(lines):
        if line.endswith(":"):
            text.append(line)
            continue
        board, instruction = line.split(None, 1)
        control = int(board) << 46
        text.append(f"        /*{16 * number:04x}*/    {instruction} ;   /* 0x{7:016x} */")
        text.append(f"                    /* 0x{control:016x} */")
    return "\n".join(text)


def test_spills_and_loads_of_a_warp_specialised_listing() -> None:
    code = sass.parse(
        _listing(
            "7 STL [R1], R0",  # outside of any partition
            "7 @P0 BRA `(.L_x_3)",
            "7 USETMAXREG.DEALLOC.CTAPOOL 0x28",
            ".L_x_1:",
            "2 LDG.E R2, desc[UR4][R2.64]",
            "2 LDS R3, [R4]",
            "3 LDG.E R5, desc[UR4][R6.64]",
            "7 BSSY B0, `(.L_x_2)",
            "7 @P1 BSYNC B0",
            "7 LDL.64 R8, [R1+0x8]",  # in a loop, in a divergent part of it
            "7 BSYNC B0",
            ".L_x_2:",
            "7 @P2 BRA `(.L_x_1)",
            "1 LDG.E R9, desc[UR4][R6.64]",  # after the loop
            "7 STL.128 [R1], R4",
            "7 EXIT",
            ".L_x_3:",
            "7 USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
            "7 STL.U16 [R1], R4",
            "7 EXIT",
        )
    )
    facts = sass.facts(code)
    assert facts.spilled == {0xE8: 2, 0x28: 24, 0: 4}
    assert facts.looped == {0xE8: 0, 0x28: 8, 0: 0}
    assert facts.loads == sass.Loads(number=2, scoreboards=2, mixed=1)
