"""The fault that power-of-two test data cannot show, on activations of a real language model.

A kernel that rounds the cache's fp32 scales down to powers of two shrinks keys and values by up to
half. Whoever tests it with power-of-two scales sees nothing. Run:

    python examples/power_of_two_scales.py
"""

from __future__ import annotations

import torch

from sparse_mla import KVCache
from sparse_mla.accuracy import activations
from sparse_mla.accuracy.budgets import expect
from sparse_mla.accuracy.case import Inputs
from sparse_mla.accuracy.diagnose import Call, Trial, diagnose, verdict
from sparse_mla.accuracy.faults import CleanKernel, get_fault
from sparse_mla.accuracy.metrics import compare

TOPK = 128
QUERIES = 8


def real_inputs(capture: activations.Capture, scale_rounding: str) -> Inputs:
    """A model's last queries over its own keys and values, in an FP8 cache."""
    q, latent, rope = activations.to_mla(capture)
    tokens = latent.shape[0]
    cache = KVCache.empty(-(-tokens // 64), 64, "v32_fp8")
    cache.append(latent, rope, torch.arange(tokens), scale_rounding=scale_rounding)
    last = capture.positions.argsort()[-QUERIES:]
    indices = torch.full((QUERIES, 1, TOPK), -1, dtype=torch.int32)
    for row, position in enumerate(capture.positions[last].tolist()):
        past = torch.linspace(0, position, min(TOPK, position + 1)).round()
        indices[row, 0, : len(past)] = past.int()
    return Inputs("decode", q[last].unsqueeze(1), cache, indices, capture.scale)


def main() -> None:
    print(f"{'scales':14} {'layer':>5} {'kernel':22} {'error/ideal':>11} {'gain':>8}  gate")
    kernels = {
        "exact scales": CleanKernel(),
        "rounds scales down": get_fault("scale_pow2_down").kernel(),
    }
    named: dict[str, set[str]] = {}
    for rounding, scales in (("amax", "fp32 amax/448"), ("pow2", "power of two")):
        for capture in activations.load():
            inputs = real_inputs(capture, rounding)
            expected = expect(inputs)
            for label, kernel in kernels.items():
                output = kernel.run(inputs, kernel.new_state())
                metrics = compare(output, expected)
                judged = "passed" if metrics.passed else "failed"
                print(
                    f"{scales:14} {capture.layer:5} {label:22} {metrics.multiple:11.1f} "
                    f"{metrics.gain:+8.1%}  {judged}"
                )
                if not metrics.passed:
                    found = verdict(diagnose([Trial((Call(inputs, (output,)),))]))
                    named.setdefault(label, set()).add(found.name or found.text)
    for label, names in named.items():
        print(f"diagnosis of the kernel that {label}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
