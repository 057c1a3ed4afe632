"""Compile kernels for GPUs that are not here, just as the launchers start them; read the result.

A launcher is called on tensors of the CPU while triton's launch is replaced: what would have been
launched is recorded, arguments and all, and compiled for the architecture in question. So there is
nothing to keep in step with the launchers, and a kernel needs no list of its signatures.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, TensorWrapper

from sparse_mla import KVCache, arch, dispatch
from sparse_mla.arch import Arch
from sparse_mla.bench.workloads import GPU_WORKLOADS
from sparse_mla.kv_layout import LAYOUTS
from sparse_mla.ops.sparse_decode.backends import SM90_EXPANDED, SM90_LAYOUTS
from sparse_mla.ops.sparse_decode.source import Source
from usage import Usage, recorded, usage_of, write_table

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
# Other kinds of rows for the portable kernels, main and extra cache, with the heads of one of the
# launches; all of them with and without e4m3 conversion, every third elsewhere.
OFTEN = ((8, 0), (9, 0))
OTHER_LAYOUTS = (
    ("v4_fp8", "v4_fp8", 64),
    ("glm53_nope_fp8", "", 64),
    ("v41_fp8_planar", "v41_fp4_planar", 64),
    ("v4_fp8", "v4_fp8", 16),
    ("fp8_tensor", "", 64),
    ("nvfp4_bf16_rope", "v32_fp8", 16),
)
# Of an H200; the portable kernels' launches do not depend on it.
MULTIPROCESSORS = 132


# ------------------------------------------------------------------ recording launches
@dataclass(frozen=True)
class Launched:
    """A kernel and what a launcher passed to it; tensors are replaced by small ones like them."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).strip("_")

    def key(self) -> str:
        """Equal for launches that triton compiles once."""
        parts = [self.kernel.fn.__module__, self.name]
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        values |= dict(self.keywords)
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        plain = {p.name for p in self.kernel.params if p.do_not_specialize}
        for name, value in sorted(values.items()):
            if isinstance(value, (torch.Tensor, TensorWrapper)):
                value = (value.dtype, value.data_ptr() % 16 == 0)
            elif hasattr(value, "block_shape"):  # a TMA descriptor
                value = (value.base.dtype, value.block_shape)
            elif isinstance(value, int) and name not in constants and name in self.kernel.arg_names:
                kind = 0 if name in plain else 1 if value == 1 else 16 * (value % 16 == 0)
                value = (kind, value >= 2**31)
            elif isinstance(value, float):
                value = "float"
            parts.append(f"{name}={value}")
        return " ".join(parts)

    def compile(self, capability: tuple[int, int]) -> Usage:
        number = 10 * capability[0] + capability[1]
        _Offline.here.number = number
        made = self.kernel.run(*self.arguments, grid=(1,), warmup=True, **dict(self.keywords))
        return usage_of(made, number)


class _Offline:
    """Triton's driver for a GPU that is not here: only what compiling asks for."""

    here = threading.local()

    def get_current_device(self) -> int:
        return int(self.here.number)  # kernels keep their compilations by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.here.number, 32)


PARSING = threading.Lock()
PARSE = JITFunction.parse


def _parse_alone(kernel: JITFunction[Any]) -> Any:
    """Triton's parse, a thread at a time.

    Before 3.11.8 and 3.12.2 Python counts the depth of all threads' trees in one counter: garbage
    collection that lets another thread parse made it raise SystemError
    (https://github.com/python/cpython/issues/106905).
    """
    with PARSING:
        return PARSE(kernel)


@contextmanager
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that compile side by side; meanwhile triton sees only the GPU it compiles for."""
    with (
        mock.patch.object(driver, "_active", _Offline()),
        mock.patch.object(JITFunction, "parse", _parse_alone),
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        yield threads


def machine(capability: tuple[int, int]) -> Arch:
    """A GPU of that compute capability, without the GPU."""
    name = f"sm_{capability[0]}{capability[1]}"
    return Arch("cuda", name, capability, MULTIPROCESSORS, triton.__version__, False)


def _small(value: Any) -> Any:
    """A stand-in that triton compiles the same kernel for."""
    if isinstance(value, TensorWrapper):
        return TensorWrapper(_small(value.base), value.dtype)
    if not isinstance(value, torch.Tensor):
        return value
    offset = value.data_ptr() % 16 // value.element_size()
    return torch.empty(64, dtype=value.dtype)[offset:]


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launched]]:
    """Launchers believe that CPU tensors are on such a GPU; their launches are collected."""
    launched: list[Launched] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if any(int(size) < 1 for size in grid):
            raise ValueError(f"{kernel.fn.__name__} is launched on the grid {grid}")
        values = tuple((name, _small(value)) for name, value in sorted(keywords.items()))
        launched.append(Launched(kernel, tuple(map(_small, arguments)), values))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        stack.enter_context(mock.patch.object(arch, "of", lambda device: machine(capability)))
        yield launched


# ------------------------------------------------------------------ calls of the launchers
def call_decode(
    run: Callable[..., object],
    layout: str,
    b: int,
    s_q: int,
    heads: int,
    topk: int,
    options: bool,
    extra: str = "",
) -> None:
    """A backend's decode; `options`: lengths, sinks, odd topk, pages of a shared pool."""
    sources = []
    for name in (layout, extra) if extra else (layout,):
        indices = torch.empty(b, s_q, topk - options, dtype=torch.int32)
        lengths = torch.empty(b, dtype=torch.int32) if options else None
        sources.append(Source(_cache(name, 64, options), indices, lengths))
    q = torch.empty(b, s_q, heads, LAYOUTS[layout].d_qk, dtype=torch.bfloat16)
    run(q, sources, torch.empty(heads) if options else None, 0.1, 0, False)


