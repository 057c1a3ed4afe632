"""What a cubin's SASS says about spills and loads, by partition and in loops.

A warp-specialised kernel sets the registers of each partition with USETMAXREG; the code that is
reached from one such instruction without passing another belongs to that number of registers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

from triton import knobs

NO_SCOREBOARD = 7
_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"\.L_\w+")
# What never goes on to the next instruction, unless a predicate guards it.
_LEAVES = re.compile(r"^(BRA `|BRX|JMP|JMX|EXIT|RET|BSYNC|KILL)")
_WIDTH = {"8": 1, "16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: opcode and operands, without the predicate.
        guarded: it has a predicate.
        targets: numbers of the instructions that it may jump to.
        scoreboard: which one its result sets when it arrives, or NO_SCOREBOARD.
    """

    text: str
    guarded: bool
    targets: tuple[int, ...]
    scoreboard: int

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def spilled(self) -> int:
        """Bytes that a thread's spill store or load moves; 0 for anything else."""
        name, *parts = self.opcode.split(".")
        if name not in ("STL", "LDL"):
            return 0
        return next((_WIDTH[p.lstrip("US")] for p in parts if p.lstrip("US") in _WIDTH), 4)


@dataclass(frozen=True)
class Loads:
    """Loads from global memory into registers, in loops.

    Attributes:
        number: how many there are.
        scoreboards: how many of the six scoreboards they use: loads that share one are all waited
            for when one of them is.
        mixed: other instructions in loops that set one of those scoreboards.
    """

    number: int = 0
    scoreboards: int = 0
    mixed: int = 0


@dataclass(frozen=True)
class Facts:
    """What the machine code says.

    Attributes:
        spilled: bytes of spill stores and loads, by registers per thread of the partition; the
            key 0 stands for code outside of any.
        looped: the same, in loops only.
        loads: see there.
    """

    spilled: dict[int, int]
    looped: dict[int, int]
    loads: Loads


def disassemble(cubin: bytes) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """The instructions of what `nvdisasm -c -hex` prints."""
    raw: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, match, high = _LABEL.match(line), _LINE.search(line), _HIGH.match(line)
        if label:
            labels[label[1]] = len(raw)
        elif match:
            raw.append((match[2], 0))
        elif high and raw:
            raw[-1] = (raw[-1][0], int(high[1], 16))
    made = []
    regions: dict[str, int] = {}
    for full, control in raw:
        guarded = full.startswith("@")
        body = full.split(None, 1)[1] if guarded else full
        targets = [labels[name] for name in _TARGET.findall(body) if name in labels]
        # BSSY names where threads meet again, BSYNC waits there for the others and goes on.
        barrier = re.match(r"(BSSY|BSYNC)\S*\s+(B\d+)", body)
        if barrier and barrier[1] == "BSSY" and targets:
            regions[barrier[2]] = targets[0]
        elif barrier and barrier[2] in regions:
            targets.append(regions[barrier[2]])
        made.append(Instruction(body, guarded, tuple(targets), control >> 46 & 7))
    return made


def facts(code: list[Instruction]) -> Facts:
    """Sort spills and loads into partitions and loops."""
    edges = _edges(code)
    partition = _partitions(code, edges)
    looped = _in_loops(edges)
    values = sorted(set(partition), reverse=True)
    spilled, in_loops = dict.fromkeys(values, 0), dict.fromkeys(values, 0)
    for number, instruction in enumerate(code):
        spilled[partition[number]] += instruction.spilled
        in_loops[partition[number]] += instruction.spilled * looped[number]
    return Facts(spilled, in_loops, _loads(c for n, c in enumerate(code) if looped[n]))


def _loads(code: Iterable[Instruction]) -> Loads:
    setters = [c for c in code if c.scoreboard != NO_SCOREBOARD]
    gathers = [c.opcode.split(".")[0] == "LDG" for c in setters]
    used = {c.scoreboard for c, gather in zip(setters, gathers, strict=True) if gather}
    mixed = sum(
        c.scoreboard in used for c, gather in zip(setters, gathers, strict=True) if not gather
    )
    return Loads(sum(gathers), len(used), mixed)


def _registers(instruction: Instruction) -> int | None:
    if not instruction.opcode.startswith("USETMAXREG"):
        return None
    return int(instruction.text.split()[-1], 16)


def _edges(code: list[Instruction]) -> list[list[int]]:
    """Where each instruction may go; nowhere from one that changes the number of registers."""
    edges = []
    for number, instruction in enumerate(code):
        following = list(instruction.targets)
        leaves = _LEAVES.match(instruction.text) and not instruction.guarded
        if not leaves and number + 1 < len(code):
            following.append(number + 1)
        edges.append([] if _registers(instruction) is not None else following)
    return edges


def _partitions(code: list[Instruction], edges: list[list[int]]) -> list[int]:
    """Registers per thread that each instruction runs with, 0 where nothing sets them."""
    found: list[int | None] = [None] * len(code)
    starts = [(0, 0)]
    for number, instruction in enumerate(code):
        registers = _registers(instruction)
        if registers is not None and number + 1 < len(code):
            starts.append((number + 1, registers))
    for start, registers in starts:
        pending = [start]
        while pending:
            number = pending.pop()
            if found[number] is None:
                found[number] = registers
                pending += edges[number]
    return [0 if value is None else value for value in found]


def _in_loops(edges: list[list[int]]) -> list[bool]:
    """Which nodes lie on a cycle: strongly connected components by Tarjan, without recursion."""
    count = len(edges)
    order, low = [-1] * count, [0] * count
    on_stack, looped = [False] * count, [False] * count
    stack: list[int] = []
    time = 0
    for root in range(count):
        if order[root] >= 0:
            continue
        work = [(root, 0)]
        while work:
            node, place = work.pop()
            if place == 0:
                order[node] = low[node] = time
                time += 1
                stack.append(node)
                on_stack[node] = True
            for number in range(place, len(edges[node])):
                follower = edges[node][number]
                if order[follower] < 0:
                    work += [(node, number + 1), (follower, 0)]
                    break
                if on_stack[follower]:
                    low[node] = min(low[node], order[follower])
            else:
                if low[node] == order[node]:
                    members = []
                    while True:
                        member = stack.pop()
                        on_stack[member] = False
                        members.append(member)
                        if member == node:
                            break
                    cycle = len(members) > 1 or node in edges[node]
                    for member in members:
                        looped[member] = cycle
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
    return looped
