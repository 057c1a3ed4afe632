"""Compile Triton kernels for architectures that are not here, and read what ptxas says of them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from sparse_mla.arch import Arch
from sparse_mla.kv_layout import LAYOUTS, KVLayout
from sparse_mla.ops.sparse_decode import config, triton_kernel
from sparse_mla.ops.sparse_decode.config import Launch

# Every kernel is compiled as it is launched on well-aligned tensors: 16-byte pointers and strides.
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        registers: per thread.
        spilled: bytes of spill stores and loads together.
        shared: bytes of shared memory per block.
    """

    registers: int
    spilled: int
    shared: int


def machine(capability: tuple[int, int], multiprocessors: int = 100) -> Arch:
    """A GPU of that compute capability, without the GPU."""
    name = f"sm_{capability[0]}{capability[1]}"
    return Arch("cuda", name, capability, multiprocessors, triton.__version__, False)


def compile_for(
    kernel: triton.JITFunction,
    capability: tuple[int, int],
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[str],
    num_warps: int,
) -> Usage:
    """Compile `kernel` for an architecture.

    Args:
        types: Triton's type of every argument that is passed.
        constants: values of the constexpr arguments, and None for pointers that are absent.
        aligned: arguments known to be multiples of 16.
    """
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): ALIGNED for name in aligned},
    )
    number = 10 * capability[0] + capability[1]
    compiled = triton.compile(
        source, target=GPUTarget("cuda", number, 32), options={"num_warps": num_warps}
    )
    return assemble(compiled.asm["ptx"], number, compiled.metadata.shared)


