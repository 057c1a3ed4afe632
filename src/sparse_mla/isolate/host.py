"""The tool's side of an isolated provider: start, ask, wait no longer than allowed, start again.

`IsolatedProvider` is an `Implementation` like any other. A process that dies (a segfault, an
abort), loses its CUDA context or does not answer in time raises Crashed or Hung for that case; the
next case gets a fresh process, and the tool's own CUDA context never knew of it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..accuracy.case import Crashed, Hung, Inputs, NotOffered, Output, Raised, WriteInputs
from . import wire

TIME_LIMIT = 300.0
"""Seconds for one call; the first one of a kernel may compile it."""

START_LIMIT = 600.0
"""Seconds to start an interpreter and import a provider."""

# The worker's modules are loaded from the tool's files under a name of their own, so that `import
# sparse_mla` in there finds the provider's version of it, or none. -c puts '' on sys.path.
BOOT = """
import importlib, sys, types
sys.path[:] = [entry for entry in sys.path if entry]
package = types.ModuleType("_sparse_mla_tool")
package.__path__ = [sys.argv[1]]
sys.modules[package.__name__] = package
importlib.import_module("_sparse_mla_tool.isolate.worker").main(sys.argv[2])
"""

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Home:
    """Where a provider lives.

    Attributes:
        python: the interpreter to run.
        path: sys.path to give it; None leaves an interpreter its own.
        text: what the user wrote, "" for this interpreter.
    """

    python: str
    path: tuple[str, ...] | None
    text: str = ""

    @property
    def directory(self) -> Path | None:
        return Path(self.text) if self.text else None


def here() -> Home:
    """This interpreter with this process' search path."""
    return Home(sys.executable, tuple(entry or os.getcwd() for entry in sys.path))


def find_home(text: str) -> Home:
    """A virtual environment, an interpreter, or a directory to import from.

    Raises:
        ValueError: nothing is there, or an environment without an interpreter.
    """
    given = Path(text).expanduser()
    if not given.exists():
        raise ValueError(f"{text}: no such interpreter or directory")
    # Not resolved: an environment's python is a link, and finds the environment by its own path.
    place = given.absolute()
    if place.is_file():
        if not os.access(place, os.X_OK):
            raise ValueError(f"{text}: a file that is not an interpreter")
        return Home(str(place), None, str(place))
    for name in ("bin/python", "Scripts/python.exe"):
        if (place / name).exists():
            return Home(str(place / name), None, str(place))
    if (place / "pyvenv.cfg").exists() or (place / "bin").is_dir():
        raise ValueError(f"{text}: an environment without an interpreter (bin/python)")
    return Home(sys.executable, (str(place), *here().path), str(place))  # type: ignore[misc]


