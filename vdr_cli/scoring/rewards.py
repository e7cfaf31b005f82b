"""Rewards of rows that are scored: columns `rewards/NAME` of `vdr score --reward`, and `reward`, their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.samples import Messages, Prompt
from vdr_cli.scoring.cells import RowError, completion_value, prompt_value
from vdr_cli.scoring.request import Fields
from vdr_cli.scoring.sources import Row
from vdr_cli.scoring.tokens import Item

TOTAL = "reward"


def reward_columns(loaded: Sequence[LoadedReward]) -> tuple[str, ...]:
    """The columns that rewards add; none without rewards."""
    return (*(f"rewards/{reward.name}" for reward in loaded), TOTAL) if loaded else ()


def add_rewards(
    columns: dict[int, dict[str, Any]],
    loaded: Sequence[LoadedReward],
    rows: Sequence[Row],
    items: Sequence[Item],
    fields: Fields,
    tokenizer: Any,
    timeout: float,
) -> None:
    """Add the rewards of a window's items to their columns; null where a function returned None.

    Reward functions get every column of the row by name. Raises DataError, naming function and row, when one fails.
    """
    if not loaded or not items:
        return
    prompts, texts = [], []
    for item in items:
        prompt, text = _prompt(rows[item.at], item, fields, tokenizer)
        prompts.append(prompt)
        texts.append(text)
    as_messages = not isinstance(prompts[0].value, str) or any(not isinstance(text, str) for text in texts)
    given: Any = [_messages(text) for text in texts] if as_messages else texts
    scores = compute_rewards(loaded, prompts, given, [item.completion_ids for item in items], timeout).tolist()
    for item, found in zip(items, scores, strict=True):
        known = [value * reward.weight for value, reward in zip(found, loaded, strict=True) if not math.isnan(value)]
        values = [None if math.isnan(value) else value for value in found]
        columns[item.at] |= dict(zip(reward_columns(loaded), [*values, sum(known) if known else None], strict=True))


def _prompt(row: Row, item: Item, fields: Fields, tokenizer: Any) -> tuple[Prompt, str | Messages]:
    """The row's prompt with its other columns, and its completion; decoded where the row holds token ids alone."""
    values = row.values or {}
    try:
        value: Any = prompt_value(values, fields)
    except RowError:
        value = tokenizer.decode(item.prompt_ids)
    text: Any
    try:
        text = completion_value(values, fields)
    except RowError:
        text = tokenizer.decode(item.completion_ids, skip_special_tokens=True)
    columns = {name: cell for name, cell in values.items() if name not in (fields.prompt, fields.completion)}
    return Prompt(row.number, value, item.prompt_ids, columns), text


def _messages(completion: str | Messages) -> Messages:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
