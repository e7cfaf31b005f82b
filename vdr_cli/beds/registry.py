"""The beds by name: where each one's rows, reward, model, settings and right answers are. No torch import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vdr_cli.beds import countdown, guess, routes
from vdr_cli.beds.gym import is_suite

_SHIPPED = Path(__file__).resolve().parent / "shipped"
SPLITS = ("train", "test")
DEFAULT = "starter"


@dataclass(frozen=True)
class Bed:
    """A task with a small pretrained model, both found under one name: `--model NAME --data NAME`."""

    name: str
    about: str
    """The task in a few words."""
    reward: str | None
    """Built-in reward function of the rows; it also knows their solution classes. None: the environment's own."""
    rows: Callable[[str], list[dict[str, Any]]]
    """Dataset rows of a split, each with its `prompt`. KeyError on an unknown split."""
    answers: Callable[[dict[str, Any]], tuple[str, ...]] | None
    """Every right completion of a row, enumerated; None: it is a game of several turns."""

    @property
    def model_path(self) -> Path:
        """The pretrained model and its tokenizer, in Hugging Face format."""
        return _SHIPPED / self.name / "model"

    @property
    def recipe_path(self) -> Path:
        """The settings that suit the bed, as config sections."""
        return _SHIPPED / self.name / "recipe.yaml"

    def recipe(self) -> dict[str, Any]:
        """The recipe's sections; they replace schema defaults when model.name is this bed's."""
        loaded: dict[str, Any] = yaml.safe_load(self.recipe_path.read_text(encoding="utf-8"))
        return loaded


def _countdown(name: str, about: str, count: int) -> Bed:
    return Bed(
        name,
        about,
        reward="countdown",
        rows=partial(countdown.rows, count),
        answers=lambda row: countdown.answers(countdown.problem_of(row)),
    )


BEDS = {
    bed.name: bed
    for bed in (
        _countdown("starter", "Countdown with three numbers", 3),
        _countdown("countdown4", "Countdown with four numbers, sparse", 4),
        Bed(
            "routes",
            "routes through a small graph, all of them known",
            reward="routes",
            rows=routes.rows,
            answers=lambda row: routes.answers(routes.problem_of(row)),
        ),
        Bed("guess", "a hidden number in four guesses, a game of several turns", None, guess.rows, None),
    )
}


def reward_of(data: str) -> str | None:
    """The built-in reward function that data of this name bring; None: they bring none."""
    if is_suite(data):
        return "reasoning_gym"
    return BEDS[data].reward if data in BEDS else None


def with_answers() -> list[Bed]:
    """The beds whose right completions can be enumerated."""
    return [bed for bed in BEDS.values() if bed.answers is not None]
