"""Cases about what is read: masks, lengths, duplicates, and every shape of a call."""

from __future__ import annotations

from .case import Case
from .case_drawn import both, drawn


def _masks() -> list[Case]:
    nan = ("masked_slot_nan",)
    cases: list[Case] = []
    for holes, about, shows in (
        (
            "front",
            "-1 in the first 3/8 of every list",
            ("first_chunk_nan", "masked_chunk_counts", *nan),
        ),
        ("middle", "-1 in the middle half of every list", ("masked_chunk_counts", *nan)),
        ("random", "-1 in 40 % of the places", nan),
        (
            "chunk",
            "a whole 64-entry chunk of -1, the first or the second",
            ("first_chunk_nan", "masked_chunk_counts", *nan),
        ),
        ("most", "one entry in 50 is valid", ("first_chunk_nan", "masked_chunk_counts", *nan)),
        (
            "large",
            "INT_MAX, size, size + 1, size + 64 and 2^30 among valid indices",
            ("index_too_large_loaded",),
        ),
        (
            "negative",
            "INT_MIN, -2, -64, -size and -2^30 among valid indices",
            ("index_negative_loaded",),
        ),
        (
            "some_rows_empty",
            "every other row has nothing valid",
            ("empty_row_nan", "empty_row_poisons_batch", "empty_row_lse"),
        ),
        ("all_rows_empty", "no row has anything valid", ("empty_row_nan", "empty_row_lse")),
    ):
        quick = holes in ("chunk", "large", "some_rows_empty")
        cases += both(
            f"holes/{holes}", about, shows, holes=holes, topk=192, quick=quick, page_size=61
        )
    lengths = ("topk_length_ignored", "topk_length_one_short", *nan)
    cases += both(
        "lengths/short",
        "entries past topk_length name NaN rows",
        lengths,
        topk=192,
        lengths=(17, 192, 64, 100),
        quick=True,
    )
    cases += both(
        "lengths/zero",
        "topk_length 0, 1 and more than topk",
        ("topk_length_ignored", "empty_row_nan", "empty_row_poisons_batch", "empty_row_lse"),
        topk=128,
        lengths=(0, 128, 1, 500),
    )
    cases += both(
        "lengths/with_holes",
        "short lengths and -1 before them",
        lengths,
        topk=192,
        lengths=(70, 130, 5, 191),
        holes="random",
    )
    cases += [
        drawn(
            "decode/lengths/s_q",
            "lengths per sequence, three query tokens each",
            lengths,
            b=2,
            s_q=3,
            topk=192,
            lengths=(33, 150),
        ),
        # A kernel that resolved slots in chunks of 512 overwrote the masks of tiles not yet read
        # where a list ended up to 128 entries after a chunk; only with enough query tokens to fill
        # a GPU, since the parts of a split list are shorter.
        drawn(
            "decode/lengths/staircase",
            "lists of 72 lengths, in steps of 10, enough of them to fill a GPU unsplit",
            lengths,
            b=72,
            h=32,
            topk=720,
            lengths=tuple(range(10, 730, 10)),
        ),
        drawn(
            "decode/holes/heads_1_empty",
            "empty rows, one head",
            ("empty_row_nan",),
            h=1,
            holes="some_rows_empty",
            topk=64,
        ),
    ]
    cases += both(
        "duplicates",
        "every index occurs about four times",
        ("duplicates_dropped",),
        repeats_of=4,
        topk=256,
        quick=True,
    )
    cases.append(
        drawn(
            "decode/duplicates/one_token",
            "one token, 100 times over",
            ("duplicates_dropped",),
            repeats_of=100,
            topk=100,
        )
    )
    return cases


