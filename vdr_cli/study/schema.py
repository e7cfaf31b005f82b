"""The keys of a study file, with their units, defaults and reasons."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from vdr_cli.config.paths import PathText
from vdr_cli.config.sections.base import Positive, Section

Settings = dict[str, Any]
"""Settings of a run, as in its configuration file: nested sections, or dotted keys (`train.learning_rate: 1e-4`)."""


def _some(seeds: list[int]) -> list[int]:
    if not seeds:
        raise ValueError("give at least one seed")
    return seeds


def _two(pair: Any) -> Any:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError("give two arms, such as [bald, permuted]")
    return pair


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seeds = Annotated[list[Seed], AfterValidator(_some)]
Pair = Annotated[tuple[str, str], BeforeValidator(_two)]
MOST_K = 256
"""The area under pass@k ends here, or at evaluation.samples."""


class Budget(Section):
    """The end of every run: exactly one of the three."""

    steps: Positive | None = None
    """Optimizer steps."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of training steps, evaluations and start-up not counted."""
    sampled_tokens: Positive | None = None
    """Completion tokens sampled for training, over all ranks."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.steps, self.seconds, self.sampled_tokens)) != 1:
            raise ValueError("give exactly one of steps, seconds and sampled_tokens")
        return self


class Evaluation(Section):
    """The measurement of every run's last checkpoint."""

    prompts: Positive | None = 256
    """The first this many held-out prompts; None: all."""
    samples: Positive = 256
    """Completions per prompt."""
    start_samples: Positive = 1024
    """Completions per prompt of the starting model: what it solves in none of them counts as new when a run does."""
    seed: Seed = 0
    """Seed of the samples; the same for every run."""


class Tuning(Section):
    """Settings tried for each arm, on seeds that the result does not use."""

    seeds: Seeds
    """Seeds of the trials."""
    trials: dict[str, list[Settings]]
    """Arm to the settings tried, the same number for every arm. The one with the best mean endpoint is taken, on each
    bed its own."""


class StudyFile(Section):
    """A study."""

    output: PathText
    """Directory of the runs and the results."""
    base: Settings = {}
    """Settings of every run."""
    beds: dict[str, Settings] = {"starter": {}}
    """Name to what the bed changes: model, data, rewards."""
    arms: dict[str, Settings]
    """Name to what the arm changes."""
    control: str
    """The arm that the others are compared with."""
    seeds: Seeds = list(range(20))
    """A list, or how many: 20 is 0 to 19. Every arm runs with every seed: same prompts, same random numbers."""
    budget: Budget
    """The end of every run."""
    tuning: Tuning | None = None
    """None: every arm runs with the settings given."""
    endpoint: str = "pass@64"
    """The number that decides, after the last step."""
    secondary: list[str] = ["pass@1", "area", "classes", "new_problems", "first_success"]
    """Further numbers, described with intervals and not tested."""
    contrasts: list[Pair] = []
    """Pairs of arms, such as a bonus and its placebo: the first minus the second, by the endpoint, described with
    intervals and not tested."""
    equivalence: Annotated[float, Field(gt=0)] = 0.02
    """Differences of the endpoint below this do not matter: an arm whose 90 % interval lies within is equivalent."""
    evaluation: Evaluation = Evaluation()
    """The measurement of every run's last checkpoint."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        """A number of seeds is 0, 1, 2, ..."""
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_count and not isinstance(value, list):
            raise ValueError("give how many, or a list such as [0, 1, 2]")
        return list(range(value)) if is_count else value
