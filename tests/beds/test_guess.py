"""The embedded game: its rules, its rows, and a model that plays by the rules and badly."""

import math

import pytest

from vdr_cli.beds.guess import GUESSES, NEARLY, WIDTH, Guess, problems, rows
from vdr_cli.config import Config, DataConfig
from vdr_cli.environments.contract import load_contract
from vdr_cli.evaluation.evaluate import run_eval
from vdr_cli.evaluation.request import EvalRequest


def play(secret, choose, low=1):
    """The answers of one game. choose: the next guess from the first and last number that are left."""
    game, first, last, answers = Guess(), low, low + WIDTH - 1, []
    game.reset(secret=secret, low=low)
    while not answers or answers[-1] not in ("found", "over"):
        number = choose(first, last)
        answers.append(game.guess(number))
        first, last = (number + 1, last) if answers[-1] == "higher" else (first, number - 1)
    return game, answers


@pytest.mark.parametrize("low", [1, 17])
def test_halving_finds_every_number_and_counting_does_not(low):
    games = [play(secret, lambda first, last: (first + last) // 2, low)[0] for secret in range(low, low + WIDTH)]
    assert all(game.get_reward() == 1.0 for game in games)
    assert math.ceil(math.log2(WIDTH + 1)) == GUESSES == max(len(game.guesses) for game in games)
    counted = [play(secret, lambda first, last: first, low)[0] for secret in range(low, low + WIDTH)]
    assert sum(game.get_reward() == 1.0 for game in counted) == GUESSES
    assert [game.left for game in counted] == [1] * GUESSES + [WIDTH - GUESSES] * (WIDTH - GUESSES)
    assert max(game.get_reward() for game in counted[GUESSES:]) == NEARLY * (1 - math.log(11) / math.log(15))


def test_answers():
    game, answers = play(9, lambda first, last: first)
    assert answers == ["higher"] * 3 + ["over"] and game.get_reward() < NEARLY and game.guess(9) == "over"
    game.reset(secret=9, low=1)
    assert game.get_reward() == 0.0 and game.guess(99) == "lower" and game.left == 15
    assert [game.guess(number) for number in (10, 8, 3)] == ["lower", "higher", "over"]
    assert game.left == 1 and game.get_reward() == NEARLY
    game.reset(secret=9)
    assert [game.guess(12), game.guess(9), game.guess(9)] == ["lower", "found", "over"] and game.get_reward() == 1.0


def test_held_out_problems_are_no_training_problems():
    train, test = problems("train"), problems("test")
    assert len({*train, *test}) == len(train) + len(test) == 17 * WIDTH and len(test) == 40
    assert all(low <= secret < low + WIDTH for low, secret in (*train, *test))
    assert rows("test")[0]["prompt"][0]["role"] == "user"
    with pytest.raises(KeyError):
        rows("validation")


def test_the_class_is_an_environment_with_one_tool_and_its_own_reward():
    contract = load_contract("vdr_cli.beds.guess:Guess", [])
    assert [tool.name for tool in contract.tools] == ["guess"] and contract.reward.name == "Guess"
    (schema,) = contract.schemas
    assert schema["function"]["parameters"]["properties"]["number"]["type"] == "integer"


def test_the_starting_model_plays_by_the_rules_and_loses_most_games():
    config = Config.model_validate({"model": {"name": "guess"}})
    request = EvalRequest(("guess",), DataConfig(name="guess"), rollout=config.rollout, prompts=32, samples=4)
    (result,) = run_eval(request)
    metrics = result.metrics()
    assert 0.2 < metrics["pass@1"] < 0.4
    assert max(metrics["unreadable_calls"], metrics["truncated_share"]) < 0.05
    assert metrics["tool_failures"] == metrics["cut_in_call"] == 0.0 and 3.0 < metrics["tool_calls"] <= GUESSES
