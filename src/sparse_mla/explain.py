"""What `sparse-mla explain` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .arch import Arch
from .dispatch import Answer, Request
from .kv_layout import LAYOUTS
from .ops.sparse_decode.config import launch_for


def print_answers(request: Request, machine: Arch, answers: list[Answer], console: Console) -> None:
    """A table of backends: which one runs, and each one's reason."""
    triton = machine.triton or "not installed"
    cache = request.layout
    if request.extra_layout:
        cache += f" + {request.extra_layout}"
    console.print(
        f"{request.op}, cache {cache}, {request.heads} heads, {request.tokens} query "
        f"tokens, topk {request.topk}, on {machine.name}, triton {triton}"
    )
    table = Table("backend", "answer", "reason")
    for answer in answers:
        word = "runs" if answer.chosen else "could run" if answer.ok else "no"
        table.add_row(answer.backend, word, answer.reason)
    console.print(table)
    chosen = [answer.backend for answer in answers if answer.chosen]
    if not chosen:
        console.print("nothing runs this call here")
    elif chosen[0] == "triton" and request.op != "kv_write":
        names = [name for name in (request.layout, request.extra_layout) if name]
        launch = launch_for(machine, request.heads, [LAYOUTS[name] for name in names])
        console.print(
            f"launch: {launch.block_h} heads x {launch.block_t} tokens a step, "
            f"{launch.value_blocks} program(s) over the 512 output dims, {launch.num_warps} warps"
        )
