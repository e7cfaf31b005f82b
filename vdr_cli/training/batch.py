"""One rank's share of a step, as it grows from prompts to advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdr_cli.engine import collectives
from vdr_cli.engine.engine import StepResult
from vdr_cli.engine.sequence import SequenceGroup
from vdr_cli.environments.episodes import Counts
from vdr_cli.grpo.losses import LossInputs, LossOutput, Totals
from vdr_cli.rewards.logs import Logs, joined
from vdr_cli.samples import Completions, Messages, Prompt, to_device


@dataclass(frozen=True)
class RewardedGroups:
    """Groups of completions with their rewards; groups are contiguous rows."""

    prompts: list[Prompt]  # one per completion, length B
    completions: Completions
    texts: list[str] | list[Messages]
    """Completions as the reward functions see them: strings, or one assistant message each for chats."""
    rewards: Tensor  # (B, F) float32, NaN where a function returned None
    task_reward: Tensor  # (B,) float32, the weighted sum
    positions: list[int]  # (B,) the prompt's place in the stream of training prompts
    counts: list[Counts] | None = None
    """(B,) turns and tool calls of each episode; None where a completion is one turn."""
    logs: Logs = field(default_factory=Logs)
    """Log of the reward functions. Its metrics count resampled groups too."""

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Tensor) -> RewardedGroups:
        """The rows with these indices, in that order."""
        chosen = rows.tolist()
        return RewardedGroups(
            [self.prompts[row] for row in chosen],
            self.completions.rows(rows),
            [self.texts[row] for row in chosen],  # type: ignore[arg-type]
            self.rewards[rows],
            self.task_reward[rows],
            [self.positions[row] for row in chosen],
            None if self.counts is None else [self.counts[row] for row in chosen],
            self.logs.select(chosen),
        )


def concatenate(batches: Sequence[RewardedGroups], pad_id: int) -> RewardedGroups:
    """Rows of all batches in order; prompts padded left and completions right to the widest."""
    return RewardedGroups(
        [prompt for batch in batches for prompt in batch.prompts],
        concatenate_completions([batch.completions for batch in batches], pad_id),
        [text for batch in batches for text in batch.texts],  # type: ignore[arg-type]
        torch.cat([batch.rewards for batch in batches]),
        torch.cat([batch.task_reward for batch in batches]),
        [position for batch in batches for position in batch.positions],
        None if batches[0].counts is None else [each for batch in batches for each in batch.counts or []],
        joined(batch.logs for batch in batches),
    )


def concatenate_completions(parts: Sequence[Completions], pad_id: int) -> Completions:
    """Rows of all parts in order, padded as `concatenate` says."""

    prompt_width = max(part.prompt_ids.shape[1] for part in parts)
    width = max(part.completion_ids.shape[1] for part in parts)

    def widened(name: str, target: int, left: bool, fill: Any) -> Tensor:
        padded = []
        for part in parts:
            tensor = getattr(part, name)
            missing = target - tensor.shape[1]
            padded.append(torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill))
        return torch.cat(padded)

    return Completions(
        prompt_ids=widened("prompt_ids", prompt_width, True, pad_id),
        prompt_mask=widened("prompt_mask", prompt_width, True, False),
        completion_ids=widened("completion_ids", width, False, pad_id),
        completion_mask=widened("completion_mask", width, False, False),
        sampler_logps=widened("sampler_logps", width, False, 0.0),
        truncated=torch.cat([part.truncated for part in parts]),
        policy_mask=widened("policy_mask", width, False, False),
    )


@dataclass(frozen=True)
class Bonus:
    """The bonus of a rank's completions, and what it was made from."""

    per_completion: Tensor  # (B,) the source's number of each completion
    gate: Tensor  # (B,) bool, completions that get a bonus
    added: Tensor
    """(B,) or (B, T) as added to the advantage; 0 where the gate is closed."""


