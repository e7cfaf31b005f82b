"""Routes: enumeration against powers of the adjacency matrix and brute force, the verifier, the splits."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_cli.beds import routes
from vdr_cli.beds.routes import Problem, is_route

SPLITS = ("train", "test")
SQUARE = Problem(("ab", "ac", "bd", "cd"), "a", "d")


def every_sequence(problem):
    """Every sequence of different nodes from start to goal whose neighbours are streets, by trying all of them."""
    between = [node for node in routes.NODES if node not in (problem.start, problem.goal)]
    for length in range(len(between) + 1):
        for middle in itertools.permutations(between, length):
            text = "".join((problem.start, *middle, problem.goal))
            if all(first + second in problem.streets for first, second in itertools.pairwise(text)):
                yield text


def walks(problem):
    """The number of walks from start to goal: entries of the adjacency matrix's powers, summed."""
    index = {node: place for place, node in enumerate(routes.NODES)}
    adjacency = np.zeros((len(index), len(index)), int)
    for first, second in problem.streets:
        adjacency[index[first], index[second]] = 1
    assert not np.linalg.matrix_power(adjacency, len(index)).any(), "a graph without cycles"
    total = sum(np.linalg.matrix_power(adjacency, length) for length in range(len(index)))
    return int(total[index[problem.start], index[problem.goal]])


def test_routes_are_all_that_brute_force_finds():
    for problem in routes.problems("test")[:40]:
        assert sorted(every_sequence(problem)) == list(routes.answers(problem))


@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_has_as_many_routes_as_promised(split):
    for problem in routes.problems(split):
        found = routes.answers(problem)
        assert len(found) == len(set(found)) == walks(problem)
        assert 4 <= len(found) <= 64
        assert all(is_route(answer, problem) for answer in found)
        assert len(problem.streets) <= routes.MOST_STREETS


def test_most_problems_have_dead_ends():
    """A walk that looks at nothing but the next street fails somewhere."""

    def fails(problem):
        return any(
            node != problem.goal and not any(street[0] == node for street in problem.streets)
            for node in {street[1] for street in problem.streets}
        )

    posed = routes.problems("test")
    assert np.mean([fails(problem) for problem in posed]) > 0.5


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("abd", True),
        ("acd", True),
        ("ad", False),
        ("abcd", False),
        ("ab", False),
        ("bd", False),
        ("abd\n", False),
        ("ABD", False),
        ("a", False),
        ("", False),
        ("abdbd", False),
        ("abd" * 9999, False),
        ("а" + "bd", False),  # Cyrillic
        ("abd:", False),
        ("__import__('os')", False),
    ],
)
def test_what_is_a_route(text, right):
    assert is_route(text, SQUARE) is right


def test_a_node_is_visited_once_though_a_street_leads_back():
    circle = Problem(("ab", "ba", "bc"), "a", "c")
    assert is_route("abc", circle)
    assert not is_route("ababc", circle)
    assert routes.answers(circle) == ("abc",)


@given(st.text(alphabet="abcd :\n", max_size=6))
def test_only_enumerated_texts_are_routes(text):
    assert is_route(text, SQUARE) == (text in ("abd", "acd"))


def test_reward_reads_strings_messages_and_columns_of_either_kind():
    message = [{"role": "assistant", "content": "abd"}]
    columns = {
        "streets": ["ab ac bd cd", ["cd", "bd", "ac", "ab"], "ab ac bd cd"],
        "start": ["a"] * 3,
        "goal": ["d"] * 3,
    }
    assert routes.routes(["a b d", "ad", message], **columns, other=[0] * 3) == [1.0, 0.0, 1.0]
    assert routes.known_classes(**columns) == [2, 2, 2]


def test_the_class_is_the_route():
    assert routes.solution_class(["abd", "a bd", "abd!", [{"role": "assistant", "content": "acd"}]]) == [
        "abd",
        "abd",
        None,
        "acd",
    ]


def test_splits_are_disjoint_as_problems():
    train, test = ([routes.problem_of(row) for row in routes.rows(split)] for split in SPLITS)
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) == routes.TRAIN
    assert len(set(test)) == len(test) == routes.HELD_OUT


@pytest.mark.parametrize("split", SPLITS)
def test_rows_say_what_the_prompt_says(split):
    for row, problem in zip(routes.rows(split), routes.problems(split), strict=True):
        assert row["prompt"] == f"{row['streets']} {row['start']}{row['goal']}:"
        assert sorted(row["streets"].split()) == list(problem.streets)
        assert (row["start"], row["goal"]) == (problem.start, problem.goal)


def test_streets_are_listed_in_an_order_that_tells_nothing():
    """Neither sorted nor along the graph: the first street listed starts at the start no more often than any."""
    rows = routes.rows("train")
    at_start = np.mean([row["streets"][0] == row["start"] for row in rows])
    share = np.mean([np.mean([street[0] == row["start"] for street in row["streets"].split()]) for row in rows])
    assert abs(at_start - share) < 0.05
    assert sum(row["streets"] == " ".join(sorted(row["streets"].split())) for row in rows) == 0


def test_rows_are_the_same_everywhere():
    assert [row["prompt"] for row in routes.rows("test")[:2]] == [
        "ca he dg hb fe dh fc gc df ce ga da hf be de da:",
        "da db ea dg ga fb gh ab hb fh ha fe de ec gb fc db:",
    ]
    assert random.Random(5).random() == 0.6229016948897019, "the generator that the graphs are drawn with"


def test_unknown_split():
    with pytest.raises(KeyError):
        routes.rows("validation")
