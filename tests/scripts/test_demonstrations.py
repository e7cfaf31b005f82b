"""The beds' models are pretrained on no held-out problem, and on right answers as often as asked."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest

from vdr_cli.beds import countdown, routes
from vdr_cli.beds.registry import BEDS, with_answers

SCRIPT = Path(__file__).parents[2] / "scripts" / "build" / "demonstrations.py"
spec = importlib.util.spec_from_file_location("demonstrations", SCRIPT)
demonstrations = importlib.util.module_from_spec(spec)
sys.modules["demonstrations"] = demonstrations
spec.loader.exec_module(demonstrations)


ONE_TURN = [bed.name for bed in with_answers()]


def posed(name, prompt):
    """The problem that a prompt states."""
    if name == "routes":
        *streets, ends = prompt.removesuffix(":").split()
        return routes.Problem(tuple(sorted(streets)), *ends)
    numbers, target = re.fullmatch(r"([\d ]+)=(-?\d+):", prompt).groups()
    return countdown.Problem(tuple(sorted(map(int, numbers.split()))), int(target))


def solved(name, problem, completion):
    if name == "routes":
        return routes.is_route(completion, problem)
    return countdown.is_solution(completion, problem.numbers, problem.target)


def held_out(name):
    of = routes.problem_of if name == "routes" else countdown.problem_of
    return {of(row) for row in BEDS[name].rows("test")}


@pytest.mark.parametrize("phase", ["learn", "doubt"])
@pytest.mark.parametrize("name", ONE_TURN)
def test_no_example_poses_a_held_out_problem(name, phase):
    plan, rng = demonstrations.PRETRAINING[name], random.Random(0)
    drawn = [getattr(plan, phase)(rng, 0.5) for _ in range(3000)]
    assert not {posed(name, prompt) for prompt, _ in drawn} & held_out(name)
    assert set("".join(prompt + completion for prompt, completion in drawn)) <= set(plan.characters)


@pytest.mark.parametrize("name", ONE_TURN)
def test_the_first_phase_is_right_and_the_second_as_often_as_asked(name):
    plan, rng = demonstrations.PRETRAINING[name], random.Random(0)
    for draw, right, least, most in ((plan.learn, 1.0, 1.0, 1.0), (plan.doubt, 0.0, 0.0, 0.2), (plan.doubt, 1.0, 1, 1)):
        examples = [draw(rng, right) for _ in range(500)]
        share = sum(solved(name, posed(name, prompt), completion) for prompt, completion in examples) / 500
        assert least <= share <= most