def _shapes() -> list[Case]:
    cases: list[Case] = []
    for h in (1, 5, 8, 20, 64, 96, 128):
        cases += both(
            f"heads/{h}",
            f"{h} query heads",
            ("heads_beyond_tail",) * (h % 8 != 0) + ("heads_leak",) * (h == 20),
            h=h,
            b=2,
            topk=96 if h > 32 else 160,
            prefill_s_q=2,
            quick=h in (5, 128),
        )
    for h in (5, 20, 96):
        cases += both(
            f"heads/{h}_strided",
            f"{h} heads of a wider q; NaN heads and columns beside",
            ("heads_beyond_tail", "head_padding_nan") * (h % 16 != 0),
            h=h,
            strided=True,
            topk=96,
            prefill_s_q=2,
            quick=h == 5,
        )
    for page_size in (1, 2, 53, 61, 256):
        cases.append(
            drawn(
                f"decode/page_size/{page_size}",
                f"{page_size} tokens per page",
                ("page_size_64",),
                page_size=page_size,
                topk=160,
                quick=page_size == 53,
            )
        )
    cases += [
        drawn(
            "decode/page_size/61/bf16",
            "61 tokens per page, bf16 cache",
            ("page_size_64",),
            layout="bf16",
            page_size=61,
            topk=160,
        ),
        drawn(
            "prefill/page_size/61/bf16",
            "prefill over pages of 61 tokens",
            ("page_size_64",),
            op="prefill",
            layout="bf16",
            page_size=61,
            topk=160,
            s_q=4,
        ),
        drawn(
            "decode/page_stride",
            "pages of a shared pool: NaN between them",
            ("packed_page_stride",),
            page_pad=4096,
            page_size=64,
            quick=True,
        ),
        drawn(
            "decode/page_stride/bf16",
            "padded page stride, bf16 cache",
            ("packed_page_stride",),
            layout="bf16",
            page_pad=1024,
            page_size=2,
            topk=160,
        ),
        drawn(
            "prefill/page_stride/bf16",
            "prefill over rows with a padded stride",
            ("packed_page_stride",),
            op="prefill",
            layout="bf16",
            page_pad=128,
            page_size=1,
            topk=160,
            s_q=4,
        ),
    ]
    for topk in (1, 63, 65, 100, 2047):
        cases += both(
            f"topk/{topk}",
            f"{topk} indices",
            ("last_block_unmasked",) * (topk > 1) + ("last_block_next_row",) * (1 < topk < 2000),
            b=1 if topk > 2000 else 2,
            h=8,
            topk=topk,
            prefill_s_q=1 if topk > 2000 else 3,
            quick=topk == 65,
        )
    cases += both(
        "topk/65_flat",
        "65 indices, flat logits: phantom entries would weigh fully",
        ("last_block_unmasked",),
        topk=65,
        logit_std=0.0,
    )
    cases += both(
        "topk/0",
        "an empty list of indices: every row is empty",
        ("empty_row_nan", "empty_row_lse"),
        topk=0,
    )
    cases += [
        drawn(
            "decode/s_q/2",
            "two query tokens, each with indices of its own",
            ("first_query_indices",),
            s_q=2,
            quick=True,
        ),
        drawn(
            "decode/s_q/3_holes",
            "three query tokens, -1 at other places in each",
            ("first_query_indices", "first_query_mask"),
            s_q=3,
            topk=128,
            holes="random",
        ),
        drawn(
            "decode/s_q/5",
            "five query tokens, h = 20",
            ("first_query_indices",),
            s_q=5,
            h=20,
            topk=128,
        ),
        drawn(
            "decode/s_q/2/bf16",
            "two query tokens, bf16 cache",
            ("first_query_indices",),
            s_q=2,
            layout="bf16",
        ),
        drawn(
            "decode/split",
            "one sequence, topk 2048: kernels split it",
            ("merge_wrong_log_base", "merge_wrong_log_base_reverse", "splits_averaged"),
            b=1,
            topk=2048,
            h=16,
            quick=True,
        ),
        drawn(
            "decode/split/short",
            "one sequence, most splits have nothing valid",
            ("empty_split_lse_zero", "merge_wrong_log_base"),
            b=2,
            topk=2048,
            h=8,
            lengths=(70, 900),
        ),
        drawn(
            "decode/split/holes",
            "one entry in 50 valid: some splits may be empty",
            ("empty_split_lse_zero", "merge_wrong_log_base"),
            b=1,
            topk=1024,
            holes="most",
        ),
        drawn(
            "decode/split/uneven",
            "large logits at some places: partial results differ",
            ("merge_wrong_log_base", "merge_wrong_log_base_reverse", "splits_averaged"),
            b=1,
            topk=1024,
            logit_std=6.0,
        ),
        drawn("decode/batch/16", "sixteen sequences: no reason to split", b=16, topk=128, h=16),
        drawn("decode/batch/0", "no sequence at all", b=0, topk=64),
        drawn(
            "prefill/tokens/0",
            "no query token at all",
            op="prefill",
            layout="bf16",
            page_size=1,
            s_q=0,
            topk=64,
        ),
        drawn(
            "decode/repeats",
            "20 times the same call, bit for bit",
            ("race",),
            b=2,
            topk=512,
            h=16,
            repeats=20,
            quick=True,
        ),
        drawn(
            "prefill/repeats",
            "20 times the same call, bit for bit",
            ("race",),
            op="prefill",
            layout="bf16",
            page_size=1,
            s_q=8,
            topk=256,
            repeats=20,
        ),
    ]
    return cases


SHAPE_CASES: tuple[Case, ...] = (*_masks(), *_shapes())
