"""Every Triton kernel compiled for every architecture it claims, with no GPU: what it takes.

offline.py compiles; kernel_usage.txt is what was measured, and `python tests/offline.py` writes
it anew after a kernel or a launch has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import offline  # noqa: E402
from offline import Build, Usage  # noqa: E402
from sparse_mla.ops.sparse_decode.backends import MIN_CAPABILITY  # noqa: E402

BUILDS = offline.builds()


@pytest.fixture(scope="module")
def usages(request: pytest.FixtureRequest) -> Iterator[dict[Build, Future[Usage]]]:
    """The selected builds, compiling side by side."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [p.params["build"] for p in parameters if p and "build" in p.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {build: pool.submit(build.compile) for build in dict.fromkeys(wanted)}


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_registers_spills_and_shared_memory(
    build: Build, usages: dict[Build, Future[Usage]]
) -> None:
    usage = usages[build].result()
    limit = offline.machine(build.capability).shared_memory
    assert 0 < usage.registers <= 255
    assert usage.shared <= limit, f"{usage.shared} bytes of shared memory, {limit} exist"
    version, table = offline.recorded()
    assert build.name in table, "run `python tests/offline.py` and look at what changed"
    allowed = table[build.name].spilled
    if triton.__version__ != version:
        # Another compiler, other registers: the table is a guide, not a measurement.
        allowed = 2 * allowed + 256
    assert usage.spilled <= allowed, f"{usage.spilled} bytes are spilled, recorded are {allowed}"


def test_every_architecture_and_launch_is_there() -> None:
    assert offline.CAPABILITIES[0] == MIN_CAPABILITY
    assert {b.capability for b in BUILDS} == set(offline.CAPABILITIES)
    chosen = {b.launch for b in BUILDS if b.kernel == "attend"}
    assert chosen == set(offline.LAUNCH_NAMES), "a launch of config.py is chosen nowhere"
    assert set(offline.recorded()[1]) == {b.name for b in BUILDS}
