"""compute-sanitizer's memcheck and racecheck over one small case of each kernel.

    python tests/sanitize.py                    every case, both tools (`make sanitize`)
    python tests/sanitize.py --run CASE         the case itself, as the sanitizer starts it

Racecheck orders accesses by barriers and by what each thread arrives on itself. Gluon arrives on an
mbarrier with one thread, after a barrier of its warps, and that chain it does not follow: it
reports plain loads and stores of shared memory that are handed over in this way. The ones below
were read one by one; any other line that it names is a failure.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import sparse_mla
from sparse_mla import KVCache

SOURCE = Path(sparse_mla.__file__).parent
TOOLS = ("memcheck", "racecheck")
TIME_LIMIT = 180

# By file: lines whose accesses are ordered by an mbarrier on which one thread arrives.
HANDED_OVER = {
    "ops/sm90_pairs_kernel.py": (
        "shared.sums.index(2 * HALF).store(exact)",
        "shared.sums.index(2 * HALF + 1).store(rounded)",
        "rounded = rounded + shared.sums.index(3 - 2 * HALF).load(LOGIT_ROWS)",
        "exact = exact + shared.sums.index(2 - 2 * HALF).load(LOGIT_ROWS)",
    ),
    "ops/sparse_prefill/sm90_kernel.py": (
        "even_base = shared.base.index(0).load(LOGIT_ROWS)",
        "shared.base.index(HALF).store(new_base)",
        "base = shared.base.index(1).load(LOGIT_ROWS)",
    ),
    "ops/dense_decode/sm90_kernel.py": (
        "even_base = shared.base.index(0).load(LOGIT_ROWS)",
        "shared.base.index(HALF).store(new_base)",
        "base = shared.base.index(1).load(LOGIT_ROWS)",
        "bias = shared.bias.index(TILE_OF_PAIR).load(LOGIT_COLUMNS)",
    ),
    # The loader waits for a tile's place before it fills it, and arrives when the bias is there.
    "ops/dense_decode/sm90_load_kernel.py": (
        "shared.bias.index(stage).store(gl.where(ok, 0.0, -INF))",
    ),
    # `q_met` and `sums_full`; `p_full` and the other way a tile's `free`; of the tables and the
    # RoPE part, in whose place P is, `full` and `free`.
    "ops/sparse_decode/sm90_bounded_scales_kernel.py": (
        "shared.sums.index(HALF).store(top)",
        "power = query_power(gl.maximum(top, shared.sums.index(1 - HALF).load(QUERY_ROW)))",
        "shared.sums.index(HALF).store(total)",
        "total = total + shared.sums.index(1 - HALF).load(S_ROW)",
        "shared.base.index(HALF).store(base)",
        "even_base = shared.base.index(0).load(S_ROW)",
        "base = shared.base.index(1).load(S_ROW)",
        "reinterpret(target, gl.float16, [4096], VECTOR).store(parts.reshape([4096]))",
        "parts = reinterpret(source, gl.float16, [4096], VECTOR).load(P_VECTORS)",
        "values = reinterpret(table, table.dtype, [8, 64], VECTOR).index(ROW).load(BY_THREAD)",
    ),
    "ops/sparse_decode/sm90_bounded_scales_fill_kernel.py": (
        "async_load(target, at, mask=is_there(rows)[:, None])",
        "target.store(values.reshape([4, 4, 2, 4]).permute((3, 1, 0, 2)))",
        "target.store(weights.reshape([4, 4, 2, 4]).permute((3, 1, 0, 2)))",
    ),
    # A tile's bias is stored once both halves of the tile before in its place are free, which its
    # reader says after its logits; maxima and weights go back and forth by `p_full`.
    "ops/sparse_decode/sm90_expand_fill_kernel.py": (
        "bias.store(gl.where(is_there(rows), 0.0, -INF))",
        "async_load(target, at, mask=mask)",
    ),
    "ops/sparse_decode/sm90_expand_pairs_kernel.py": (
        "bias = shared.bias.index(TILE_OF_PAIR).load(gl.SliceLayout(0, LOGITS))",
        "shared.base.index(HALF).store(base)",
        "base = shared.base.index(1).load(LOGIT_ROWS)",
        "even_base = shared.base.index(0).load(LOGIT_ROWS)",
    ),
    "ops/sparse_decode/sm90_expand_few_heads_kernel.py": (
        "bias = shared.bias.index(TILE_OF_PAIR).load(gl.SliceLayout(1, layout))",
        "shared.base.index(HALF).store(base)",
        "even_base = shared.base.index(0).load(by_head)",
        "base = shared.base.index(1).load(by_head)",
        "shared.sums.index(HALF).store(gl.sum(exact, 0))",
        "total = shared.sums.index(0).load(by_head) + shared.sums.index(1).load(by_head)",
    ),
    "ops/sparse_decode/sm90_many_heads_kernel.py": (
        "exchange.slice(HALF * 64, 64).store(top)",
        "return gl.maximum(top, exchange.slice(64 - HALF * 64, 64).load(row))",
        "target.store(parts.reshape([4096]))",
        "parts = half.load(P_VECTORS).reshape([2, 2, 4, 8, 4, 2, 2])"
        ".permute((2, 1, 3, 0, 5, 4, 6))",
        "vectors.index(BASE).store(base)",
        "base = vectors.index(BASE).load(S_ROW)",
        "exchange.slice(0, 64).store(inverse)",
        "inverse = exchange.slice(0, 64).load(S_ROW)",
    ),
    # The output goes through a place of K, which is free for the next item then.
    "ops/sparse_prefill/sm90_few_heads_kernel.py": (
        "staging.load(rows_layout),",
        "bias = shared.bias.load(gl.SliceLayout(1, layout))",
        "shared.bias.store(gl.where(ok, 0.0, -INF))",
    ),
}
# Triton's own exchange of what a warp-specialised kernel does next, told as the kernel's first or
# last line.
EDGES = ("@gluon.jit(", "def ", "gl.store(", "gl.warp_specialize(")


def _cache(layout: str) -> KVCache:
    cache = KVCache.empty(8, 64, layout, device="cuda")
    slots = torch.arange(cache.num_slots, device="cuda")
    rope = torch.randn(len(slots), 64, device="cuda") if cache.layout.rope else None
    cache.append(torch.randn(len(slots), cache.layout.latent.count, device="cuda"), rope, slots)
    return cache


def _write(layout: str) -> None:
    _cache(layout)


def _decode(backend: str, heads: int, layout: str = "v32_fp8", extra: str = "") -> None:
    cache = _cache(layout)
    q = torch.randn(2, 2, heads, cache.layout.d_qk, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(-1, cache.num_slots, (2, 2, 300), device="cuda", dtype=torch.int32)
    options = {"extra_cache": _cache(extra), "extra_indices": indices} if extra else {}
    for splits in (1, 3):
        sparse_mla.decode(
            q, cache, indices, backend=backend, num_splits=splits, batch_invariant=True, **options
        )


def _decode_lengths(sequences: int) -> None:
    """Lists of many lengths over a V4 cache, which the kernel's programs share out."""
    cache = _cache("v4_fp8")
    q = torch.randn(sequences, 1, 16, 512, device="cuda", dtype=torch.bfloat16)
    shape = (sequences, 1, 200)
    indices = torch.randint(-1, cache.num_slots, shape, device="cuda", dtype=torch.int32)
    lengths = torch.randint(0, 201, (sequences,), device="cuda", dtype=torch.int32)
    sparse_mla.decode(q, cache, indices, topk_length=lengths, backend="sm90")


