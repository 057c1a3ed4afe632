"""The generated problems: right, learnable, held out, and tokenised without loss."""

from __future__ import annotations

import re
import zlib
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_mla.evals.problems import (
    SHOTS,
    TEMPLATES,
    TEST_SIZE,
    Problem,
    fewshot,
    held_out,
    problems,
    prompt_of,
    read_answer,
    shown,
)
from sparse_mla.evals.problems.draw import LARGEST, Template, draw
from sparse_mla.evals.problems.sets import is_held_out
from sparse_mla.evals.problems.vocabulary import decode, encode, end_id, vocabulary

STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def drawn() -> list[Problem]:
    return list(islice(problems(7), 3000))


def test_there_are_enough_templates():
    assert len(TEMPLATES) >= 40
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)


def test_every_template_is_drawn(drawn):
    assert {problem.template for problem in drawn} == {template.name for template in TEMPLATES}


def test_every_step_is_right(drawn):
    for problem in drawn:
        lines = problem.answer.splitlines()
        steps = [STEP.search(line) for line in lines[:-1]]
        assert 2 <= len(steps) <= 4
        known = set(re.findall(r"\d+", problem.question))
        for found in steps:
            left, operator, right, result, shown_result = found.groups()
            assert result == shown_result
            assert 1 <= int(result) <= LARGEST
            if operator == "/":
                assert int(left) == int(right) * int(result)
            else:
                assert eval(f"{left}{operator}{right}") == int(result)
            assert left in known or operator == "*" or left == "200"
            known.add(result)
        assert lines[-1] == f"#### {steps[-1].group(4)}"
        assert problem.target == steps[-1].group(4)


def test_nothing_is_left_unfilled(drawn):
    assert not any(re.search(r"[{}\[\]]", shown(problem)) for problem in drawn)


def test_held_out_problems_are_all_different_and_never_drawn_for_training(drawn):
    asked = held_out()
    assert len(asked) == TEST_SIZE == len({problem.question for problem in asked})
    assert all(is_held_out(problem.question) for problem in asked)
    assert not any(is_held_out(problem.question) for problem in drawn)
    assert not any(is_held_out(problem.question) for problem in fewshot())


def test_held_out_problems_do_not_change():
    # A trained model's accuracy is told of exactly these.
    texts = "".join(shown(problem) for problem in held_out())
    assert zlib.crc32(texts.encode()) == 646_054_809


def test_the_same_seed_draws_the_same():
    assert list(islice(problems(3), 20)) == list(islice(problems(3), 20))
    assert list(islice(problems(3), 20)) != list(islice(problems(4), 20))


def test_only_the_wanted_templates():
    some = islice(problems(0, templates=("age_future",)), 10)
    assert {problem.template for problem in some} == {"age_future"}
    with pytest.raises(ValueError, match="none of them exists"):
        next(problems(0, templates=("no_such",)))


def test_prompts_are_longer_than_the_selection():
    lengths = [len(encode(prompt_of(fewshot(), p.question))) for p in held_out(50)]
    assert len(fewshot()) == SHOTS
    assert min(lengths) >= 512
    assert max(lengths) + 128 <= 768 + 32


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a\n#### 12", "12"),
        ("#### 1,234\n\nQuestion", "1234"),
        ("#### -3.5", "-3.5"),
        ("#### 1\n#### 2", "1"),
        ("####", None),
        ("12", None),
    ],
)
def test_read_answer(text, number):
    assert read_answer(text) == number


def test_a_problem_without_a_number_has_no_target():
    with pytest.raises(ValueError, match="no line '#### number'"):
        _ = Problem("q", "a").target


def test_a_malformed_draw_names_its_template():
    with pytest.raises(ValueError, match="in template bad"):
        draw(Template("bad", ("a is 3",), "{a}", ()), {}, None)


def test_problems_are_whole_words_and_digits(drawn):
    known = vocabulary()
    for problem in drawn[:200]:
        ids = encode(shown(problem))
        assert decode(ids) == shown(problem)
        assert len(ids) < 160
        assert ids[-1] == end_id()
    assert all(len(encode(f" {word}")) == 1 for word in ("muffins", "earns", "twice"))
    assert encode("407") == [known[digit] for digit in "407"]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n")))
def test_any_ascii_text_survives(text):
    assert decode(encode(text)) == text


def test_ids_past_the_vocabulary_are_left_out():
    assert decode([*encode("a"), 10_000]) == "a"