def call_prefill(
    run: Callable[..., object], layout: str, s_q: int, heads: int, topk: int, options: bool
) -> None:
    """A backend's prefill, likewise."""
    cache = _cache(layout, 1, options)
    q = torch.empty(s_q, heads, cache.layout.d_qk, dtype=torch.bfloat16)
    indices = torch.empty(s_q, topk - options, dtype=torch.int32)
    lengths = torch.empty(s_q, dtype=torch.int32) if options else None
    sink = torch.empty(heads) if options else None
    run(q, cache, indices, lengths, sink, 0.1)


def call_write(run: Callable[..., object], layout: str) -> None:
    """The cache's writer, from bf16 tokens."""
    chosen = LAYOUTS[layout]
    scale = torch.ones(1) if chosen.tensor_scale else None
    cache = KVCache.empty(4, 64, chosen, tensor_scale=scale)
    n = 4096
    latent = torch.empty(n, chosen.latent.count, dtype=torch.bfloat16)
    rope = torch.empty(n, chosen.rope.count, dtype=torch.bfloat16) if chosen.rope else None
    run(cache, latent, rope, torch.empty(n, dtype=torch.int64), "amax")


def call_dense(
    run: Callable[..., object], layout: str, b: int, s_q: int, heads: int, options: bool
) -> None:
    """A backend's dense decode; `options`: causal, pages of a shared pool of an odd size."""
    cache = _cache(layout, 16 if options else 64, options)
    q = torch.empty(b, s_q, heads, cache.layout.d_qk, dtype=torch.bfloat16)
    table = torch.empty(b, 100, dtype=torch.int32)
    lengths = torch.empty(b, dtype=torch.int32)
    run(q, cache, table, lengths, 0.1, options, 0, False)


def _cache(layout: str, page_size: int, options: bool) -> KVCache:
    kind = LAYOUTS[layout]
    stride = (kind.page_bytes(page_size) + 2**17) // 16 * 16 if options else None
    scale = torch.ones(1) if kind.tensor_scale else None
    return KVCache.empty(
        256 // page_size, page_size, layout, page_stride=stride, tensor_scale=scale
    )


@dataclass(frozen=True)
class Build:
    """One kernel as one launcher starts it for one architecture."""

    name: str
    capability: tuple[int, int]
    launched: Launched

    def compile(self) -> Usage:
        return self.launched.compile(self.capability)


