"""Time of one call: CUDA-graph replays with the L2 flushed, or wall clock on CPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]

# Written before every sample: several times the largest L2 (126 MB), so that no cache row survives.
FLUSH_BYTES = 512 << 20
WARM_UP = 3


def measure(
    calls: Mapping[str, Call], device: torch.device, samples: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Microseconds of each call, `samples` times.

    On a GPU the providers take turns, each round beginning with another one, which puts them under
    the same clocks; `warm_up` rounds before the first sample. On CPU each has its samples in a row:
    what the other left in caches and page tables is not the provider's time. Only ratios within a
    run are meant to be quoted.
    """
    if device.type == "cuda":
        return _measure_cuda(calls, samples, warm_up)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        call()
        for _ in range(samples):
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def _measure_cuda(calls: Mapping[str, Call], samples: int, warm_up: int) -> dict[str, list[float]]:
    graphs = {name: _capture(call) for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(graphs.items())
    for round_number in range(samples + warm_up):
        order = order[1:] + order[:1]
        for name, graph in order:
            flush.fill_(round_number % 251)
            took = _between_events(graph.replay)
            if round_number >= warm_up:
                times[name].append(took)
    return times


class Sampler:
    """One sample of a call whenever it is asked, for providers that take turns across processes.

    `how` says what is timed: the replay of a CUDA graph, the call itself where it cannot be
    captured (it syncs, or plans on the host), or wall clock on CPU.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.device = call, device
        self.how = "wall clock"
        if device.type != "cuda":
            call()
            return
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        try:
            self.call = _capture(call).replay
            self.how = "CUDA graph, L2 flushed"
        except Exception:  # foreign code: a sync, an allocation, an assert on the host
            torch.cuda.synchronize(device)
            self.how = "not captured, with its host work, L2 flushed"
        for _ in range(WARM_UP):
            self()

    def __call__(self) -> float:
        """Microseconds."""
        if self.device.type == "cuda":
            self.flush.fill_(1)
            return _between_events(self.call)
        start = time.perf_counter()
        self.call()
        return (time.perf_counter() - start) * 1e6


def _between_events(call: Call) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _capture(call: Call) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    values = torch.tensor(times, dtype=torch.float64)
    low, middle, high = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return round(float(low), 2), round(float(middle), 2), round(float(high), 2)


def sm_clock(device: torch.device) -> int:
    """The SM clock in MHz now, 0 where it cannot be read."""
    if device.type != "cuda":
        return 0
    command = ("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0
