"""What a compiled kernel takes, and the tables of what was recorded, by triton version."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

import sass

FOLDER = Path(__file__).parent / "kernel_usage"


def table_of(version: str) -> Path:
    """The recorded table of a triton version: patch releases share one."""
    return FOLDER / f"triton-{'.'.join(version.split('.')[:2])}.txt"


def recorded(version: str) -> dict[str, Usage] | None:
    """What was recorded with that version, if anything was."""
    path = table_of(version)
    if not path.exists():
        return None
    rows = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            name, *words = line.split()
            rows[name] = Usage.from_row(words)
    return rows


def write_table(usages: dict[str, Usage]) -> Path:
    width = max(map(len, usages)) + 1
    head = "".join(f"{name:>12}" for name in Usage.FIELDS)
    lines = [f"# Written by tests/offline.py with triton {triton.__version__}"]
    lines.append(f"# {'kernel':{width - 2}}{head}  warnings  partitions")
    lines += [f"{name:{width}}{usage.row()}" for name, usage in usages.items()]
    path = table_of(triton.__version__)
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        registers: per thread, as ptxas says; warp-specialised kernels then move them about.
        spilled: bytes of spill stores and loads together.
        shared: bytes of shared memory per block.
        warnings: ptxas' advice by number, as C7510: products that wait for each other, registers
            that cannot be set, and the like.

    And from Hopper's machine code, 0 and nothing for other architectures:
        looped: bytes of spills in loops.
        loads, scoreboards, mixed: see `sass.Loads`.
        partitions: "registers:spilled/looped" of each partition of a warp-specialised kernel.
    """

    registers: int
    spilled: int
    looped: int
    shared: int
    loads: int
    scoreboards: int
    mixed: int
    warnings: tuple[str, ...]
    partitions: tuple[str, ...]

    FIELDS = ("registers", "spilled", "looped", "shared", "loads", "scoreboards", "mixed")

    def row(self) -> str:
        numbers = "".join(f"{getattr(self, name):12}" for name in self.FIELDS)
        lists = (",".join(values) or "-" for values in (self.warnings, self.partitions))
        return numbers + "  " + "  ".join(lists)

    @classmethod
    def from_row(cls, words: list[str]) -> Usage:
        count = len(cls.FIELDS)
        lists = [() if word == "-" else tuple(word.split(",")) for word in words[count:]]
        return cls(*(int(word) for word in words[:count]), *lists)

    def worse_than(self, recorded: Usage) -> list[str]:
        """What this compilation takes more of, or does worse, than the recorded one."""
        found = [
            f"{name}: {getattr(self, name)}, recorded {getattr(recorded, name)}"
            for name in ("registers", "spilled", "looped", "shared")
            if getattr(self, name) > getattr(recorded, name)
        ]
        new = sorted(set(self.warnings) - set(recorded.warnings))
        if new:
            found.append(f"ptxas warns: {', '.join(new)}")
        if self.loads <= recorded.loads and self.scoreboards < recorded.scoreboards:
            found.append(f"scoreboards of loads: {self.scoreboards}, were {recorded.scoreboards}")
        if self.partitions != recorded.partitions:
            mine, other = _per_partition(self), _per_partition(recorded)
            found += [
                f"partition of {registers} registers spills {spills}, recorded {other[registers]}"
                for registers, spills in mine.items()
                if registers in other and spills > other[registers]
            ]
        return found


def _per_partition(usage: Usage) -> dict[str, int]:
    pairs = (partition.split(":") for partition in usage.partitions)
    return {registers: int(spills.split("/")[0]) for registers, spills in pairs}


_BARRIER = re.compile(r"bar(rier)?(\.cta)?\.(sync|red)\b")
_LABEL = re.compile(r"(\$\w+):")
_BRANCH = re.compile(r"bra(\.uni)?\s+(\$\w+)")


