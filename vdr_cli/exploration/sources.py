"""The sources of the bonus, by name: what each one needs of a step, and the function that makes its numbers.

A source is a pure function in a file of its own. Here it is given the step's signals and its own settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.exploration import counts, disagreement
from vdr_cli.exploration.bonus import reduce
from vdr_cli.exploration.entropy import entropy
from vdr_cli.exploration.noise import noise
from vdr_cli.exploration.novelty import novelty
from vdr_cli.exploration.surprisal import surprisal
from vdr_cli.exploration.unlikeliness import unlikeliness
from vdr_cli.exploration.value_heads import Heads, value_heads

T = TypeVar("T")

Need = Literal[
    "measure",
    "log_probs",
    "entropies",
    "answers",
    "start_states",
    "states",
    "uniforms",
    "batch",
]
"""A field of `Signals` that is computed for the sources that ask for it."""


@dataclass(frozen=True)
class Signals:
    """A rank's completions as a source sees them: B rows, groups of `group_size` contiguous ones, on the CPU.

    The fields below `task_advantages` are None unless the source's `needs` names them; visits come with answers, the
    projection with start_states, and weights with states.
    """

    group_size: int
    mask: Tensor  # (B, T) bool, the tokens that the policy sampled
    task_rewards: Tensor  # (B,), NaN where there is none
    solved: Tensor  # (B,) bool
    task_advantages: Tensor  # (B,)
    measure: Tensor | None = None
    """(B, T) or (B,) of the dropout members, nats."""
    log_probs: Tensor | None = None
    """(B, T) of the sampled tokens under the policy at the sampling temperature, nats."""
    entropies: Tensor | None = None
    """(B, T) of the policy's distributions at the sampling temperature, nats."""
    answers: Sequence[int] | None = None
    """(B,) a key per prompt and answer."""
    visits: Tensor | None = None
    """(B,) int64, times that the answer was given to the prompt in the run so far, this step included."""
    start_states: Tensor | None = None
    """(B, D) mean of the last hidden states of the policy's tokens, under the starting weights."""
    projection: Tensor | None = None
    """(D, d) float64, the step's random projection."""
    states: Tensor | None = None
    """(B, D) last hidden state that predicts the policy's last token, under the policy."""
    weights: Tensor | None = None
    """(K, D + 1) float64, the value heads as of the last finished step."""
    uniforms: Tensor | None = None
    """(B, 2) float64 in [0, 1), from the seed and the prompt's place in the data."""
    batch: Any = None
    """The step's groups (`training.batch.RewardedGroups`), for a user's function."""


@dataclass(frozen=True)
class Numbers:
    """A source's numbers for the completions."""

    per_completion: Tensor  # (B,), for people and metrics
    b: Tensor
    """The number that the bonus is made from: (B,), or (B, T), 0 at padding."""


class Memory(Protocol):
    """A source's state from step to step: the same on every rank, and in checkpoints."""

    def commit(self) -> None:
        """The step is done: what it added stays."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, as of the last finished step."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Source:
    """A way to compute a number per completion or token that a bonus is made from."""

    needs: frozenset[Need]
    """Fields of `Signals` that it reads beside the rewards; nothing else is computed."""
    numbers: Callable[[Signals, Config], Numbers]
    quantity: Callable[[Config], str]
    """The numbers' name, for tables and warnings."""
    flat: Callable[[Config], str]
    """The usual reason that the numbers do not differ within any group."""
    memory: Callable[[Config], Memory | None] = lambda config: None


def _disagreement(signals: Signals, config: Config) -> Numbers:
    cfg, measure = config.disagreement, given(signals.measure)
    per_completion = reduce(measure, signals.mask, cfg.last_n)
    if cfg.credit == "sequence":
        return Numbers(per_completion, per_completion)
    credit = disagreement.token_credit(measure, signals.mask, cfg.measure, cfg.discount, cfg.last_n)
    return Numbers(per_completion, credit)


def _surprisal(signals: Signals, config: Config) -> Tensor:
    cfg = config.bonus.surprisal
    return surprisal(given(signals.log_probs), signals.mask, signals.task_rewards, cfg.alpha, cfg.kappa)


def _entropy(signals: Signals, config: Config) -> Tensor:
    cfg = config.bonus.entropy
    return entropy(given(signals.entropies), signals.mask, signals.task_advantages, cfg.alpha, cfg.kappa)


def _counts(signals: Signals, config: Config) -> Tensor:
    cfg = config.bonus.counts
    if cfg.kind == "batch":
        return counts.batch(given(signals.answers), signals.group_size)
    return counts.ucb(given(signals.visits), cfg.b0)


def _unlikeliness(signals: Signals, config: Config) -> Tensor:
    return unlikeliness(
        given(signals.log_probs),
        signals.mask,
        signals.task_rewards,
        signals.solved,
        signals.group_size,
        config.bonus.unlikeliness.beta,
    )


def _novelty(signals: Signals, config: Config) -> Tensor:
    own = config.bonus.novelty
    return novelty(given(signals.start_states), given(signals.projection), signals.group_size, own.ridge)


def _value_heads(signals: Signals, config: Config) -> Tensor:
    return value_heads(given(signals.states), given(signals.weights))


def _noise(signals: Signals, config: Config) -> Tensor:
    return noise(given(signals.uniforms))


def given(value: T | None) -> T:
    """A signal that the source's `needs` asks for."""
    assert value is not None
    return value


def simple(
    name: str,
    needs: set[Need],
    compute: Callable[[Signals, Config], Tensor],
    flat: str,
    memory: Callable[[Config], Memory | None] = lambda config: None,
) -> Source:
    """A source whose numbers are what the bonus is made from; per token, people see their mean."""

    def numbers(signals: Signals, config: Config) -> Numbers:
        b = compute(signals, config)
        return Numbers(reduce(b, signals.mask), b)

    return Source(frozenset(needs), numbers, lambda config: name, lambda config: flat, memory)


SOURCES = {
    "disagreement": Source(
        frozenset({"measure"}),
        _disagreement,
        lambda config: config.disagreement.measure,
        lambda config: (
            "groups of equal completions, or members that agree (disagreement.dropout is "
            f"{config.disagreement.dropout}, scope {config.disagreement.effective_scope})"
        ),
    ),
    "surprisal": simple("surprisal", {"log_probs"}, _surprisal, "groups of equal completions"),
    "entropy": simple(
        "entropy", {"entropies"}, _entropy, "task rewards that are equal in every group, which bonus.entropy.kappa caps"
    ),
    "counts": simple(
        "counts",
        {"answers"},
        _counts,
        "groups whose answers are all equal, or all new (bonus.answer says what an answer is)",
        lambda config: counts.Visits(),
    ),
    "unlikeliness": simple("unlikeliness", {"log_probs"}, _unlikeliness, "no group has a solved completion"),
    "novelty": simple("novelty", {"start_states"}, _novelty, "groups of equal completions"),
    "value_heads": simple(
        "value_heads",
        {"states"},
        _value_heads,
        "groups of equal completions",
        lambda config: Heads(config.bonus.value_heads.learning_rate),
    ),
    "noise": simple("noise", {"uniforms"}, _noise, "the numbers drawn are equal"),
}
