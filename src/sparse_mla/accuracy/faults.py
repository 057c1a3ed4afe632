"""The fault library: every wrong kernel the gate must catch and the diagnosis can name.

One list with two uses. As mutants, the models run through the gate (fault_gate.py), which must
stop each of them. As hypotheses, they are compared with the wrong answers of a kernel under test
(diagnose.py). docs/faults.md says where each fault has been seen.
"""

from __future__ import annotations

from .faults_dense import DENSE_FAULTS
from .faults_extra import EXTRA_FAULTS
from .faults_fault import Fault
from .faults_kernel import EmulatedKernel
from .faults_layouts import LAYOUT_FAULTS
from .faults_mixed import MIXED_FAULTS
from .faults_reading import READING
from .faults_seldom import SELDOM_FAULTS
from .faults_softmax import SOFTMAX
from .faults_whole import WHOLE
from .faults_writing import WRITING

FAULTS: tuple[Fault, ...] = tuple(
    sorted(
        READING
        + SOFTMAX
        + WHOLE
        + LAYOUT_FAULTS
        + EXTRA_FAULTS
        + DENSE_FAULTS
        + WRITING
        + SELDOM_FAULTS
        + MIXED_FAULTS,
        key=lambda fault: fault.line,
    )
)


def get_fault(name: str) -> Fault:
    """The fault of that name; ValueError lists the names that exist."""
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise ValueError(f"fault is {name!r}, allowed: {', '.join(f.name for f in FAULTS)}")


class CleanKernel(EmulatedKernel):
    """No fault: exact fp32 scales, bf16 weights, fp32 sums. The gate must let it pass."""