def _prefill(backend: str, heads: int) -> None:
    rows = torch.randn(512, 1, 576, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(5, heads, 576, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(-1, 512, (5, 300), device="cuda", dtype=torch.int32)
    sparse_mla.prefill(q, rows, indices, scale=0.04, backend=backend)


def _dense(backend: str, heads: int, page_size: int) -> None:
    cache = _cache("bf16")
    if page_size != 64:
        cache = KVCache.from_tensor(cache.rows_view().view(-1, page_size, 1, 1152), "bf16")
    table = torch.randperm(cache.num_pages, device="cuda").to(torch.int32).view(2, -1)
    lengths = torch.tensor([200, 131], device="cuda", dtype=torch.int32)
    q = torch.randn(2, 2, heads, 576, device="cuda", dtype=torch.bfloat16)
    for splits in (None, 3):
        sparse_mla.dense_decode(
            q, cache, table, lengths, causal=True, backend=backend, num_splits=splits
        )


CASES: dict[str, Callable[[], None]] = {
    "decode-sm90-16": lambda: _decode("sm90", 16),
    "decode-sm90-64": lambda: _decode("sm90", 64),
    "decode-sm90-bf16-64": lambda: _decode("sm90", 64, "bf16"),
    "decode-sm90-v4_fp8-16": lambda: _decode("sm90", 16, "v4_fp8", "v4_fp8"),
    "decode-sm90-v4_fp8-64": lambda: _decode("sm90", 64, "v4_fp8", "v4_fp8"),
    # On 132 multiprocessors: shared out evenly, and sorted.
    "decode-sm90-v4_fp8-140-lengths": lambda: _decode_lengths(140),
    "decode-sm90-v4_fp8-264-lengths": lambda: _decode_lengths(264),
    "decode-triton-16": lambda: _decode("triton", 16),
    "decode-triton-bf16-64": lambda: _decode("triton", 64, "bf16"),
    "decode-triton-v4_fp8-64": lambda: _decode("triton", 64, "v4_fp8", "v4_fp8"),
    "dense-sm90-64": lambda: _dense("sm90", 64, 64),
    "dense-sm90-pages-of-16": lambda: _dense("sm90", 16, 16),
    "dense-triton-16": lambda: _dense("triton", 16, 64),
    "write-v32_fp8": lambda: _write("v32_fp8"),
    "write-v4_fp8": lambda: _write("v4_fp8"),
    "write-glm53_nope_nvfp4": lambda: _write("glm53_nope_nvfp4"),
    "prefill-sm90-16": lambda: _prefill("sm90", 16),
    "prefill-sm90-64": lambda: _prefill("sm90", 64),
}


def source_lines(name: str, line: int) -> Iterator[tuple[str, str]]:
    """(file below the package, text) that `name`:`line` of a report may stand for."""
    for path in SOURCE.rglob(Path(name).name):
        lines = path.read_text().splitlines()
        if str(path).endswith(name) and line <= len(lines):
            yield str(path.relative_to(SOURCE)), lines[line - 1].strip()


def unexplained(report: str) -> list[str]:
    """The accesses of racecheck's hazards that HANDED_OVER and EDGES do not hold."""
    others = []
    for name, line in sorted(set(re.findall(r"access at \S+ in (\S+?\.py):(\d+)", report))):
        known = [
            text in HANDED_OVER.get(file, ()) or text.startswith(EDGES)
            for file, text in source_lines(name, int(line))
        ]
        if not any(known):
            others.append(f"{name}:{line}")
    return others


def sanitize(tool: str, case: str) -> tuple[bool, str]:
    """Whether the tool is content with the case, and its report."""
    command = ["compute-sanitizer", "--tool", tool, sys.executable, __file__, "--run", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except FileNotFoundError:
        sys.exit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    except subprocess.TimeoutExpired:
        return False, f"no answer in {TIME_LIMIT} s"
    report = done.stdout + done.stderr
    if done.returncode or "SUMMARY" not in report:
        return False, report
    if tool == "memcheck":
        return "ERROR SUMMARY: 0 errors" in report, report
    others = unexplained(report)
    named = len(re.findall("Race reported", report))
    return not others, f"{named} hazards, not explained: {', '.join(others) or 'none'}\n{report}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=CASES)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if options.run:
        CASES[options.run]()
        torch.cuda.synchronize()
        return 0
    jobs = [(tool, case) for tool in TOOLS for case in CASES if options.only in case]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda job: sanitize(*job), jobs))
    for (tool, case), (ok, report) in zip(jobs, results, strict=True):
        first = report.splitlines()[0] if ok and tool == "racecheck" else ""
        print(f"{tool:10} {case:30} {'ok' if ok else 'FAILED'}  {first}")
        if not ok:
            print(report)
    return 0 if all(ok for ok, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
