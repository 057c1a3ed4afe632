"""The provider's process: load one provider, answer calls until the pipe closes.

It runs in whatever interpreter the provider lives in, which need not have this library: the tool
loads these few modules from its own files (`BOOT` in host.py), under another package name, so that
even another version of this library can be the provider. Needed there: Python 3.10 and torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from typing import Any

import torch

from ..accuracy.case import Inputs, NotOffered, Output, WriteInputs
from ..accuracy.gate import changed_input, context_lost, fingerprint
from . import wire

_PR_SET_PDEATHSIG = 1
LAZY_BYTES = 64 * 2**20

# The provider's torch may be older than the one this library asks for.
_OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def main(buffer_path: str) -> None:
    """Serve requests from standard input; replies leave through what was standard output."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    # What a provider prints must not end up between the replies.
    os.dup2(2, 1)
    _die_with_parent()
    buffer = wire.map_buffer(buffer_path)
    os.unlink(buffer_path)
    server = Server(buffer)
    wire.write_frame(replies, {"ok": True})
    while (request := wire.read_frame(requests)) is not None:
        reply, last = server.answer(request)
        wire.write_frame(replies, reply)
        if last:
            os._exit(0)
    os._exit(0)


def _die_with_parent() -> None:
    """A hanging kernel does not outlive the tool (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return


class Server:
    """One provider, the storages of its current calls, and the states of its callers."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.device = torch.device("cpu")
        self.provider: Any = None
        self.storages: dict[int, torch.Tensor] = {}
        self.states: dict[int, Any] = {}
        self.sampler: Any = None

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The reply, and whether this process is of no further use."""
        try:
            with torch.no_grad():
                reply = getattr(self, "do_" + request["do"])(request)
            return {"ok": True, **(reply or {})}, False
        except (NotOffered, NotImplementedError) as error:
            return _problem("not_offered", error), False
        except _OUT_OF_MEMORY as error:
            return _problem("out_of_memory", error), False
        except Exception as error:
            lost = context_lost(self.device)
            return _problem("cuda" if lost else "raised", error), lost

    def do_load(self, request: dict[str, Any]) -> dict[str, Any]:
        sys.path[:] = request["path"] or sys.path
        torch.set_num_threads(request["threads"])
        self.device = torch.device(request["device"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)
        from ..accuracy import providers

        self.provider = providers.load(request["name"])
        return {"torch": torch.__version__, "python": sys.version.split()[0]}

    def do_describe(self, request: dict[str, Any]) -> dict[str, Any]:
        from ..accuracy import providers

        return {"description": providers.describe(request["name"], self.provider).as_json()}

    def do_alloc(self, request: dict[str, Any]) -> None:
        self.storages[request["id"]] = _zeros(request["bytes"], torch.device(request["device"]))

    def do_fill(self, request: dict[str, Any]) -> None:
        for storage, offset, start, size in request["parts"]:
            target = self.storages[storage][offset : offset + size]
            target.copy_(self.buffer[start : start + size])

    def do_read(self, request: dict[str, Any]) -> dict[str, Any]:
        """Copy pieces of a storage that are not zero to the buffer, from `offset` on."""
        storage = self.storages[request["id"]]
        parts: list[list[int]] = []
        used = 0
        for offset, piece in wire.pieces(storage[request["offset"] :]):
            if used + piece.numel() > wire.BUFFER_BYTES:
                return {"parts": parts, "next": request["offset"] + offset}
            self.buffer[used : used + piece.numel()].copy_(piece)
            parts.append([request["offset"] + offset, used, piece.numel()])
            used += piece.numel()
        return {"parts": parts, "next": None}

    def do_state(self, request: dict[str, Any]) -> None:
        """A new caller: what the last one sent is forgotten, unless it asks to keep it."""
        if not request.get("keep"):
            self.storages.clear()
        self.states.clear()
        self.sampler = None
        self.states[request["id"]] = self.provider.new_state()

    def do_run(self, request: dict[str, Any]) -> dict[str, Any]:
        call = wire.rebuild_call(request["call"], self.storages)
        assert isinstance(call, Inputs)
        before = fingerprint(call)
        started = time.perf_counter()
        output: Output = self.provider.run(call, self.states[request["state"]])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        changed = changed_input(call, before)
        views = {}
        for number, name in enumerate(("out", "lse", "max_logits"), start=request["free"]):
            value = getattr(output, name)
            if value is not None:
                value = value.contiguous().clone()
                self.storages[number] = wire.storage_bytes(value)
                views[name] = wire.View.of(value, number).as_json()
        return {
            "views": views,
            "empty_lse": str(output.empty_lse),
            "padded": list(output.padded),
            "note": output.note,
            "changed": changed or "",
            "seconds": seconds,
        }

    def do_write(self, request: dict[str, Any]) -> None:
        call = wire.rebuild_call(request["call"], self.storages)
        assert isinstance(call, WriteInputs)
        self.provider.write(call)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def do_prepare_timing(self, request: dict[str, Any]) -> dict[str, Any]:
        """Get ready to time a call: captured in a CUDA graph where the provider allows that."""
        from ..accuracy.providers.module import pad
        from ..bench.timing import Sampler

        call = wire.rebuild_call(request["call"], self.storages)
        assert isinstance(call, Inputs)
        state = self.states[request["state"]]
        what = self.provider.run(call, state).padded
        if what:
            # Callers of such a kernel keep their tensors padded: that is not its time. The state
            # may have kept the shape that was refused.
            call, _ = pad(call)
            state = self.provider.new_state()
        self.sampler = Sampler(lambda: self.provider.run(call, state), self.device)
        padded = f", {' and '.join(what)} padded beforehand" if what else ""
        return {"how": self.sampler.how + padded}

    def do_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"us": self.sampler()}


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    """Bytes of 0. Large ones on the CPU stay virtual memory until they are written."""
    if device.type == "cpu" and size > LAZY_BYTES:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _problem(kind: str, error: BaseException) -> dict[str, Any]:
    text = " ".join(str(error).split())[:1000]
    return {"ok": False, "kind": kind, "type": type(error).__name__, "text": text}
