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


def last_odd_head(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
    """Heads are stored in pairs from the second tile of 16 on."""
    if out.shape[-2] > 16:
        out[..., out.shape[-2] // 2 * 2 :, :] = 0
    return out


def last_of_second_block(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
    if 64 < out.shape[-2] < 128:
        out[..., -1, :] = out[..., 0, :]
    return out


def wrapped_extra_lengths(inputs: Inputs) -> Inputs:
    """Lengths of the second list are rounded up past 2^31."""
    lengths = inputs.extra_topk_length
    assert lengths is not None
    return replace(inputs, extra_topk_length=torch.where(lengths > 2**31 - 64, 0, lengths))


def sink_with_default_scale(inputs: Inputs) -> Inputs:
    """Sinks are scaled as logits are, which shows only where the scale is not 1/sqrt(d_qk)."""
    assert inputs.attn_sink is not None
    by = inputs.scale * inputs.q.shape[-1] ** 0.5
    return replace(inputs, attn_sink=inputs.attn_sink * by)


def sink_fp16(inputs: Inputs) -> Inputs:
    assert inputs.attn_sink is not None
    return replace(inputs, attn_sink=inputs.attn_sink.half().float())


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
        ("decode/heads/17", Changed(last_odd_head)),
        ("prefill/heads/127", Changed(last_odd_head)),
        ("decode/mixed/v4_fp8/17_heads", Changed(last_odd_head)),
        ("decode/heads/100", Changed(last_of_second_block)),
        ("prefill/mixed/fp8_tensor", Changed(last_of_second_block)),
        ("dense_decode/mixed/v4_fp8", Changed(last_of_second_block)),
        ("decode/extra/v4_fp8+v4_fp8/mixed", Changed(given=wrapped_extra_lengths)),
        ("decode/mixed/bf16/17_heads", Changed(given=sink_with_default_scale)),
        ("decode/sink/coherent", Changed(given=sink_fp16)),
        ("prefill/sink/coherent", Changed(given=sink_fp16)),
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


class SinkAfterRounding(CleanKernel):
    """The output is rounded to bf16, then scaled by the sink's share and rounded again."""

    def finish(self, done, inputs):  # type: ignore[no-untyped-def]
        return super().finish(done._replace(out=done.out.bfloat16().float()), inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["decode/sink/shifted", "prefill/sink/shifted"])
def test_an_output_rounded_twice(case: str, seed: int) -> None:
    assert run_case(CleanKernel(), BY_NAME[case], seed).status == PASSED
    assert run_case(SinkAfterRounding(), BY_NAME[case], seed).status == FAILED


class TiesAway(CleanKernel):
    """Values halfway between two numbers go to the larger one."""

    def to_e4m3(self, scaled: torch.Tensor) -> torch.Tensor:
        return super().to_e4m3(scaled * (1 + 2.0**-22))


@pytest.mark.parametrize("case", [name for name in BY_NAME if name.startswith("kv_write/ties")])
def test_ties_away_from_zero(case: str) -> None:
    assert run_case(CleanKernel(), BY_NAME[case]).status == PASSED
    result = run_case(TiesAway(), BY_NAME[case])
    assert result.status == FAILED and "not the nearest e4m3 number" in result.detail


@pytest.mark.parametrize(
    "case",
    [
        "decode/repeats/extra",
        "dense_decode/repeats",
        "decode/mixed/v4_fp8/64_heads",
        "decode/extra/v4_fp8+v4_fp8/64_heads",
        "prefill/mixed/v32_fp8",
    ],
)
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


class BaseAboveMaximum(CleanKernel):
    """Right: what is subtracted is the maximum rounded up, so that no weight is exactly 1."""

    def running_max(self, logits: torch.Tensor) -> torch.Tensor:
        return super().running_max(logits).ceil()


@pytest.mark.parametrize(
    "case",
    [
        "dense_decode/causal/short",
        "dense_decode/logits/large",
        "dense_decode/mixed/bf16",
        "decode/busy/140_lists/64_heads",
        "decode/topk/1",
        "decode/gaussian",
    ],
)
def test_another_base_raises_no_alarm(case: str) -> None:
    """Where one token carries a row, its weight's rounding moves values by a step of bf16."""
    for seed in range(3):
        result = run_case(BaseAboveMaximum(), BY_NAME[case], seed)
        assert result.status == PASSED, f"{seed}: {result.detail}"


class Truncating(CleanKernel):
    """Right: a tensor core that adds 16 products at a time and cuts the sum off at 24 bits."""

    def logits(self, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        total = torch.zeros(*q.shape[:2], keys.shape[1], dtype=torch.float64)
        for k in range(0, q.shape[-1], 16):
            total = total + q[..., k : k + 16].double() @ keys[..., k : k + 16].double().mT
            nearest = total.float()
            past = nearest.double().abs() > total.abs()
            total = torch.where(past, nearest.nextafter(torch.zeros(())), nearest).double()
        return total.float() * scale


@pytest.mark.parametrize(
    "case", ["decode/busy/scales/log_uniform", "decode/mixed/v32_fp8/64_heads", "prefill/gaussian"]
)
def test_truncated_sums_raise_no_alarm(case: str) -> None:
    result = run_case(Truncating(), BY_NAME[case])
    assert result.status == PASSED, result.detail
