"""The Hopper kernel for expanded caches: its plan by shape, and how it finds a slot's page."""

from __future__ import annotations

import random

import pytest

from sparse_mla.ops.sparse_decode import sm90_expand

SHAPES = [
    (items, pairs) for items in (1, 4, 100, 131, 132, 133, 148, 256, 600) for pairs in (1, 5, 9)
]


@pytest.mark.parametrize(("items", "pairs"), SHAPES)
@pytest.mark.parametrize(
    ("num_splits", "invariant"), [(0, False), (1, False), (3, False), (0, True)]
)
def test_every_pair_is_in_one_part(
    items: int, pairs: int, num_splits: int, invariant: bool
) -> None:
    plan = sm90_expand.plan(items, pairs, 132, num_splits, invariant)
    assert 0 <= plan.whole <= items
    if plan.whole < items:
        assert (plan.splits - 1) * plan.split_pairs < pairs <= plan.splits * plan.split_pairs
        assert plan.splits > 1
    if not num_splits and not invariant and plan.whole < items:
        assert plan.whole % 132 == 0 and plan.parts(items) <= 132


def test_a_last_round_that_nearly_fills_the_machine_is_not_cut() -> None:
    assert sm90_expand.plan(256, 5, 132, 0, False).whole == 256
    assert sm90_expand.plan(148, 5, 132, 0, False) == sm90_expand.Plan(132, 5, 1)


@pytest.mark.parametrize("items", (1, 7, 132, 1000))
def test_invariant_parts_do_not_depend_on_the_batch(items: int) -> None:
    plan = sm90_expand.plan(items, 9, 132, 0, True)
    assert (plan.whole, plan.splits, plan.split_pairs) == (0, 3, 3)


@pytest.mark.parametrize("size", (1, 2, 3, 7, 53, 61, 64, 100, 255, 256, 257, 65535, 2**20 + 7))
def test_slots_are_divided_by_the_page_size_exactly(size: int) -> None:
    magic, shift = sm90_expand.division(size)
    assert -(2**31) <= magic < 2**31
    made = random.Random(size)
    slots = [made.randrange(2**31) for _ in range(500)] + [0, 2**31 - 1]
    slots += [k * size + d for k in (1, 2, 1000, 2**31 // size - 1) for d in (-1, 0, 1)]
    for slot in slots:
        if 0 <= slot < 2**31:
            assert (2 * slot * (magic % 2**32) >> 32) >> shift == slot // size
