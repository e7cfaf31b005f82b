"""The bonus slot: what is added to the advantage, whatever it is computed from."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vdr_cli.config.sections.base import Positive, Section

SOURCES = ("disagreement", "none")
"""Values of bonus.source, beside file.py:function."""

Shape = Literal["additive", "plain", "reward", "multiplicative", "quality"]


class BonusConfig(Section):
    """The bonus (docs/exploration.md). The source gives a number per completion or token; the rest is the same for all
    sources."""

    source: str = "disagreement"
    """What the bonus is computed from: disagreement of dropout members, or none (plain GRPO)."""
    weight: float | None = None
    """Weight of the bonus at the first step: λ (additive, plain, reward) or β (multiplicative, quality). Negative turns
    the bonus into a penalty. None: 0.1."""
    shape: Shape | None = None
    """How the bonus enters the advantage; formulas in docs/exploration.md. None: additive."""
    scale: Literal["running", "initial", "none"] = "running"
    """What the additive shape divides by: the running RMS of the within-group deviation, its RMS over the first
    scale_steps steps (so that the bonus fades as the source falls), or nothing."""
    scale_steps: Positive = 20
    """Steps that the RMS of scale initial is taken over."""
    gate: Literal["all", "incorrect", "correct", "some_correct", "zero_variance"] = "all"
    """Which completions get a bonus: all, the unsolved, the solved, those of groups with a solved completion, or those
    of groups whose task rewards are all equal."""
    schedule: Literal["constant", "linear", "cosine", "staircase"] = "constant"
    """How the weight falls from `weight` to 0; constant: it does not."""
    schedule_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which the weight is 0 (not with constant)."""
    clip: Annotated[float, Field(gt=0)] = 3.0
    """c: bound on the size of the bonus before its weight (in units of the scale)."""
    permute: Literal["none", "group"] = "none"
    """group: a placebo, the source's numbers shuffled among the completions of each group."""

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        if source in SOURCES:
            return source
        near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the sources are {', '.join(SOURCES)}"
        raise ValueError(f"is {source!r}, which is no source; {hint}")

    @property
    def effective_weight(self) -> float:
        """`weight`, or what None means with this source."""
        return 0.1 if self.weight is None else self.weight

    @property
    def effective_shape(self) -> Shape:
        """`shape`, or what None means with this source."""
        return self.shape or "additive"
