"""A rank's completions as columns of a table, and its first group as the live view shows it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor

from vdr_cli.data.turns import shown_turns
from vdr_cli.errors import DataError
from vdr_cli.rewards.logs import OWN_COLUMNS
from vdr_cli.training.batch import Advantages, RewardedGroups
from vdr_cli.training.live import Sample
from vdr_cli.training.resources import Resources

SHOWN_COMPLETIONS = 8


def completion_columns(res: Resources, batch: RewardedGroups, advantages: Advantages) -> dict[str, list[Any]]:
    """This rank's completions as columns; numbers per completion, and lists per token where they are per token."""
    completions = batch.completions
    lengths = completions.completion_mask.sum(1).tolist()
    columns: dict[str, list[Any]] = {
        "row": [prompt.row for prompt in batch.prompts],
        "prompt": [prompt.value for prompt in batch.prompts],
        "completion": list(batch.texts),
        "prompt_ids": completions.prompt_token_ids(),
        "completion_ids": completions.completion_token_ids(),
        "truncated": completions.truncated.tolist(),
        "reward": batch.task_reward.tolist(),
        "advantage": _per_completion(advantages.inputs.advantages, completions.policy_mask).tolist(),
    }
    if batch.counts is not None:
        columns["policy_mask"] = _cut(completions.policy_mask, lengths)
        columns |= {name: [int(getattr(each, name)) for each in batch.counts] for name in vars(batch.counts[0])}
    for index, reward in enumerate(res.rewards):
        columns[f"rewards/{reward.name}"] = batch.rewards[:, index].tolist()
    measure = res.source.quantity(res.config) if res.source else ""
    if advantages.bonus is not None:
        columns["bonus"] = _per_completion(advantages.bonus.added, completions.policy_mask).tolist()
        columns[measure] = advantages.bonus.per_completion.tolist()
    if (by_token := res.shown_measure()) is not None:
        measured = _cut(by_token, lengths[: len(by_token)])
        columns[f"{measure}_tokens"] = measured + [None] * (len(lengths) - len(measured))
    return columns | _logged_columns(batch, columns.keys() | OWN_COLUMNS)


def _logged_columns(batch: RewardedGroups, own: Set[str]) -> dict[str, list[Any]]:
    """Columns that reward functions logged, None where a completion has no value. own: names that they may not take."""
    names = sorted({name for cells in batch.logs.cells for name in cells})
    if taken := [name for name in names if name in own]:
        raise DataError(f"log_extra: {taken[0]} is a column of completions/ already; choose another name")
    return {name: [cells.get(name) for cells in batch.logs.cells] for name in names}


def shown_group(res: Resources, batch: RewardedGroups, advantages: Advantages) -> list[Sample] | None:
    """The step's first group, for the live view.

    None where it was not measured token by token and an earlier group that was is still shown.
    """
    bonus, measured = advantages.bonus, res.shown_measure()
    measures = res.config.needs_ensemble
    if measures and measured is None and res.config.observe.completions_every:
        return None
    samples = []
    for row in range(min(res.config.rollout.group_size, SHOWN_COMPLETIONS)):
        ids = batch.completions.completion_ids[row, batch.completions.completion_mask[row]].tolist()
        heat = measured[row, : len(ids)].tolist() if measured is not None else [0.0] * len(ids)
        if measures and measured is None and bonus is not None and ids:
            heat[-1] = float(bonus.per_completion[row])  # end_of_sequence: at the last token, which is the policy's
        prompt = batch.prompts[row].value
        samples.append(
            Sample(
                prompt if isinstance(prompt, str) else prompt[-1]["content"],
                [res.tokenizer.decode([token]) for token in ids],
                heat,
                float(batch.task_reward[row]),
                shown_turns(batch.texts[row], batch.completions.policy_mask[row, : len(ids)].tolist()),
            )
        )
    return samples


def _per_completion(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) values as they are; (B, T) values as their mean over the policy's tokens."""
    return values if values.dim() == 1 else (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _cut(rows: Tensor, lengths: list[int]) -> list[list[Any]]:
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
