"""Rows: one JSON object per line, one line per measured provider and shape."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .workloads import Workload

OURS = "sparse_mla:"
"""How the provider names of our backends begin."""


@dataclass(frozen=True)
class Machine:
    """What a row was measured on."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        run: shared by the rows that were measured together, interleaved on one machine; only
            such rows may be compared.
        p20_us, p50_us, p80_us: quantiles of the time of one call, microseconds.
        rel_l2, gain: error of the very answer that was timed, against the float64 oracle on a
            sample of its query tokens.
        ideal: rel_l2 of rounding the exact answer to bf16, on the same sample.
        sm_clock_mhz: SM clock right after the workload's samples, 0 on CPU.
        lse_err: max |lse - ref| on the same sample.
        checked: query tokens in that sample. Rows from before these two were kept lack them.
        extra_topk, extra_lengths: of the workload; rows without an extra cache may lack them.
    """

    run: str
    op: str
    layout: str
    b: int
    s_q: int
    h_q: int
    topk: int
    s_kv: int
    provider: str
    p20_us: float
    p50_us: float
    p80_us: float
    rel_l2: float
    gain: float
    ideal: float
    sm_clock_mhz: int
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    lse_err: float | None = None
    checked: int | None = None
    extra_topk: int = 0
    extra_lengths: bool = False

    @property
    def workload(self) -> Workload:
        return Workload(
            self.op,
            self.layout,
            self.b,
            self.s_q,
            self.h_q,
            self.topk,
            self.s_kv,
            self.extra_topk,
            self.extra_lengths,
        )

    @property
    def multiple(self) -> float:
        """Error in multiples of ideal rounding."""
        return self.rel_l2 / self.ideal

    @property
    def backend(self) -> str | None:
        """Which backend of ours, None for a peer."""
        return self.provider.removeprefix(OURS) if self.provider.startswith(OURS) else None


def this_machine(device: torch.device) -> Machine:
    """Names and versions; "unknown" where something does not say."""
    return Machine(
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: " + _cpu_name(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else "none",
        torch=torch.__version__,
        triton=_version("triton"),
        # A copy of the sources without their repository is told its commit.
        commit=os.environ.get("SPARSE_MLA_COMMIT")
        or _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def results_file(folder: Path, machine: Machine) -> Path:
    """Where a machine's rows of a day go below benchmarks/results: <gpu>/<date>.jsonl."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    return folder / slug / f"{machine.date}.jsonl"


def append(path: Path, rows: list[Row]) -> None:
    """Add rows to a file, making it and its folder where they do not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file; ValueError names the line that is not one."""
    names = {field.name for field in fields(Row)}
    needed = {field.name for field in fields(Row) if field.default is MISSING}
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(values, dict) or not needed <= set(values) <= names:
            given = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path}:{number}: fields are {given}, a row has {sorted(names)}")
        rows.append(Row(**values))
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
