"""Solution classes: which completions of a prompt give the same answer in other words.

A reward function may say so: with a function of this name beside it in its file, or as its attribute,

    solution_class(completions, **columns) -> list[str | None]     one per completion; None: it gives no answer
    known_classes(**columns) -> list[int | None]                   how many right classes each prompt has

Both take the arguments of a reward function (base.py) and return one entry a completion. The first reward function
of the configuration that has a `solution_class` decides. Without one the text of a completion is its class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward, completion_text
from vdr_cli.rewards.calling import arguments_of, call_all
from vdr_cli.samples import Messages, Prompt


def classifier(loaded: Sequence[LoadedReward]) -> LoadedReward | None:
    """The reward function that decides which solutions are the same; None: none does, and texts are compared."""
    return next((reward for reward in loaded if reward.solution_class is not None), None)


def solution_classes(
    loaded: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
    timeout: float,
) -> list[str]:
    """The class of each of B completions; its text where there is none. prompts: one per completion.

    Raises DataError, naming the function, when `solution_class` raises, hangs or returns what is not B texts.
    """
    texts = [completion_text(completion) for completion in completions]
    reward = classifier(loaded)
    if reward is None or reward.solution_class is None:
        return texts
    function = _beside(reward, reward.solution_class, "solution_class")
    found = entries_of(function, prompts, completions, completion_ids, timeout)
    return [text if one is None else str(one) for one, text in zip(found, texts, strict=True)]


def known_classes(
    loaded: Sequence[LoadedReward], prompts: Sequence[Prompt], timeout: float
) -> NDArray[np.float64] | None:
    """(N,) the number of right classes of each prompt, NaN where it is not known; None when no function knows any.

    Raises DataError, naming the function, when `known_classes` raises, hangs or returns what is not N counts.
    """
    reward = classifier(loaded)
    if reward is None or reward.known_classes is None:
        return None
    nothing: list[list[int]] = [[]] * len(prompts)
    function = _beside(reward, reward.known_classes, "known_classes")
    found = entries_of(function, prompts, [""] * len(prompts), nothing, timeout)
    try:
        return np.array([np.nan if count is None else float(count) for count in found])
    except (TypeError, ValueError):
        raise DataError(f"known_classes of reward {reward.name} must return whole numbers or None") from None


def _beside(reward: LoadedReward, function: Callable[..., Any], name: str) -> LoadedReward:
    return LoadedReward(f"{reward.name}'s {name}", 0.0, function, context=reward.context, extract=reward.extract)


def entries_of(
    function: LoadedReward,
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
    timeout: float,
) -> list[Any]:
    """The function's B entries, one per completion. DataError when it raises, hangs or returns anything else."""
    (value,) = call_all([function], arguments_of(prompts, completions, completion_ids), prompts, timeout)
    if not isinstance(value, list) or len(value) != len(prompts):
        raise DataError(
            f"{function.label} must return a list of {len(prompts)} entries, one per completion; it returned "
            f"{f'{len(value)} entries' if isinstance(value, list) else type(value).__name__}"
        )
    return value