def unordered_captures(ptx: str) -> bool:
    """Whether a warp-specialised kernel may read shared memory and then, with no barrier between,
    start its partitions: Triton stores what they are passed where a reduction had its sums, and
    does not have the warps meet before.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    lines = [line for line in lines if line and not line.startswith((".", "//"))]
    starts = [n for n, line in enumerate(lines) if _starts_partitions(line)]
    if not starts and any("setmaxnreg" in line for line in lines):
        raise ValueError("the PTX moves registers between partitions, but starts none")
    # Back along every path, up to the barriers.
    before = _predecessors(lines)
    seen, found = set(starts), list(starts)
    while found:
        for n in before[found.pop()]:
            if n in seen or _BARRIER.search(lines[n]):
                continue
            if "ld.shared" in lines[n] or "ldmatrix" in lines[n]:
                return True
            seen.add(n)
            found.append(n)
    return False


_VALUE = r"(%[\w#]+)"


def unused_barriers(ttgir: str) -> list[str]:
    """Barriers in shared memory that are initialised and that no partition is passed: their memory
    is free again, and Triton stores what the partitions are passed there, unordered with it.
    """
    start = re.search(r"ttg\.warp_specialize\(([^)]*)\)", ttgir)
    if start is None and "warp_specialize" not in ttgir:
        return []
    made = re.findall(rf"ttng\.init_barrier {_VALUE},", ttgir)
    if start is None or not made:
        raise ValueError("partitions start, but their barriers or arguments are not found")
    passed = {name.strip() for name in start[1].split(",")}
    views = re.findall(rf"{_VALUE} = ttg\.memdesc_\w+ {_VALUE}", ttgir[: start.start()])
    whole = dict(views)
    unused = []
    for name in made:
        root = name
        while root in whole:
            root = whole[root]
        if root not in passed and root not in unused:
            unused.append(root)
    return unused


def _starts_partitions(line: str) -> bool:
    """Whether a line is where the other warps are told which partition they run: partition k as
    bytes k, the first of them 0.
    """
    return bool(re.match(r"st\.shared\.\w+(\.\w+)?\s.*\{?\b(0, )?16843009\b", line))


def _predecessors(lines: list[str]) -> list[list[int]]:
    """The lines that each line may be reached from."""
    labels = {match[1]: n for n, line in enumerate(lines) if (match := _LABEL.match(line))}
    before: list[list[int]] = [[] for _ in lines]
    for n, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and branch[2] in labels:
            before[labels[branch[2]]].append(n)
        leaves = not line.startswith("@") and (branch or line.startswith(("ret", "brx.idx")))
        if not leaves and n + 1 < len(lines):
            before[n + 1].append(n)
    return before


def usage_of(compiled: Any, number: int) -> Usage:
    """Read the machine code, and what ptxas says when it makes it once more from the same PTX."""
    ptx = compiled.asm["ptx"]
    if unordered_captures(ptx):
        raise RuntimeError("no barrier between a load from shared memory and the partitions' start")
    unused = unused_barriers(compiled.asm["ttgir"])
    if unused:
        raise RuntimeError(f"barriers are initialised that no partition uses: {', '.join(unused)}")
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("the PTX names no target")
    # As triton calls it: since 3.7 with this level, around a fault of ptxas 13.
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    options = ["--regAllocOptLevel=2"] if version >= (3, 7) else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(number).path, "-v", *options, "--gpu-name", target[1]]
        command += ["-o", str(source.with_suffix(".cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if done.returncode or registers is None or spilled is None:
        raise RuntimeError(f"ptxas failed for {target[1]}: {done.stderr}")
    total = int(spilled[1]) + int(spilled[2])
    facts = sass.Facts({}, {}, sass.Loads())
    if number == 90:
        facts = sass.facts(sass.disassemble(compiled.asm["cubin"]))
    if number == 90 and sum(facts.spilled.values()) != total:
        raise RuntimeError(f"ptxas says it spills {total} bytes, triton's output has {facts}")
    return Usage(
        int(registers[1]),
        total,
        sum(facts.looped.values()),
        compiled.metadata.shared,
        facts.loads.number,
        facts.loads.scoreboards,
        facts.loads.mixed,
        tuple(sorted(set(re.findall(r"\b(C7\d{3})\b", done.stderr)))),
        tuple(
            f"{value}:{facts.spilled[value]}/{facts.looped[value]}"
            for value in facts.spilled
            if value
        ),
    )
