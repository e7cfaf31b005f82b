"""Countdown: the parser against Python's own arithmetic, solution classes against algebra, the reward, the splits."""

import itertools
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_cli.beds import countdown
from vdr_cli.beds.countdown import canonical, evaluate, is_solution

SPLITS = ("train", "test")
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


def labelled(expression, numbers, at):
    """The value of an expression whose numbers stand for variables, at a point: names are replaced, all at once."""
    names = {number: f"at[{index}]" for index, number in enumerate(numbers)}
    text = "".join(names[int(character)] if character.isdigit() else character for character in expression)
    return eval(text, {"at": at})


@pytest.mark.parametrize(("numbers", "expected"), [((2, 5), 4), ((3, 5, 7), 17), ((2, 3, 5, 7), 79)])
def test_classes_are_the_polynomials(numbers, expected):
    """In numbers that occur once, expressions are equal by commutation and association if equal as polynomials.

    Two polynomials of such small degree agree at random points of this size only when they are the same.
    """
    rng = random.Random(0)
    points = [[rng.randrange(10**6, 10**9) for _ in numbers] for _ in range(2)]
    by_form, by_value = {}, {}
    for expression in countdown.expressions(numbers):
        value = tuple(labelled(expression, numbers, point) for point in points)
        by_form.setdefault(canonical(expression), set()).add(expression)
        by_value.setdefault(value, set()).add(expression)
    assert sorted(map(sorted, by_form.values())) == sorted(map(sorted, by_value.values()))
    assert len(by_form) == expected


def swapped(expression):
    """Every expression that one exchange of neighbouring factors or terms leads to, by the text alone."""
    terms = expression.replace("-", "+-").split("+")  # the first has no sign
    for place in range(len(terms) - 1):
        other = [*terms[:place], terms[place + 1], terms[place], *terms[place + 2 :]]
        if not other[0].startswith("-"):
            yield "+".join(other).replace("+-", "-")
    for place, term in enumerate(terms):
        sign, factors = term[: term.startswith("-")], term.lstrip("-").split("*")
        for at in range(len(factors) - 1):
            exchanged = [*factors[:at], factors[at + 1], factors[at], *factors[at + 2 :]]
            yield "+".join([*terms[:place], sign + "*".join(exchanged), *terms[place + 1 :]]).replace("+-", "-")


@pytest.mark.parametrize("numbers", [(3, 5, 7), (1, 1, 2, 3), (2, 2, 5, 5), (4, 4, 4, 4)])
def test_classes_are_what_exchanges_reach(numbers):
    everything, seen = countdown.expressions(numbers), set()
    for start in everything:
        if start in seen:
            continue
        reached, waiting = {start}, [start]
        while waiting:
            found = set(swapped(waiting.pop())) - reached
            reached |= found
            waiting += found
        assert len({canonical(expression) for expression in reached}) == 1
        assert reached == {expression for expression in everything if canonical(expression) == canonical(start)}
        seen |= reached


@given(NUMBERS, st.data())
def test_the_canonical_form_is_one_of_its_class(numbers, data):
    signs = [data.draw(st.sampled_from("+-*")) for _ in numbers[1:]]
    text = "".join(f"{number}{sign}" for number, sign in zip(numbers, [*signs, ""], strict=True))
    if len(text) <= 64:
        form = canonical(text)
        assert canonical(form) == form
        assert evaluate(form) == (evaluate(form)[0], evaluate(text)[1])
        assert sorted(evaluate(form)[0]) == sorted(numbers)


def test_canonical_forms():
    assert canonical("5 - 2 + 4*3") == "3*4+5-2"
    assert canonical("07+1") == "1+7"
    assert canonical("9-3*2-1") == canonical("9-1-2*3") == "9-1-2*3"
    assert canonical("9-1") != canonical("1-9")
    assert canonical("(3+5)") is None


@pytest.mark.parametrize("count", [3, 4])
def test_known_classes_are_those_of_the_answers(count):
    posed = countdown.problems(count, "test")
    assert len(posed) == countdown.HELD_OUT
    for problem in posed[:64]:
        answers = countdown.answers(problem)
        assert answers
        assert all(is_solution(answer, problem.numbers, problem.target) for answer in answers)
        known = countdown.classes(problem.numbers)[problem.target]
        assert {canonical(answer) for answer in answers} == known
        assert len(known) >= countdown.LEAST_CLASSES[count]


@pytest.mark.parametrize("numbers", [(3, 5, 7), (1, 1, 2, 3), (2, 3, 5, 7)])
def test_classes_are_enumerated_without_their_expressions(numbers):
    found = {}
    for expression in countdown.expressions(numbers):
        found.setdefault(evaluate(expression)[1], set()).add(canonical(expression))
    assert countdown.classes(numbers) == found


def test_every_reachable_target_is_posed():
    for numbers in [(1, 1, 1), (3, 5, 7), (9, 9, 9)]:
        values = {evaluate(expression)[1] for expression in countdown.expressions(numbers)}
        posed = {problem.target for problem in countdown.solvable(3) if problem.numbers == numbers}
        assert posed == {value for value in values if 0 <= value <= 99}


@pytest.mark.parametrize("count", [3, 4])
def test_splits_are_disjoint_as_problems(count):
    problems = {split: [countdown.problem_of(row) for row in countdown.rows(count, split)] for split in SPLITS}
    train, test = map(set, problems.values())
    assert not train & test
    assert train | test == set(countdown.solvable(count))
    assert len(test) == countdown.HELD_OUT == len(problems["test"])


@pytest.mark.parametrize("count", [3, 4])
def test_rows_say_what_the_prompt_says(count):
    for row in itertools.chain(*(countdown.rows(count, split) for split in SPLITS)):
        assert row["prompt"] == f"{' '.join(map(str, row['numbers']))}={row['target']}:"
        assert 0 <= row["target"] <= 99
        assert len(row["numbers"]) == count
        assert all(1 <= number <= 9 for number in row["numbers"])


def test_rows_are_the_same_everywhere():
    assert [row["prompt"] for row in countdown.rows(3, "test")[:3]] == ["6 4 3=1:", "1 1 1=3:", "2 8 5=11:"]
    assert [row["prompt"] for row in countdown.rows(4, "test")[:3]] == ["1 8 6 8=57:", "7 6 1 3=4:", "1 3 2 4=6:"]
    assert countdown.rows(3, "train") == countdown.rows(3, "train")


def test_unknown_split():
    with pytest.raises(KeyError):
        countdown.rows(3, "validation")


def test_the_examples_of_the_docs_are_solutions():
    page = (Path(__file__).parents[2] / "docs" / "beds.md").read_text(encoding="utf-8")
    examples = re.findall(r"`([\d ]+)=(\d+):` `([\d+*-]+)`", page)
    assert len(examples) == 2
    for numbers, target, expression in examples:
        assert is_solution(expression, [int(number) for number in numbers.split()], int(target))
