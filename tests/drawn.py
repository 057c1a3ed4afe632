"""Random calls with hostile surroundings, and the comparison with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_mla import KVCache, reference
from sparse_mla.kv_layout import KVLayout, get_layout
from sparse_mla.reference import Reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1

# Relative rms error of rounding to bf16; derived in accuracy/budgets.py.
BF16_RMS = 1.66e-3


@dataclass
class Call:
    """One call of decode or prefill."""

    q: torch.Tensor
    cache: KVCache
    indices: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> torch.Tensor:
        """Slots that some query selects, sorted."""
        return torch.unique(self.indices[self.valid]).long()

    @property
    def valid(self) -> torch.Tensor:
        """Which entries of `indices` count."""
        valid = (self.indices >= 0) & (self.indices < self.cache.num_slots)
        length = self.options.get("topk_length")
        if length is not None:
            column = torch.arange(self.indices.shape[-1])
            # Prefill has a length per query, decode one per sequence.
            per_row = length.view(-1, *[1] * (self.indices.dim() - 1))
            valid &= column < per_row
        return valid

    def extra(self) -> Call:
        """The extra cache as if it were a call's only one."""
        given = self.options
        lengths = given.get("extra_topk_length")
        options = {} if lengths is None else {"topk_length": lengths}
        return Call(self.q, given["extra_cache"], given["extra_indices"], options)

    def oracle(self) -> Reference:
        answer = reference.decode if self.q.dim() == 4 else reference.prefill
        return answer(self.q, self.cache, self.indices, **self.options)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled_cache(
    layout: str,
    pages: int,
    page_size: int,
    *,
    seed: int = 0,
    spread: float = 1.0,
    page_stride: int | None = None,
) -> KVCache:
    """A cache whose tokens and 128-wide tiles differ in magnitude by factors of e^spread."""
    made = generator(seed)
    kind = get_layout(layout)
    cache = KVCache.empty(
        pages, page_size, kind, page_stride=page_stride, tensor_scale=scale_of(kind)
    )
    n = cache.num_slots
    latent, rope = drawn_tokens(kind, n, made, spread)
    cache.append(latent, rope, torch.arange(n))
    return cache


def scale_of(layout: KVLayout) -> torch.Tensor | None:
    """A scale of the whole tensor, where the layout has one."""
    return torch.tensor([0.0123]) if layout.tensor_scale else None


