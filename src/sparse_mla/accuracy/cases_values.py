"""Cases about numbers: distributions of tokens, scales, logits, RoPE, sinks."""

from __future__ import annotations

from .case import Case
from .case_drawn import both, drawn

SCALE_FAULTS = ("scale_pow2_down", "scale_bf16", "dequantised_bf16")
PRECISION_FAULTS = ("p_fp8", "q_fp8", "logits_bf16", "row_sum_bf16", "softmax_base2")


def _distributions() -> list[Case]:
    cases = []
    for values in ("gaussian", "heavy_tailed", "outlier_channels", "shifted", "tiny", "huge"):
        cases += both(
            values,
            f"{values.replace('_', ' ')} tokens",
            PRECISION_FAULTS * (values == "gaussian"),
            quick=values == "gaussian",
            values=values,
        )
    cases += [
        drawn(
            f"decode/{values}/bf16",
            f"{values} tokens, bf16 cache",
            layout="bf16",
            values=values,
            page_size=16,
        )
        for values in ("gaussian", "outlier_channels")
    ]
    cases += [
        drawn(
            "decode/gaussian/bf16_nope",
            "keys without a separate RoPE part",
            layout="bf16_nope",
            page_size=32,
        ),
        drawn(
            "prefill/gaussian/bf16_nope",
            "keys without a separate RoPE part",
            op="prefill",
            layout="bf16_nope",
            s_q=6,
            page_size=1,
        ),
        drawn(
            "prefill/gaussian/v32_fp8",
            "prefill straight from the FP8 cache",
            ("fp8_fnuz", "max_logits_base2"),
            op="prefill",
            s_q=6,
            quick=True,
        ),
        drawn("decode/sparse_tiles", "a third of the tiles are all zero", values="sparse_tiles"),
    ]
    return cases


def _scales() -> list[Case]:
    neighbours = ("scale_neighbour_tile", "scale_neighbour_token")
    cases = [
        drawn(
            "decode/scales/log_uniform",
            "fp32 scales with arbitrary mantissas",
            SCALE_FAULTS + neighbours,
            quick=True,
            logit_std=0.4,
            scales="log_uniform",
        ),
        drawn("decode/scales/amax", "scales as SGLang writes them, amax/448", SCALE_FAULTS),
        drawn(
            "decode/scales/pow2",
            "power-of-two scales: the input that hides scale rounding",
            scales="pow2",
            quick=True,
        ),
        drawn(
            "decode/scales/tile_magnitudes",
            "tiles of very different magnitude",
            ("scale_neighbour_tile", *SCALE_FAULTS),
            values="tile_magnitudes",
            quick=True,
        ),
        drawn(
            "decode/scales/token_magnitudes",
            "tokens of very different magnitude",
            ("scale_neighbour_token", *SCALE_FAULTS),
            values="token_magnitudes",
            logit_std=0.3,
        ),
        drawn(
            "decode/scales/wide",
            "scales from 1e-30 to 1e30",
            SCALE_FAULTS,
            scales="wide",
            rope_share=0.3,
        ),
        drawn(
            "decode/scales/zero",
            "a third of the tiles stored with scale 0, as a writer may store an all-zero tile",
            (),
            scales="some_zero",
            rope_share=0.3,
        ),
        drawn(
            "prefill/scales/log_uniform/v32_fp8",
            "arbitrary scales, prefill from FP8 cache",
            SCALE_FAULTS,
            op="prefill",
            logit_std=0.4,
            scales="log_uniform",
            s_q=6,
        ),
    ]
    for scales, about in (
        ("below_bf16_midpoint", "mantissas that bf16 rounds down, all of them, by up to 2^-8"),
        ("above_bf16_midpoint", "mantissas that bf16 rounds up, all of them, by up to 2^-8"),
        ("below_pow2", "mantissas near 2: rounded down to a power of two they halve"),
        ("above_pow2", "mantissas just above 1: rounded up to a power of two they double"),
    ):
        cases.append(
            drawn(
                f"decode/scales/{scales}",
                about,
                SCALE_FAULTS,
                scales=scales,
                logit_std=0.3,
                b=2,
                topk=1024,
                quick=scales == "below_bf16_midpoint",
            )
        )
    cases += [
        drawn(
            "decode/logits/coherent",
            "all logits near 40: a relative error in a scale moves weights by 40 times that",
            SCALE_FAULTS,
            logit_mean=40.0,
            quick=True,
        ),
        drawn(
            "decode/logits/large",
            "logits with a spread of 12: nearly one-hot rows",
            SCALE_FAULTS,
            logit_std=12.0,
        ),
        drawn(
            "decode/logits/flat",
            "q = 0: every token weighs the same",
            ("last_block_unmasked",),
            logit_std=0.0,
            topk=200,
        ),
        drawn(
            "decode/logits/nearly_flat",
            "logits with a spread of 0.05",
            ("p_rounded_before_sum", "sum_rounded"),
            logit_std=0.05,
        ),
        drawn(
            "prefill/logits/large",
            "logits with a spread of 12",
            op="prefill",
            layout="bf16",
            page_size=1,
            s_q=4,
            logit_std=12.0,
        ),
    ]
    return cases


def _rope_and_sinks() -> list[Case]:
    rope = ("rope_not_read", "rope_scaled", "rope_interleaved")
    inf = float("inf")
    cases = both(
        "rope",
        "95 % of the logits' variance comes from the RoPE part",
        ("rope_not_read", "rope_interleaved"),
        rope_share=0.95,
        logit_std=3.0,
        quick=True,
    )
    cases.append(
        drawn(
            "decode/rope/log_uniform",
            "RoPE-dominated logits, arbitrary scales",
            rope,
            rope_share=0.9,
            logit_std=3.0,
            scales="log_uniform",
            quick=True,
        )
    )
    for name, sink in (
        ("finite", (-2.0, 5.0, 0.5, 7.5)),
        ("infinite", (inf, -inf, 1.0)),
        ("large", (30.0, -30.0, 6.0)),
    ):
        cases += both(
            f"sink/{name}",
            f"attn_sink {', '.join(map(str, sink))} by head",
            ("sink_in_lse", "sink_ignored") + ("sink_base2",) * (name != "infinite"),
            sink=sink,
            quick=name == "finite",
        )
    cases += both(
        "sink/empty_rows",
        "sinks, and rows with nothing valid",
        ("empty_row_nan", "empty_row_lse", "sink_in_lse"),
        holes="some_rows_empty",
        sink=(0.0, -inf, inf, 3.0),
        topk=128,
    )
    cases += both(
        "lse", "logits around 8: the base of the logarithm shows", ("lse_base2",), logit_mean=8.0
    )
    return cases


VALUE_CASES: tuple[Case, ...] = (*_distributions(), *_scales(), *_rope_and_sinks())