@dataclass(frozen=True)
class Advantages:
    """The update's inputs for every token, and where the advantages came from."""

    inputs: LossInputs  # (B, T), those of the rollout; weights and covariant tokens are an optimizer step's
    task_advantages: Tensor  # (B,)
    bonus: Bonus | None = None
    visits: Tensor | None = None
    """(B,) int64, times that the answer was given to the prompt, where the bonus counts them."""
    old_entropies: Tensor | None = None
    """(B, T) under the policy that the rollout began with; None: the update's first pass reads them."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through one forward and backward, on the engine's device, without their common padding."""

    tokens: tuple[Tensor, Tensor, Tensor, Tensor]
    """prompt ids and mask (b, P), completion ids and mask (b, T)."""
    policy_mask: Tensor  # (b, T) bool, tokens that the policy sampled
    inputs: LossInputs  # (b, T)
    own: bool = True
    """False for rows of another rank, whose numbers that rank counts (engine.sequence_parallel)."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on this device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        tokens = tuple(map(moved, self.tokens))
        return replace(self, tokens=tokens, policy_mask=moved(self.policy_mask), inputs=self.inputs.map(moved))  # type: ignore[arg-type]


def micro_batches_of(completions: Completions, inputs: LossInputs, size: int, device: torch.device) -> list[MicroBatch]:
    """The rank's rows, `size` at a time. Collective: all ranks get the same number of micro-batches.

    ZeRO's collectives are matched backward by backward, so a rank with fewer rows ends with micro-batches of
    one row whose mask is empty and whose weights are 0.
    """
    count = len(inputs.mask)
    own = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    parts = [_micro_batch(completions, inputs, rows, device) for rows in own]
    missing = int(collectives.all_reduce_max([len(own)])[0]) - len(own)
    return parts + [_emptied(parts[-1]) for _ in range(missing)]


def shared_micro_batches(own: list[MicroBatch], sequence: SequenceGroup | None) -> list[MicroBatch]:
    """The micro-batches that this rank takes part in: its own, or those of its whole sequence group. Collective.

    Every rank's first one, then every rank's second, ...: the same on all ranks of the group but for `own`.
    """
    if sequence is None:
        return own
    device = own[0].policy_mask.device
    everybody = sequence.gather_objects([micro.to(torch.device("cpu")) for micro in own])
    return [
        replace(micro.to(device), own=rank == sequence.rank)
        for at_once in zip(*everybody, strict=True)
        for rank, micro in enumerate(at_once)
    ]


def _micro_batch(completions: Completions, inputs: LossInputs, rows: slice, device: torch.device) -> MicroBatch:
    own = to_device(completions.rows(rows).trimmed(), device)
    T = own.completion_ids.shape[1]
    return MicroBatch(
        tokens=(own.prompt_ids, own.prompt_mask, own.completion_ids, own.completion_mask),
        policy_mask=own.policy_mask,
        inputs=inputs.map(lambda tensor: tensor[rows, :T].to(device)),
    )


def _emptied(micro: MicroBatch) -> MicroBatch:
    """Its first row, with nothing valid in it."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = (tensor[:1] for tensor in micro.tokens)
    tokens = prompt_ids, prompt_mask, completion_ids, torch.zeros_like(completion_mask)
    inputs, nothing = micro.inputs.map(lambda tensor: tensor[:1]), torch.zeros_like(micro.policy_mask[:1])
    weightless = torch.zeros_like(nothing, dtype=torch.float32)
    inputs = replace(inputs, mask=nothing, weights=weightless, entropy_weights=weightless)
    return MicroBatch(tokens, nothing, inputs)


@dataclass
class Updates:
    """Outcome of the optimizer steps on one rollout; loss, pairs, minima and maxima are this rank's share."""

    loss: float = 0.0
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    entropy_weight: float = 0.0
    """Weight of the entropy bonus in these steps."""
    refused: list[bool] = field(default_factory=list)
    """True for each optimizer step that was refused, in order."""
    totals: list[Totals] = field(default_factory=list)
    """The denominators of each optimizer step, over all ranks."""
    first_logps: list[Tensor] = field(default_factory=list)
    """(b, T) of each micro-batch, under the policy that the rollout began with; empty where they were read before."""
    first_entropies: list[Tensor] = field(default_factory=list)
    """(b, T) of each micro-batch, likewise."""
    own: list[bool] = field(default_factory=list)
    """True for each of these micro-batches that holds rows of this rank."""

    def old_logps(self, micro: MicroBatch, index: int, logps: Tensor, entropy: Tensor) -> Tensor:
        """(b, T) log-probabilities of micro-batch `index` before the first update.

        They were read beforehand, or are those of this rollout's first pass, which this call then records.
        """
        if micro.inputs.old_logps is not None:
            return micro.inputs.old_logps
        if not self.refused:  # the first pass
            self.first_logps.append(logps.detach())
            self.first_entropies.append(entropy.detach())
            self.own.append(micro.own)
        return self.first_logps[index]

    def own_parts(self, parts: list[Tensor]) -> list[Tensor]:
        """Those of the first pass's micro-batches that hold rows of this rank. parts: one per micro-batch."""
        return [part for part, own in zip(parts, self.own, strict=True) if own]

    def end_step(self, totals: Totals, result: StepResult) -> None:
        """Count one optimizer step, made with these denominators."""
        self.totals.append(totals)
        self.grad_norm = result.grad_norm
        self.refused.append(result.refused)

    def add(self, micro: MicroBatch, output: LossOutput) -> None:
        """Count one micro-batch, unless another rank counts it."""
        if not micro.own:
            return
        self.loss += float(output.loss.detach())
        for name, (top, bottom) in output.metrics.items():
            old_top, old_bottom = self.pairs.get(name, (0.0, 0.0))
            self.pairs[name] = (old_top + float(top), old_bottom + float(bottom))
        for name, value in output.minima.items():
            self.minima[name] = min(self.minima.get(name, math.inf), float(value))
        for name, value in output.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), float(value))
