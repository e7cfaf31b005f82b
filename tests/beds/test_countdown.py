"""The embedded task: the parser against Python's own arithmetic, the reward, the two splits."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_cli.beds import countdown
from vdr_cli.beds.countdown import Problem, evaluate, is_solution

NUMBERS = st.lists(st.integers(0, 9999), min_size=1, max_size=5)


@given(NUMBERS, st.data())
def test_value_equals_python(numbers, data):
    signs = [data.draw(st.sampled_from("+-*")) for _ in numbers[1:]]
    text = "".join(f"{number}{sign}" for number, sign in zip(numbers, [*signs, ""], strict=True))
    assert evaluate(text) == (numbers, eval(text))


@given(st.text(alphabet="0123456789+-*/() .e_", max_size=12))
def test_what_is_read_is_arithmetic(text):
    found = evaluate(text)
    if found is not None:
        assert set(text) <= set("0123456789+-* ")
        terms = [int(part) for part in text.replace(" ", "").replace("+", "*").replace("-", "*").split("*")]
        assert found[0] == terms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3+",
        "+3",
        "-3",
        "3--5",
        "3**5",
        "3//5",
        "(3+5)",
        "3.0",
        "3e5",
        "0x3",
        "٣+4",
        "__import__('os')",
        "9" * 10000,
        "1" + "+1" * 100,
        "3\n+5",
        "3=3",
    ],
)
def test_what_is_not_an_expression(text):
    assert evaluate(text) is None


def test_precedence():
    assert evaluate("2+3*4-5") == ([2, 3, 4, 5], 9)
    assert evaluate("9-3-2") == ([9, 3, 2], 4)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3*5+7", True),
        ("7+5*3", True),
        ("3 * 5 + 7", True),
        ("5*3+7=22", False),
        ("15+7", False),
        ("3*5+7+0", False),
        ("3*7+1", False),
        ("3*5*7", False),
        ("22", False),
    ],
)
def test_each_number_exactly_once(text, right):
    assert is_solution(text, [3, 5, 7], 22) is right


def test_reward_reads_strings_and_messages():
    message = [{"role": "assistant", "content": "3*5+7"}]
    rewards = countdown.countdown(["3*5+7", "3+5+7", message], numbers=[[3, 5, 7]] * 3, target=[22] * 3, other=[0] * 3)
    assert rewards == [1.0, 0.0, 1.0]


def test_expressions_are_all_ways_to_combine():
    assert len(countdown.expressions((3, 5, 7))) == 6 * 9
    assert len(countdown.expressions((3, 3, 7))) == 3 * 9
    assert all(sorted(evaluate(text)[0]) == [3, 3, 7] for text in countdown.expressions((3, 3, 7)))


def test_solutions_solve():
    for problem, answers in countdown.solutions().items():
        assert answers
        assert all(is_solution(answer, problem.numbers, problem.target) for answer in answers)


def test_splits_are_disjoint_as_problems():
    problems = {
        split: {Problem(tuple(sorted(row["numbers"])), row["target"]) for row in countdown.rows(split)}
        for split in ("train", "test")
    }
    assert not problems["train"] & problems["test"]
    assert problems["train"] | problems["test"] == set(countdown.solutions())
    assert len(problems["test"]) == countdown.HELD_OUT == len(countdown.rows("test"))


def test_rows_say_what_the_prompt_says():
    for row in itertools.chain(countdown.rows("train"), countdown.rows("test")):
        assert row["prompt"] == f"{' '.join(map(str, row['numbers']))}={row['target']}:"
        assert 0 <= row["target"] <= 99
        assert all(1 <= number <= 9 for number in row["numbers"])


def test_rows_are_the_same_everywhere():
    assert [row["prompt"] for row in countdown.rows("test")[:3]] == ["6 4 3=1:", "1 1 1=3:", "2 8 5=11:"]
    assert countdown.rows("train") == countdown.rows("train")


def test_unknown_split():
    with pytest.raises(KeyError):
        countdown.rows("validation")
