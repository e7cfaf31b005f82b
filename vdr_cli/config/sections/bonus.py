"""The bonus slot: what is added to the advantage, whatever it is computed from."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vdr_cli.config.sections.base import Positive, Section

SOURCES = ("disagreement", "surprisal", "entropy", "counts", "novelty", "unlikeliness", "value_heads", "noise", "none")
"""Values of bonus.source, beside file.py:function."""

Shape = Literal["additive", "plain", "reward", "multiplicative", "quality"]

OWN: dict[str, tuple[Shape, float]] = {"entropy": ("plain", 1.0), "unlikeliness": ("reward", 1.0)}
"""Shape and weight of sources that their authors add as they are; the others: additive, 0.1."""


class SurprisalConfig(Section):
    """Source surprisal (CDE)."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the mean surprisal in nats per token, before the cap."""
    kappa: Annotated[float, Field(gt=0)] | None = None
    """CDE's cap: the number is at most |r|/kappa, r the task reward. The authors use 3 with rewards of -1 and 1; a
    reward of 0 closes it. None: no cap."""


class EntropyConfig(Section):
    """Source entropy."""

    alpha: Annotated[float, Field(ge=0)] = 0.4
    """Factor of the entropy in nats, before the cap (the authors' value)."""
    kappa: Annotated[float, Field(gt=0)] | None = 2.0
    """Cap: the number is at most |A|/kappa, A the task advantage (the authors' value). None: no cap."""


class CountsConfig(Section):
    """Source counts."""

    kind: Literal["ucb", "batch"] = "ucb"
    """ucb: 1/sqrt(N) - b0, N the times that the answer was given to the prompt in this run; batch: minus the share of
    the group that gave the same answer, the completion itself left out."""
    b0: float = 0.5
    """Baseline of ucb (the authors' value)."""


class NoveltyConfig(Section):
    """Source novelty."""

    dim: Positive = 32
    """d, the dimensions that hidden states are projected to (the authors' value for GSM8K and MATH)."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """λ, added to the diagonal of the group's covariance (the authors' value)."""


class ValueHeadsConfig(Section):
    """Source value_heads."""

    heads: Annotated[int, Field(ge=2)] = 8
    """K, linear heads that predict the task reward."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the completions that each head learns from."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Adam's learning rate of the heads, one step per rollout."""


class UnlikelinessConfig(Section):
    """Source unlikeliness."""

    beta: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of its reward that the likeliest correct completion of a large group loses (the authors' value)."""


class BonusConfig(Section):
    """The bonus (docs/exploration.md). The source gives a number per completion or token; the rest is the same for all
    sources."""

    source: Annotated[str, Field(examples=list(SOURCES))] = "disagreement"
    """The bonus's source: disagreement, surprisal, entropy, counts, novelty, unlikeliness,
    value_heads, noise, none (plain GRPO), or a function of yours, file.py:function. docs/exploration.md describes
    them."""
    weight: float | None = None
    """Weight of the bonus at the first step: λ (additive, plain, reward) or β (multiplicative, quality). Negative turns
    the bonus into a penalty. None: 0.1; 1 for entropy and unlikeliness."""
    shape: Shape | None = None
    """The way the bonus enters the advantage; formulas in docs/exploration.md. None: additive; plain for entropy,
    reward for unlikeliness."""
    scale: Literal["running", "initial", "none"] = "running"
    """The divisor of the additive shape: the running RMS of the within-group deviation, its RMS over the first
    scale_steps steps (so that the bonus fades as the source falls), or nothing."""
    scale_steps: Positive = 20
    """Steps that the RMS of scale initial is taken over."""
    gate: Literal["all", "incorrect", "correct", "some_correct", "zero_variance"] = "all"
    """Completions that get a bonus: all, the unsolved, the solved, those of groups with a solved completion, or those
    of groups whose task rewards are all equal."""
    schedule: Literal["constant", "linear", "cosine", "staircase"] = "constant"
    """The weight's way from `weight` to 0; constant: it stays."""
    schedule_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which the weight is 0 (not with constant)."""
    clip: Annotated[float, Field(gt=0)] = 3.0
    """c: bound on the size of the bonus before its weight (in units of the scale)."""
    permute: Literal["none", "group"] = "none"
    """group: a placebo, the source's numbers shuffled among the completions of each group."""

    answer: str | None = None
    """A completion's answer, for source counts: file.py:function, called like a reward function, returns a text per
    completion. None: the solution class that a reward function knows, else the completion's text."""
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
        near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the sources are {', '.join(SOURCES)}, or file.py:function"
        raise ValueError(f"is {source!r}, which is no source; {hint}")

    @property
    def effective_weight(self) -> float:
        """`weight`, or what None means with this source."""
        return OWN.get(self.source, ("", 0.1))[1] if self.weight is None else self.weight

    @property
    def effective_shape(self) -> Shape:
        """`shape`, or what None means with this source."""
        return self.shape or OWN.get(self.source, ("additive", 0.0))[0]
