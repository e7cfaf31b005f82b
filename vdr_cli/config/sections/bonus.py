"""The bonus slot: what is added to the advantage, whatever it is computed from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from vdr_cli.config.sections.base import Positive, Section
from vdr_cli.system.text import did_you_mean

SOURCES = ("disagreement", "surprisal", "entropy", "counts", "novelty", "unlikeliness", "value_heads", "noise", "none")
"""Values of bonus.source, beside file.py:function."""

Shape = Literal["additive", "plain", "reward", "multiplicative", "quality"]

OWN: dict[str, tuple[Shape, float]] = {"entropy": ("plain", 1.0), "unlikeliness": ("reward", 1.0)}
"""Shape and weight of sources that their authors add as they are; the others: additive, 0.1."""


class SurprisalConfig(Section):
    """Source surprisal (CDE)."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Multiplier of the mean surprisal (nats per token), applied before the cap."""
    kappa: Annotated[float, Field(gt=0)] | None = None
    """CDE's cap: the bonus is at most |r|/kappa, where r is the task reward. The authors use 3 with rewards of -1 and
    1. With a reward of 0 the cap is 0, so there is no bonus. None: no cap."""


class EntropyConfig(Section):
    """Source entropy."""

    alpha: Annotated[float, Field(ge=0)] = 0.4
    """Multiplier of the entropy (nats), applied before the cap. The default is the authors' value."""
    kappa: Annotated[float, Field(gt=0)] | None = 2.0
    """Cap: the bonus is at most |A|/kappa, where A is the task advantage. The default is the authors' value. None: no
    cap."""


class CountsConfig(Section):
    """Source counts."""

    kind: Literal["ucb", "batch"] = "ucb"
    """ucb: 1/sqrt(N) - b0, where N is how often this answer was given to this prompt so far in the run. batch: minus
    the number of other completions in the group with the same answer, divided by the group size."""
    b0: float = 0.5
    """Baseline that ucb subtracts. The default is the authors' value."""


class NoveltyConfig(Section):
    """Source novelty."""

    dim: Positive = 32
    """d, the number of dimensions that hidden states are projected to. The default is the authors' value for GSM8K and
    MATH."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """λ, added to the diagonal of the group's covariance. The default is the authors' value."""


class ValueHeadsConfig(Section):
    """Source value_heads."""

    heads: Annotated[int, Field(ge=2)] = 8
    """K, the number of linear heads that predict the task reward."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the completions that each head is trained on."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Adam learning rate of the heads, which take one step per rollout."""


class UnlikelinessConfig(Section):
    """Source unlikeliness."""

    beta: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of its reward that the likeliest correct completion of a large group loses. The default is the authors'
    value."""


class BonusConfig(Section):
    """The bonus (docs/exploration.md). The source gives one number per completion or token; all later steps are the
    same for every source."""

    source: Annotated[str, Field(examples=list(SOURCES))] = "disagreement"
    """Source of the bonus: disagreement, surprisal, entropy, counts, novelty, unlikeliness, value_heads,
    noise, none (plain GRPO), or a function of your own, file.py:function. docs/exploration.md describes them."""
    weight: float | None = None
    """Weight of the bonus at the first step: λ (additive, plain, reward) or β (multiplicative, quality). Negative turns
    the bonus into a penalty. None: 0.1, except 1 for entropy and unlikeliness."""
    shape: Shape | None = None
    """Form in which the bonus enters the advantage; docs/exploration.md has the formulas. None: additive, except plain
    for entropy and reward for unlikeliness."""
    scale: Literal["running", "initial", "none"] = "running"
    """Divisor of the additive shape. running: the running RMS of the deviation from the group mean. initial: its
    RMS over the first scale_steps steps, so that the bonus fades as the source's values shrink. none: no division."""
    scale_steps: Positive = 20
    """With scale initial, the number of steps over which the RMS is taken."""
    gate: Literal["all", "not_failed", "some_correct", "correct", "incorrect", "zero_variance"] = "not_failed"
    """Completions that get a bonus. all: every completion; not_failed: all but those of failed groups, where task
    rewards are all equal and none is solved, so that nothing opposes the bonus; some_correct: those in groups with at
    least one solved completion; correct: the solved ones; incorrect: the unsolved ones; zero_variance: those in groups
    whose task rewards are all equal."""
    schedule: Literal["constant", "linear", "cosine", "staircase"] = "constant"
    """Decay of the weight from `weight` to 0; constant: none."""
    schedule_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the run after which the weight is 0 (no effect with constant)."""
    clip: Annotated[float, Field(gt=0)] = 3.0
    """c, the bound on the absolute value of the bonus before it is weighted, in units of the scale."""
    permute: Literal["none", "group"] = "none"
    """group: a placebo that shuffles the source's numbers among the completions of each group."""

    answer: str | None = None
    """For source counts, a function file.py:function that is called like a reward function and returns each
    completion's answer as text. None: the solution class, if a reward function defines one, otherwise the completion's
    text."""
    surprisal: SurprisalConfig = SurprisalConfig()
    entropy: EntropyConfig = EntropyConfig()
    counts: CountsConfig = CountsConfig()
    novelty: NoveltyConfig = NoveltyConfig()
    unlikeliness: UnlikelinessConfig = UnlikelinessConfig()
    value_heads: ValueHeadsConfig = ValueHeadsConfig()

    @field_validator("answer")
    @classmethod
    def _a_function(cls, answer: str | None) -> str | None:
        if answer is not None and ":" not in answer:
            raise ValueError(f"is {answer!r}; give file.py:function or module:function")
        return answer

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        if source in SOURCES or ":" in source:
            return source
        hint = did_you_mean(source, SOURCES, f"the sources are {', '.join(SOURCES)}, or file.py:function")
        raise ValueError(f"is {source!r}, which is not a source; {hint}")

    @property
    def effective_weight(self) -> float:
        """`weight`, or what None means with this source."""
        return OWN.get(self.source, ("", 0.1))[1] if self.weight is None else self.weight

    @property
    def effective_shape(self) -> Shape:
        """`shape`, or what None means with this source."""
        return self.shape or OWN.get(self.source, ("additive", 0.0))[0]