def drawn_tokens(
    layout: KVLayout, n: int, made: torch.Generator, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latent and RoPE part of n tokens whose 128-wide tiles differ by factors of e^spread."""
    width = layout.latent.count
    tiles = -(-width // 128)
    size = torch.exp(spread * torch.randn(n, tiles, 1, generator=made))
    latent = (torch.randn(n, tiles, 128, generator=made) * size).flatten(1)[:, :width]
    return latent, torch.randn(n, 64, generator=made) if layout.rope else None


def poison_unselected(call: Call) -> None:
    """Every byte of the caches that no query may read becomes 0xFF, NaN in every field but e2m1.

    Unselected tokens of e2m1 layouts are NaN by their scales.
    """
    poison_but(call.cache, call.used)
    if "extra_cache" in call.options:
        poison_but(call.options["extra_cache"], call.extra().used)


def poison_but(cache: KVCache, kept: torch.Tensor) -> None:
    page, offset = kept // cache.page_size, kept % cache.page_size
    views = [cache.rows_view(), cache.footers_view()]
    saved = [view[page, offset] for view in views]
    cache.pages.fill_(0xFF)
    for view, old in zip(views, saved, strict=True):
        view[page, offset] = old


def draw_indices(
    shape: tuple[int, ...], num_slots: int, *, seed: int, invalid: float = 0.15
) -> torch.Tensor:
    """Random slots, some repeated, and a share of entries that are invalid in every way."""
    made = generator(seed)
    indices = torch.randint(0, max(1, num_slots), shape, generator=made)
    wrong = torch.tensor([-1, -2, INT_MIN, INT_MAX, num_slots, num_slots + 1])
    pick = wrong[torch.randint(0, len(wrong), shape, generator=made)]
    bad = torch.rand(shape, generator=made) < (invalid if num_slots else 1.1)
    return torch.where(bad, pick, indices).to(torch.int32)


def decode_call(
    layout: str = "v32_fp8",
    *,
    b: int = 2,
    s_q: int = 1,
    heads: int = 16,
    topk: int = 100,
    pages: int = 7,
    page_size: int = 64,
    page_stride: int | None = None,
    invalid: float = 0.15,
    lengths: bool = False,
    sink: bool = False,
    scale: float | None = None,
    extra_layout: str | None = None,
    extra_topk: int = 70,
    extra_page_size: int = 17,
    seed: int = 0,
) -> Call:
    """A decode call; bytes that it may not read are poisoned.

    With an `extra_layout` there is a second cache; it has lengths if the first one has.
    """
    made = generator(seed + 1)
    cache = filled_cache(layout, pages, page_size, seed=seed, page_stride=page_stride)
    # 0.4 keeps most logits within +-10, so that many tokens carry weight.
    q = (0.4 * torch.randn(b, s_q, heads, cache.layout.d_qk, generator=made)).to(torch.bfloat16)
    indices = draw_indices((b, s_q, topk), cache.num_slots, seed=seed + 2, invalid=invalid)
    options: dict[str, Any] = {}
    if scale is not None:
        options["scale"] = scale
    if lengths:
        options["topk_length"] = draw_lengths(b, topk, seed=seed + 3)
    if sink:
        options["attn_sink"] = draw_sink(heads, seed=seed + 4)
    if extra_layout is not None:
        extra = filled_cache(extra_layout, 9, extra_page_size, seed=seed + 5)
        shape = b, s_q, extra_topk
        options["extra_cache"] = extra
        options["extra_indices"] = draw_indices(
            shape, extra.num_slots, seed=seed + 6, invalid=invalid
        )
        if lengths:
            options["extra_topk_length"] = draw_lengths(b, extra_topk, seed=seed + 7).flip(0)
    call = Call(q, cache, indices, options)
    poison_unselected(call)
    return call


def prefill_call(layout: str = "bf16", *, s_q: int = 3, seed: int = 0, **shape: Any) -> Call:
    """A prefill call: as `decode_call`, with one list and one length per query token."""
    call = decode_call(layout, b=s_q, s_q=1, seed=seed, **shape)
    return Call(call.q[:, 0], call.cache, call.indices[:, 0], call.options)


def draw_lengths(n: int, topk: int, *, seed: int) -> torch.Tensor:
    """Lengths between -1 and topk + 3, the ends included where there is room for them."""
    lengths = torch.randint(0, topk + 1, (n,), generator=generator(seed))
    for row, value in zip(range(n - 1), (0, topk + 3, -1, 1), strict=False):
        lengths[row + 1] = value
    return lengths.to(torch.int32)


def draw_sink(heads: int, *, seed: int) -> torch.Tensor:
    """Sinks of both signs and, where there are heads enough, both infinities."""
    sink = 4 * torch.randn(heads, generator=generator(seed))
    if heads > 4:
        sink[1], sink[2], sink[3], sink[4] = float("inf"), float("-inf"), 60.0, -60.0
    return sink


@dataclass(frozen=True)
class Error:
    """How far an answer is from the oracle.

    Attributes:
        multiple: relative L2 error in multiples of the error of the oracle's own bf16 rounding.
        worst_row: the same for the worst query row.
        gain: <out, ref> / <ref, ref> - 1, less what the ideal rounding gives.
        lse: max |lse - ref| / (10 + |ref|).
    """

    multiple: float
    worst_row: float
    gain: float
    lse: float


def compare(out: torch.Tensor, lse: torch.Tensor, ref: Reference) -> Error:
    """The error of an answer; asserts dtypes, shapes and that nothing but empty rows is -inf."""
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert out.shape == ref.out.shape and lse.shape == ref.lse.shape
    assert out.isfinite().all(), "the output holds NaN or Inf"
    empty = ref.lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty), (
        "lse must be -inf exactly where nothing is valid"
    )
    assert (out[empty] == 0).all(), "a query with nothing valid must answer 0"
    if out.numel() == 0 or bool(empty.all()):
        return Error(0.0, 0.0, 0.0, 0.0)
    got, want = out.double(), ref.out
    best = want.to(torch.bfloat16).double()
    error = (got - want).square().sum(-1)
    ideal = (best - want).square().sum(-1)
    rows = want.square().sum(-1) > 0
    worst = (error[rows] / ideal[rows].clamp_min(1e-60)).sqrt().max() if rows.any() else 0.0
    power = want.square().sum().clamp_min(1e-60)
    return Error(
        multiple=float((error.sum() / ideal.sum().clamp_min(1e-60)).sqrt()),
        worst_row=float(worst),
        gain=float(((got - best) * want).sum() / power),
        lse=float(((lse.double() - ref.lse).abs() / (10 + ref.lse.abs()))[~empty].max()),
    )


def assert_exact_but_for_rounding(out: torch.Tensor, lse: torch.Tensor, ref: Reference) -> None:
    """float32 arithmetic and one rounding to bf16: within 1.001 of the ideal error.

    Beside the ideal 1.66e-3, 1.001 leaves sqrt(1.001^2 - 1) * 1.66e-3 = 7.4e-5 for everything
    else. A logit of size L, summed in float32 over 576 products, is off by about
    sqrt(576) * 2^-24 * L / sqrt(3) = 8e-7 L, and so are the weights: 2e-5 at the L < 30 of these
    calls. A single row may use up more of that than all of them: 1.01. The gain is an average of
    the same errors, and the logsumexp has the error of the largest logit: 2e-6 of it.
    """
    error = compare(out, lse, ref)
    assert error.multiple <= 1.001, error
    assert error.worst_row <= 1.01, error
    assert abs(error.gain) <= 2e-5, error
    assert error.lse <= 2e-6, error


def assert_weights_rounded_to_bf16(out: torch.Tensor, lse: torch.Tensor, ref: Reference) -> None:
    """A tensor-core kernel: weights are rounded to bf16 once and the output is, 1.7x ideal.

    Independent errors of rms 1.66e-3 in the weights become condition * 1.66e-3 of a row, beside
    the output's own: ideal * sqrt(1 + condition^2), and 1.2 for what is left; 1.7 where no values
    cancel. Repeated tokens err alike and are taken for independent here: use few. A row may be
    three times as far off: 2^-8 is 2.4 rms, if few weights matter. The gain is the part of the
    same errors along the output, independent between rows: 4 sigma.
    """
    error = compare(out, lse, ref)
    power = ref.out.square().sum(-1)
    if not power.sum() > 0:
        return
    ideal = (ref.out.to(torch.bfloat16).double() - ref.out).square().sum(-1)
    weights = (BF16_RMS * ref.condition).square() * power
    per_row = (out.double() - ref.out).square().sum(-1)
    assert per_row.sum() <= 1.2**2 * (ideal + weights).sum(), error
    assert (per_row <= 9 * (ideal + weights)).all(), error
    sigma = ((BF16_RMS * ref.condition * power).square().sum().sqrt() / power.sum()).item()
    assert abs(error.gain) <= 4 * sigma + 1e-5, (error, sigma)
    assert error.lse <= 2e-6, error