class Worker:
    """A running process with one provider in it."""

    def __init__(self, name: str, home: Home, device: torch.device, limit: float) -> None:
        self.limit = limit
        folder, path = _shared_file()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        # Commits of one second apart would share compiled files: Python tells them by the time.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if home.path is None:
            for variable in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                environment.pop(variable, None)
        try:
            self.buffer = wire.map_buffer(path)
            self.process = subprocess.Popen(
                [home.python, "-c", BOOT, str(PACKAGE), path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=environment,
                start_new_session=True,
            )
            start = min(START_LIMIT, 10 * limit)
            self._receive(start)
            self.about = self.ask(
                {
                    "do": "load",
                    "name": name,
                    "path": None if home.path is None else list(home.path),
                    "threads": torch.get_num_threads(),
                    "device": str(device),
                },
                start,
            )
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def ask(self, request: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            Hung, Crashed: the process was stopped, or is gone.
            NotOffered, Raised, MemoryError: what the provider said.
        """
        assert self.process.stdin is not None
        try:
            wire.write_frame(self.process.stdin, request)
        except (BrokenPipeError, OSError):
            raise self._gone() from None
        reply = self._receive(self.limit if limit is None else limit)
        if reply.get("ok"):
            return reply
        text = f"{reply.get('type')}: {reply.get('text')}"
        kind = reply.get("kind")
        if kind == "not_offered":
            raise NotOffered(str(reply.get("text")) or str(reply.get("type")))
        if kind == "out_of_memory":
            raise torch.OutOfMemoryError(str(reply.get("text")))
        if kind == "cuda":
            self.close()
            raise Crashed(f"CUDA context lost: {text}")
        raise Raised(text)

    def _receive(self, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        length = wire.frame_length(self._read(4, deadline, limit))
        return wire.parse_frame(self._read(length, deadline, limit))

    def _read(self, size: int, deadline: float, limit: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise Hung(f"no answer within {limit:g} s, stopped")
                got = os.read(descriptor, size - len(data))
                if not got:
                    raise self._gone()
                data += got
        return data

    def _gone(self) -> Crashed:
        """Why the process ended, once it has."""
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            code = 0
        last = self.last_words()
        self.close()
        if code < 0:
            name = (
                signal.Signals(-code).name if -code in signal.Signals.__members__.values() else ""
            )
            return Crashed(f"its process was killed by signal {-code} {name}".rstrip() + last)
        return Crashed(f"its process ended with status {code}{last}")

    def last_words(self) -> str:
        """The last line on standard error, to add to a message."""
        self.errors.seek(0)
        lines = self.errors.read()[-4000:].decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f" ({said[-1][:200]})" if said else ""

    def close(self) -> None:
        """Stop the process and what it started."""
        process = getattr(self, "process", None)
        if process is not None:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self.errors.close()


def _shared_file() -> tuple[str, str]:
    """A new file of BUFFER_BYTES, in memory where there is room; its folder and its path."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK)
    if roomy:
        roomy = shutil.disk_usage(memory).free > 4 * wire.BUFFER_BYTES
    folder = tempfile.mkdtemp(prefix="sparse_mla_", dir=memory if roomy else None)
    path = os.path.join(folder, "buffer")
    with open(path, "wb") as file:
        file.truncate(wire.BUFFER_BYTES)
    return folder, path


class IsolatedProvider:
    """A provider in its own process, restarted after a crash; an `Implementation`."""

    def __init__(
        self,
        name: str,
        home: Home,
        device: torch.device,
        limit: float = TIME_LIMIT,
        label: str | None = None,
    ) -> None:
        """Start the process and load the provider.

        Raises:
            Crashed, Hung: the process did not survive that.
            Raised, NotOffered: the provider cannot be imported.
        """
        self.name = label or (f"{name}@{home.text}" if home.text else name)
        self._name, self._home, self._device, self._limit = name, home, device, limit
        self._worker: Worker | None = None
        self._sent: dict[tuple[str, int, int], tuple[int, torch.Tensor]] = {}
        self._next = 0
        self.about = self._running().about

    def _running(self) -> Worker:
        worker = self._worker
        if worker is not None and worker.process.poll() is None:
            return worker
        if worker is not None:
            worker.close()
        self._sent.clear()
        self._worker = Worker(self._name, self._home, self._device, self._limit)
        return self._worker

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> IsolatedProvider:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What the provider says of itself (`providers.Description`), from its own process."""
        reply = self._running().ask({"do": "describe", "name": self._name})
        return dict(reply["description"])

    def new_state(self, keep: bool = False) -> int:
        """A new caller's state; `keep` what earlier ones sent: workloads share gigabytes."""
        worker = self._running()
        if not keep:
            self._sent.clear()
        number = self._number()
        worker.ask({"do": "state", "id": number, "keep": keep})
        return number

    def run(self, inputs: Inputs, state: int) -> Output:
        worker = self._alive()
        call = self._send(worker, inputs)
        free = self._number(3)
        reply = worker.ask({"do": "run", "call": call, "state": state, "free": free})
        made = {
            name: self._fetch(worker, wire.View.from_json(view), inputs.q.device)
            for name, view in reply["views"].items()
        }
        return Output(
            made["out"],
            made.get("lse"),
            made.get("max_logits"),
            float(reply["empty_lse"]),
            tuple(reply["padded"]),
            reply["note"],
            reply["changed"],
        )

    def write(self, inputs: WriteInputs) -> None:
        self.new_state()
        worker = self._alive()
        call = self._send(worker, inputs)
        worker.ask({"do": "write", "call": call})
        view = wire.View.from_json(call["views"]["cache"])
        self._read_back(worker, view.storage, wire.storage_bytes(inputs.cache.pages))

    def prepare_timing(self, inputs: Inputs) -> str:
        """Get ready to time this call; how it will be timed."""
        state = self.new_state(keep=True)
        worker = self._alive()
        call = self._send(worker, inputs)
        return str(worker.ask({"do": "prepare_timing", "call": call, "state": state})["how"])

    def sample(self) -> float:
        """Microseconds of one call, from `prepare_timing`."""
        return float(self._alive().ask({"do": "sample"})["us"])

    def _alive(self) -> Worker:
        """The process that holds this caller's state; it must not have been replaced."""
        if self._worker is None or self._worker.process.poll() is not None:
            raise Crashed("its process ended between two calls")
        return self._worker

    def _number(self, count: int = 1) -> int:
        self._next += count
        return self._next - count

    def _send(self, worker: Worker, call: wire.Call) -> dict[str, Any]:
        """Copy the call's storages that this caller has not sent yet; the call in JSON.

        Buffers that the call has refilled are sent again, into the same memory.
        """
        views: dict[str, wire.View] = {}
        parts: list[list[int]] = []
        used = 0
        refilled = {
            buffer.untyped_storage().data_ptr() for buffer, _ in getattr(call, "contents", ())
        }
        for name, tensor in wire.call_tensors(call).items():
            storage = wire.storage_bytes(tensor)
            key = (str(storage.device), storage.data_ptr(), storage.numel())
            known = key in self._sent
            if not known:
                # Kept, so that no other storage gets this address while the key is in use.
                self._sent[key] = (self._number(), storage)
                number = self._sent[key][0]
                size = storage.numel()
                worker.ask(
                    {"do": "alloc", "id": number, "bytes": size, "device": str(tensor.device)}
                )
            if not known or storage.data_ptr() in refilled:
                number = self._sent[key][0]
                for offset, piece in wire.pieces(storage, zeros=known):
                    if used + piece.numel() > wire.BUFFER_BYTES:
                        worker.ask({"do": "fill", "parts": parts})
                        parts, used = [], 0
                    worker.buffer[used : used + piece.numel()].copy_(piece)
                    parts.append([number, offset, used, piece.numel()])
                    used += piece.numel()
            views[name] = wire.View.of(tensor, self._sent[key][0])
        if parts:
            worker.ask({"do": "fill", "parts": parts})
        return wire.describe_call(call, views)

    def _fetch(self, worker: Worker, view: wire.View, device: torch.device) -> torch.Tensor:
        """A tensor that the provider answered, on the tool's device."""
        width = getattr(torch, view.dtype).itemsize
        count = 1
        for n in view.shape:
            count *= n
        storage = torch.zeros(count * width, dtype=torch.uint8, device=device)
        self._read_back(worker, view.storage, storage)
        return view.make({view.storage: storage})

    def _read_back(self, worker: Worker, number: int, into: torch.Tensor) -> None:
        """Make `into` equal to a storage of the provider's process."""
        offset: int | None = 0
        zero_from = 0
        while offset is not None:
            reply = worker.ask({"do": "read", "id": number, "offset": offset})
            for at, start, size in reply["parts"]:
                _zero(into, zero_from, at)
                into[at : at + size].copy_(worker.buffer[start : start + size])
                zero_from = at + size
            offset = reply["next"]
        _zero(into, zero_from, into.numel())


def _zero(storage: torch.Tensor, start: int, end: int) -> None:
    """Clear what is not zero already: a write to virtual memory would make it real."""
    for _, piece in wire.pieces(storage[start:end]):
        piece.zero_()
