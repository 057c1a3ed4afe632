"""`import sparse_mla`: without triton, without what only the command needs, and fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def run(code: str, *flags: str) -> str:
    """What a fresh interpreter prints."""
    start = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
    done = subprocess.run(
        [sys.executable, *flags, "-c", start + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_where_triton_is_missing() -> None:
    """With triton unfindable: imports, says so, and answers on the CPU."""
    code = """
import importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
import torch
sys.meta_path.insert(0, Blocked())
for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.modules["triton"] = None
import sparse_mla
from sparse_mla import arch
from sparse_mla.compat import flash_mla
print(arch.triton_version(), arch.of("cpu").triton)
cache = sparse_mla.KVCache.empty(1, 4)
cache.append(torch.randn(4, 512), torch.randn(4, 64), torch.arange(4))
q = torch.randn(1, 1, 2, 576).bfloat16()
out, lse = sparse_mla.decode(q, cache, torch.zeros(1, 1, 3, dtype=torch.int32))
print(tuple(out.shape), bool(out.isfinite().all()))
try:
    sparse_mla.decode(q, cache, torch.zeros(1, 1, 3, dtype=torch.int32), backend="triton")
except NotImplementedError as error:
    print("triton is not installed" in str(error))
"""
    assert run(code).splitlines() == ["None None", "(1, 1, 2, 512) True", "True"]


def test_brings_in_nothing_that_only_the_command_needs() -> None:
    code = """
import torch
before = set(sys.modules)
import sparse_mla, sparse_mla.compat.flash_mla
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    new = set(run(code).split())
    assert "sparse_mla" in new
    heavy = {"matplotlib", "rich", "typer", "jinja2", "safetensors", "triton", "transformers"}
    assert not new & heavy
    # Anything else that is new comes with python itself.
    assert new - {"sparse_mla"} <= set(sys.stdlib_module_names)


def test_prints_and_warns_nothing() -> None:
    assert run("import sparse_mla", "-W", "error") == ""


def test_takes_less_than_300_ms_beyond_torch() -> None:
    code = """
import time, torch
start = time.perf_counter()
import sparse_mla
print(time.perf_counter() - start)
"""
    assert min(float(run(code)) for _ in range(5)) < 0.3
