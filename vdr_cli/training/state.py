"""State that changes from step to step: the part that a checkpoint carries, and groups that are being sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vdr_cli.config.schema import TrainConfig
from vdr_cli.exploration.bonus import RunningRms
from vdr_cli.exploration.sources import Memory
from vdr_cli.grpo.entropy_control import EntropyControl
from vdr_cli.training.pending_rollout import PendingRollout

SAVED = (
    "step", "drawn", "tokens", "prompt_tokens", "seconds", "refused", "best", "best_step", "longest_step",
    "owes_evaluation",
)  # fmt: skip
"""Fields that a checkpoint's state.json carries, beside `rms` and `entropy`."""


@dataclass
class LoopState:
    """The loop's counters. With the engine's state they make a resumed run the same run."""

    step: int = 0
    """Optimizer steps done."""
    drawn: int = 0
    """Prompts taken from the stream in finished steps, over all ranks."""
    tokens: int = 0
    """Completion tokens so far, over all ranks."""
    prompt_tokens: int = 0
    """Prompt tokens so far, counted for each completion, over all ranks."""
    seconds: float = 0.0
    """Seconds that the finished steps took on the slowest rank."""
    refused: int = 0
    """Consecutive refused steps, up to now."""
    best: float | None = None
    """Best held-out pass@1."""
    best_step: int | None = None
    longest_step: float = 0.0
    """Seconds of the longest step, its evaluation and checkpoint included; the same on every rank."""
    owes_evaluation: bool = False
    """The evaluation that was due after this step failed: a resumed run does it first."""
    rms: RunningRms = field(default_factory=RunningRms)
    """The bonus's running RMS, which a step moves on before it ends."""
    finished_rms: dict[str, float] = field(default_factory=lambda: RunningRms().state_dict())
    """`rms` as of the last finished step; a step that is redone starts from it."""
    entropy: EntropyControl = field(default_factory=EntropyControl)
    """The adaptive weight of the entropy bonus, as of the last finished step (grpo.entropy_target)."""
    drawn_in_step: int = 0
    """Prompts that this step has taken. An abandoned step gives them back: they count when it ends."""
    memory: Memory | None = None
    """State of the bonus's source from step to step; None for most."""
    pending: PendingRollout | None = None
    """This step's groups, when their sampling started in the step before (rollout.ahead)."""
    next_pending: PendingRollout | None = None
    """The next step's groups, whose sampling started in this one."""

    def take(self, counts: list[int], rank: int) -> range:
        """The positions in the stream of this rank's prompts, when rank r takes the next counts[r]."""
        first = self.drawn + self.drawn_in_step + sum(counts[:rank])
        self.drawn_in_step += sum(counts)
        return range(first, first + counts[rank])

    def is_over(self, train: TrainConfig) -> bool:
        """True when the run has done its steps, or spent its seconds or its tokens."""
        return (
            self.step >= train.steps
            or (train.max_seconds is not None and self.seconds >= train.max_seconds)
            or (train.max_sampled_tokens is not None and self.tokens >= train.max_sampled_tokens)
        )

    def end_step(self, steps: int, tokens: int, prompt_tokens: int = 0, seconds: float = 0.0) -> None:
        """These optimizer steps are done, on completions and prompts of so many tokens, in so many seconds."""
        self.step += steps
        self.tokens += tokens
        self.prompt_tokens += prompt_tokens
        self.seconds += seconds
        self.drawn += self.drawn_in_step
        self.finished_rms = self.rms.state_dict()
        if self.memory is not None:
            self.memory.commit()
        self.drawn_in_step = 0
        self.pending, self.next_pending = self.next_pending, None

    def count_refusals(self, refused: list[bool]) -> int:
        """Take in whether each of the newest steps was refused, in order. The longest row of refusals on the way."""
        longest = 0
        for each in refused:
            self.refused = self.refused + 1 if each else 0
            longest = max(longest, self.refused)
        return longest

    def remember_best(self, solved: float) -> None:
        """solved: held-out pass@1 of the policy at this step."""
        if self.best is None or solved > self.best:
            self.best, self.best_step = solved, self.step

    def saved(self) -> dict[str, Any]:
        """The part that a checkpoint carries, ready for JSON."""
        return {name: getattr(self, name) for name in SAVED} | {
            "rms": self.finished_rms,
            "entropy": self.entropy.state_dict(),
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], memory: Memory | None = None) -> LoopState:
        """The state that `saved` described. memory: what its source carries, which is saved beside it."""
        state = cls(memory=memory, **{name: saved[name] for name in SAVED if name in saved}, finished_rms=saved["rms"])
        state.rms.load_state_dict(saved["rms"])
        state.entropy = EntropyControl(**saved.get("entropy", {}))
        return state


@dataclass(frozen=True)
class Due:
    """Things that are to be done after a step."""

    evaluation: bool
    completions: bool
    """Save the completions of the step's rollout."""
    reference: bool
    """Bring the reference model to the policy."""
    checkpoint: bool


def due_after(
    before: int,
    now: int,
    *,
    over: bool,
    eval_every: int,
    completions_every: int,
    sync_reference_every: int,
    checkpoint_every: int,
) -> Due:
    """Things to do when the optimizer steps before+1 ... now are done; 0 switches a thing off.

    over: these are the run's last steps. They are always evaluated and their completions saved; their checkpoint is
    written as the run ends.
    """

    def due(every: int) -> bool:
        return every > 0 and now // every > before // every

    return Due(
        evaluation=eval_every > 0 and (over or due(eval_every)),
        completions=completions_every > 0 and (over or due(completions_every)),
        reference=due(sync_reference_every),
        checkpoint=not over and due(checkpoint_every),
    )
