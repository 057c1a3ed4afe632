"""Wrong kernels that are not in the library: the gate stops each in the case that is named here.

They have no model to be named by, being tied to one op, size or option, or too small an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sparse_mla.accuracy.case import Inputs, Output, WriteInputs
from sparse_mla.accuracy.cases import CASES
from sparse_mla.accuracy.faults import CleanKernel
from sparse_mla.accuracy.gate import FAILED, PASSED, prepare, run_case

BY_NAME = {case.name: case for case in CASES}


class Changed(CleanKernel):
    """The clean kernel, and something done to what it is given or answers."""

    def __init__(
        self,
        answer: Callable[[Inputs, torch.Tensor], torch.Tensor] | None = None,
        given: Callable[[Inputs], Inputs] | None = None,
    ) -> None:
        super().__init__()
        self.answer, self.given = answer, given

    def run(self, inputs: Inputs, state: object) -> Output:
        seen = inputs if self.given is None else self.given(inputs)
        output = super().run(seen, state)
        if self.answer is None:
            return output
        return replace(output, out=self.answer(inputs, output.out.clone()))


class Gain(CleanKernel):
    """Rows that `where` chooses, of outputs [n, h, d_v], are too large by a factor."""

    def __init__(self, gain: float, where: tuple[object, ...] = ()) -> None:
        super().__init__()
        self.gain, self.where = gain, where

    def finish(self, done, inputs):  # type: ignore[no-untyped-def]
        done = super().finish(done, inputs)
        out = done.out.clone()
        out[self.where] *= 1 + self.gain
        return done._replace(out=out)


ALL = slice(None)


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("gain", [1.7e-4, -1.7e-4])
def test_a_small_gain(op: str, gain: float) -> None:
    result = run_case(Gain(gain), BY_NAME[f"{op}/gain"])
    assert result.status == FAILED and result.detail.startswith("gain is")


@pytest.mark.parametrize(
    ("case", "where", "gain", "says"),
    [
        ("decode/gain", (ALL, 5), 3e-4, "head 5: gain"),
        ("decode/heads/64", (ALL, 37), 3e-3, "head 37: gain"),
        ("prefill/gain", (7,), 8e-4, "query token 7: gain"),
    ],
)
def test_a_gain_of_one_head_or_token(
    case: str, where: tuple[object, ...], gain: float, says: str
) -> None:
    result = run_case(Gain(gain, where), BY_NAME[case])
    assert result.status == FAILED and result.detail.startswith(says)


def beyond(dim: int, count: int) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    """Results past a number of sequences or query tokens are not written."""

    def answer(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
        out.narrow(dim, min(count, out.shape[dim]), max(out.shape[dim] - count, 0)).zero_()
        return out

    return answer


def many_heads(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
    if inputs.q.shape[-2] > 64:
        out[:, 1:] = 0
    return out


def spread(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
    """A NaN reaches the query token after it, in its sequence or the next."""
    rows = out.view(-1, *out.shape[-2:])
    hit = rows.isnan().flatten(1).any(1)
    rows[1:][hit[:-1]] = float("nan")
    return out


def default_scale(inputs: Inputs) -> Inputs:
    return replace(inputs, scale=inputs.q.shape[-1] ** -0.5)


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("decode/batch/200", Changed(beyond(0, 72))),
        ("prefill/tokens/200", Changed(beyond(0, 128))),
        ("dense_decode/batch/40", Changed(beyond(0, 32))),
        ("decode/s_q/9", Changed(beyond(1, 8))),
        ("decode/s_q/2_heads_128", Changed(many_heads)),
        ("decode/s_q/4_heads_80/bf16", Changed(many_heads)),
        ("decode/nan/s_q", Changed(spread)),
        ("decode/nan/bf16", Changed(spread)),
        ("decode/nan/extra", Changed(spread)),
        ("prefill/nan/contained", Changed(spread)),
        ("dense_decode/nan", Changed(spread)),
        ("decode/scale", Changed(given=default_scale)),
        ("prefill/scale", Changed(given=default_scale)),
        ("decode/extra/scale", Changed(given=default_scale)),
        ("dense_decode/scale", Changed(given=default_scale)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_for_some_sizes_or_options(case: str, kernel: Changed) -> None:
    ready = prepare(BY_NAME[case])
    assert run_case(CleanKernel(), BY_NAME[case], prepared=ready).status == PASSED
    assert run_case(kernel, BY_NAME[case], prepared=ready).status == FAILED


class Moving(CleanKernel):
    """lse has other bits every other time."""

    count = 0

    def lse_unit(self, lse: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return torch.nextafter(lse, 2 * lse) if self.count % 2 else lse


@pytest.mark.parametrize("case", ["decode/repeats/extra", "dense_decode/repeats"])
def test_bits_that_move(case: str) -> None:
    result = run_case(Moving(), BY_NAME[case])
    assert result.status == FAILED and "other bits" in result.detail


def test_other_dtypes() -> None:
    wide = run_case(Changed(lambda inputs, out: out.float()), BY_NAME["decode/gaussian"])
    assert wide.detail == "out is torch.float32, must be torch.bfloat16"


def fill_beside(inputs: Inputs) -> Inputs:
    """Pads the rows of a list in place, where they are slices of longer ones."""
    lists = inputs.indices
    longer = lists.as_strided((*lists.shape[:-1], lists.shape[-1] + 1), lists.stride())
    longer[..., -1] = -1
    return inputs


def test_memory_beside_an_input() -> None:
    result = run_case(Changed(given=fill_beside), BY_NAME["decode/heads/5_strided"])
    assert result.detail == "call 1 changed its input indices (memory beside it)"


class ZeroesItsInput(CleanKernel):
    def write(self, inputs: WriteInputs) -> None:
        super().write(inputs)
        inputs.latent.nan_to_num_()


def test_a_writer_that_changes_its_input() -> None:
    result = run_case(ZeroesItsInput(), BY_NAME["kv_write/not_finite"])
    assert result.detail == "changed its input latent"


class PastTheTable(CleanKernel):
    """A length past the table's end runs on into the next sequence's pages."""

    def dense_table(self, inputs: Inputs) -> torch.Tensor:
        table = super().dense_table(inputs)
        return torch.cat([table, table.roll(-1, 0)], 1)


def test_lengths_past_the_table() -> None:
    result = run_case(PastTheTable(), BY_NAME["dense_decode/lengths/past_table"])
    assert result.status == FAILED


class Normalised(CleanKernel):
    """Right: weights are rounded after the division, as softmax(x).to(bf16) @ v does."""

    def softmax(
        self, logits: torch.Tensor, values: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.logsumexp(logits.flatten(3), -1)
        known = torch.where(lse.isneginf(), 0.0, lse)
        p = torch.exp(logits.flatten(3) - known[..., None])
        return torch.einsum("nhst,nstd->nhsd", self.round_weights(p), values), lse


@pytest.mark.parametrize(
    "case", ["decode/logits/flat", "dense_decode/logits/flat", "decode/gaussian", "decode/gain"]
)
def test_normalised_weights_raise_no_alarm(case: str) -> None:
    for seed in range(4):
        result = run_case(Normalised(), BY_NAME[case], seed)
        assert result.status == PASSED, f"{seed}: {result.detail}"