def assemble(ptx: str, number: int, shared: int) -> Usage:
    """Put PTX through the ptxas that triton brings along; it prints registers and spills."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        cubin = str(source.with_suffix(".cubin"))
        done = subprocess.run(
            [get_ptxas(number).path, "-v", "--gpu-name", target[1], "-o", cubin, str(source)],
            capture_output=True,
            text=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if done.returncode or registers is None or spilled is None:
        raise RuntimeError(f"ptxas failed for {target[1]}: {done.stderr}")
    return Usage(int(registers[1]), int(spilled[1]) + int(spilled[2]), shared)


def attend_usage(
    capability: tuple[int, int], layout: KVLayout, launch: Launch, *, split: bool, options: bool
) -> Usage:
    """`attend` as `launch_attend` starts it; `options`: with lengths, sink and max_logits."""
    integers = (
        "q_stride_b q_stride_s q_stride_h indices_stride_b indices_stride_s page_stride page_size "
        "last_slot s_q heads head_blocks topk splits split_size"
    )
    types = dict.fromkeys(integers.split(), "i32")
    types |= {"q_ptr": "*bf16", "kv_ptr": "*u8", "indices_ptr": "*i32", "lse_ptr": "*fp32"}
    types |= {"out_ptr": "*fp32" if split else "*bf16", "scale_log2": "fp32"}
    aligned = ["q_ptr", "kv_ptr", "indices_ptr", "out_ptr", "lse_ptr", "page_stride", "page_size"]
    aligned += ["q_stride_b", "q_stride_s", "q_stride_h", "indices_stride_b", "indices_stride_s"]
    constants: dict[str, Any] = {"lengths_ptr": None, "sink_ptr": None, "max_ptr": None}
    if options:
        present = {"lengths_ptr": "*i32"}
        if not split:
            present |= {"sink_ptr": "*fp32", "max_ptr": "*fp32"}
        types |= present
        aligned += list(present)
        constants = {name: None for name in constants if name not in present}
    constants |= {
        "QUANTISED": layout.quantised,
        "D_ROPE": layout.rope.count if layout.rope else 0,
        "TOKEN_STRIDE": layout.row_bytes,
        "PACKED": not options,
        "HARDWARE_FP8": capability >= (8, 9),
        "SPLIT": split,
        "BLOCK_H": launch.block_h,
        "BLOCK_T": launch.block_t,
        "VALUE_BLOCKS": launch.value_blocks,
        "STAGES": launch.stages,
    }
    kernel = triton_kernel.attend
    return compile_for(kernel, capability, types, constants, aligned, launch.num_warps)


def combine_usage(capability: tuple[int, int], splits: int, *, sink: bool) -> Usage:
    """`combine` as `launch_attend` starts it for a number of splits."""
    types = {"parts_ptr": "*fp32", "parts_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    aligned = list(types)
    types |= {"rows": "i32", "heads": "i32", "splits": "i32"}
    constants: dict[str, Any] = {"MAX_SPLITS": triton.next_power_of_2(splits), "BLOCK_D": 256}
    if sink:
        types["sink_ptr"] = "*fp32"
        aligned.append("sink_ptr")
    else:
        constants["sink_ptr"] = None
    warps = 4 if splits > 8 else 1
    return compile_for(triton_kernel.combine, capability, types, constants, aligned, warps)


CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
LAUNCH_NAMES = {
    value: name for name, value in sorted(vars(config).items()) if isinstance(value, Launch)
}


@dataclass(frozen=True)
class Build:
    """One kernel, as one call compiles it for one architecture.

    Attributes:
        capability: of the architecture.
        kernel: "attend" or "combine".
        layout: the cache's layout; "" for combine.
        heads: query heads, which choose the launch.
        variant: "plain", "options" (lengths, sink, max_logits, padded pages) or "split".
    """

    capability: tuple[int, int]
    kernel: str
    layout: str
    heads: int
    variant: str

    @property
    def launch(self) -> Launch:
        quantised = LAYOUTS[self.layout].quantised
        return config.launch_for(machine(self.capability), self.heads, quantised)

    @property
    def name(self) -> str:
        architecture = machine(self.capability).name
        if self.kernel == "combine":
            return f"{architecture}-combine-{self.variant}"
        return f"{architecture}-{self.layout}-{LAUNCH_NAMES[self.launch]}-{self.variant}"

    def compile(self) -> Usage:
        if self.kernel == "combine":
            options = self.variant == "options"
            return combine_usage(self.capability, 64 if options else 2, sink=options)
        return attend_usage(
            self.capability,
            LAYOUTS[self.layout],
            self.launch,
            split=self.variant == "split",
            options=self.variant != "plain",
        )


def builds() -> list[Build]:
    """Every launch that `launch_for` can choose, on every architecture and for every layout."""
    made: dict[str, Build] = {}
    for capability in CAPABILITIES:
        for layout, heads in itertools.product(LAYOUTS, (16, 32, 64, 128)):
            # The FP8 kernel is the one that runs out of registers: all its variants.
            variants = ("plain", "options", "split") if layout == "v32_fp8" else ("options",)
            for variant in variants:
                build = Build(capability, "attend", layout, heads, variant)
                made.setdefault(build.name, build)
        for variant in ("plain", "options"):
            build = Build(capability, "combine", "", 1, variant)
            made[build.name] = build
    return list(made.values())


TABLE = Path(__file__).parent / "kernel_usage.txt"


def recorded() -> tuple[str, dict[str, Usage]]:
    """The triton version of the table in kernel_usage.txt, and its rows."""
    head, *lines = TABLE.read_text().splitlines()
    rows = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, *numbers = line.split()
            rows[name] = Usage(*(int(n) for n in numbers))
    return head.split()[-1], rows


def main() -> None:
    """Compile everything and write the table anew: python tests/offline.py"""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usages = list(pool.map(Build.compile, builds()))
    lines = [f"# Written by tests/offline.py with triton {triton.__version__}"]
    lines.append(f"# {'kernel':45}{'registers':>10}{'spilled':>9}{'shared':>9}")
    for build, usage in zip(builds(), usages, strict=True):
        numbers = f"{usage.registers:10}{usage.spilled:9}{usage.shared:9}"
        lines.append(f"{build.name:47}{numbers}")
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