def builds() -> list[Build]:
    """Every compilation that the launchers ask for on every architecture, each once."""
    found: dict[tuple[tuple[int, int], str], Build] = {}
    names: set[str] = set()

    def collect(
        capability: tuple[int, int], label: str, call: Callable[..., None], *arguments: object
    ) -> None:
        with recording(capability) as launched:
            call(*arguments)
        for one in launched:
            key = capability, one.key()
            name = f"{machine(capability).name}-{label}-{one.name}"
            if key not in found:
                if name in names:
                    raise ValueError(f"two different builds are called {name}")
                names.add(name)
                found[key] = Build(name, capability, one)

    for capability in CAPABILITIES:
        write = _backend("kv_write", "triton")
        for layout in LAYOUTS:
            collect(capability, f"triton-write-{layout}", call_write, write, layout)
        run = _backend("decode", "triton")
        for layout in ("v32_fp8", "bf16", "bf16_nope"):
            for heads in (16, 32, 64, 128):
                # The FP8 kernel is the one that runs out of registers: all its variants.
                if layout == "v32_fp8":
                    shapes = {"plain": (128, False), "split": (1, False), "options": (128, True)}
                else:
                    shapes = {"options": (128, True)}
                for variant, (b, options) in shapes.items():
                    label = f"triton-{layout}-h{heads}-{variant}"
                    collect(capability, label, call_decode, run, layout, b, 1, heads, 2048, options)
        dense = _backend("dense_decode", "triton")
        for layout in ("bf16", "fp8_tensor"):
            for heads in (16, 64):
                label = f"triton-dense-{layout}-h{heads}"
                collect(capability, label, call_dense, dense, layout, 128, 2, heads // 2, True)
        for layout, extra, heads in OTHER_LAYOUTS[:: 1 if capability in OFTEN else 3]:
            label = f"triton-{layout}{extra and '+'}{extra}-h{heads}-options"
            shape = (layout, 128, 1, heads, 2048, True, extra)
            collect(capability, label, call_decode, run, *shape)
    if hopper_supported():
        _collect_sm90(collect)
    return list(found.values())


def hopper_supported() -> bool:
    """Whether the Hopper kernels claim to run with this triton version."""
    request = dispatch.Request("decode", "v32_fp8", 64)
    return any(a.ok for a in dispatch.explain(request, machine((9, 0))) if a.backend == "sm90")


def _collect_sm90(collect: Callable[..., None]) -> None:
    """The Hopper kernels: what is measured, and every layout and number of heads with options."""
    here = (9, 0)
    decode, prefill = _backend("decode", "sm90"), _backend("prefill", "sm90")
    dense = _backend("dense_decode", "sm90")
    for w in GPU_WORKLOADS:
        if w.op == "kv_write":
            continue
        label = f"sm90-{w.op}-{w.layout}-h{w.h_q}-b{w.b}x{w.s_q}"
        if w.op == "decode":
            extra = w.layout if w.extra_topk else ""
            if extra:
                label += f"+{w.extra_topk}" + "-lengths" * w.extra_lengths
            shape = (w.layout, w.b, w.s_q, w.h_q, w.topk, w.extra_lengths, extra)
            collect(here, label, call_decode, decode, *shape)
        elif w.op == "dense_decode":
            collect(here, label, call_dense, dense, w.layout, w.b, w.s_q, w.h_q, False)
        else:
            label += f"-topk{w.topk}"
            collect(here, label, call_prefill, prefill, w.layout, w.s_q, w.h_q, w.topk, False)
    for layout in ("bf16", "bf16_nope"):
        label = f"sm90-dense-{layout}-h64-options"
        collect(here, label, call_dense, dense, layout, 16, 2, 64, True)
    for layout in SM90_LAYOUTS:
        # bf16_nope is bf16 with less to do.
        for heads in (64,) if layout == "bf16_nope" else (5, 32, 64):
            for b in (1, 512):
                label = f"sm90-decode-{layout}-h{heads}-b{b}-options"
                collect(here, label, call_decode, decode, layout, b, 1, heads, 2048, True)
            if layout in SM90_EXPANDED:
                # More sequences than are sorted by their lengths: shared out evenly.
                for b in (1, 512, 1024):
                    label = f"sm90-decode-{layout}+{layout}-h{heads}-b{b}-options"
                    shape = (layout, b, 1, heads, 2048, True, layout)
                    collect(here, label, call_decode, decode, *shape)
            label = f"sm90-prefill-{layout}-h{heads}-options"
            collect(here, label, call_prefill, prefill, layout, 4096, heads, 2048, True)


def _backend(op: str, name: str) -> Callable[..., object]:
    (backend,) = [b for b in dispatch.backends_of(op) if b.name == name]
    return backend.load()


# ------------------------------------------------------------------ comparing
def problems(build: Build, usage: Usage) -> list[str]:
    """What is worse than it was recorded with this triton version, or impossible to launch."""
    limit = machine(build.capability).shared_memory
    found = []
    if not 0 < usage.registers <= 255:
        found.append(f"registers: {usage.registers}")
    if usage.shared > limit:
        found.append(f"{usage.shared} bytes of shared memory, {limit} exist")
    table = recorded(triton.__version__)
    if table is None:
        return found  # another compiler, other registers: nothing to compare with
    if build.name not in table:
        return [*found, "not recorded: run `make kernel-usage` and look at what changed"]
    return found + usage.worse_than(table[build.name])


def compiled(chosen: list[Build]) -> tuple[dict[str, Usage], dict[str, str]]:
    """By name: what compiles, and what does not and why."""
    usages, failed = {}, {}
    with pool() as threads:
        futures = {build.name: threads.submit(build.compile) for build in chosen}
        for name, future in futures.items():
            error = future.exception()
            if error is None:
                usages[name] = future.result()
            else:
                failed[name] = f"{type(error).__name__}: {error}"
    return usages, failed


def main() -> int:
    """Write the table of this triton version, or compare with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="compare, exit status 1 if worse")
    parser.add_argument("--only", default="", help="kernels whose name holds this; with --check")
    arguments = parser.parse_args()
    chosen = [build for build in builds() if arguments.only in build.name]
    usages, failed = compiled(chosen)
    if not arguments.check:
        print(write_table(usages).read_text())
    for build in chosen if arguments.check else []:
        found = problems(build, usages[build.name]) if build.name in usages else []
        if found:
            failed[build.name] = "; ".join(found)
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    print(f"{len(usages)} kernels compiled with triton {triton.__version__}, {len(failed)} amiss")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
