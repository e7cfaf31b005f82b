"""A bonus of the user's own: bonus.source file.py:function.

    f(prompts, completions, ids, masks, log_probs, entropies, rewards, columns) -> a number per completion or token

docs/exploration.md describes the arguments. The function takes those that it has a parameter for, and what it does not
take is not computed.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.exploration.bonus import reduce
from vdr_cli.exploration.sources import Need, Numbers, Signals, Source
from vdr_cli.rewards.calling import arguments_of, ended_without_the_interpreter
from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.rewards.loading import find_function, one_line
from vdr_cli.samples import Undecoded
from vdr_cli.training.batch import RewardedGroups

ARGUMENTS = ("prompts", "completions", "ids", "masks", "log_probs", "entropies", "rewards", "columns")


def user_source(given: str) -> Source:
    """The source that file.py:function or module:function stands for. ConfigError when there is none."""
    function = find_function(given, "bonus.source")
    taken = _taken(given, function)
    needs: set[Need] = {"batch"}
    needs |= {name for name in get_args(Need) if name in taken and name in ("log_probs", "entropies")}
    name = given.rpartition(":")[2]

    def numbers(signals: Signals, config: Config) -> Numbers:
        arguments = {key: value for key, value in _arguments(signals).items() if key in taken}
        answer = _call(given, function, arguments, config.rewards.timeout)
        b = checked(given, answer, signals.mask, signals.batch)
        if b.dim() == 2 and config.bonus.effective_shape not in ("additive", "plain"):
            raise ConfigError(
                f"bonus.shape {config.bonus.effective_shape} needs one number per completion, and bonus.source {given} "
                "returned one per token: set bonus.shape to additive or plain"
            )
        return Numbers(reduce(b, signals.mask), b)

    return Source(frozenset(needs), numbers, lambda config: name, lambda config: f"{given} returned equal numbers")


def checked(given: str, answer: Any, mask: Tensor, batch: RewardedGroups) -> Tensor:
    """The function's answer as (B,) or (B, T) float32, 0 at tokens that the policy did not sample.

    Rows of unequal length are accepted when they have a number per valid token. DataError for other shapes and for
    numbers that are not finite.
    """
    lengths = batch.completions.completion_mask.sum(1).tolist()
    try:
        b = _as_tensor(answer, lengths, mask.shape[1])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"bonus.source {given} returned a {type(answer).__name__} that is not numbers; {_wanted(mask)}"
        ) from error
    if b.shape not in (mask.shape[:1], mask.shape):
        raise DataError(f"bonus.source {given} returned the shape {tuple(b.shape)}; {_wanted(mask)}")
    b = b if b.dim() == 1 else b.masked_fill(~mask, 0.0)
    wrong = (~b.isfinite()).view(len(b), -1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"bonus.source {given} returned a number that is not finite for a completion of dataset row "
            f"{batch.prompts[wrong[0]].row}; return finite numbers (float32)"
        )
    return b


def _as_tensor(answer: Any, lengths: Sequence[int], width: int) -> Tensor:
    if isinstance(answer, Tensor):
        return answer.detach().float().cpu()
    if isinstance(answer, (list, tuple)) and answer and _is_row(answer[0]):
        rows = [torch.as_tensor(row, dtype=torch.float32).flatten() for row in answer]
        if [len(row) for row in rows] == list(lengths):
            return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        return torch.stack(rows)
    return torch.as_tensor(answer, dtype=torch.float32).cpu()


def _is_row(entry: Any) -> bool:
    """A completion's numbers per token. A tensor without dimensions is one number, although it has a __len__."""
    return hasattr(entry, "__len__") and getattr(entry, "ndim", 1) > 0


def _wanted(mask: Tensor) -> str:
    B, T = mask.shape
    return f"it must return {B} numbers, one per completion, or ({B}, {T}), one per token"


def _taken(given: str, function: Callable[..., Any]) -> set[str]:
    """The arguments that the function takes. ConfigError when it asks for others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set(ARGUMENTS)
    kinds = inspect.Parameter
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters):
        return set(ARGUMENTS)
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    unknown = [p.name for p in named if p.name not in ARGUMENTS and p.default is kinds.empty]
    if unknown:
        raise ConfigError(
            f"bonus.source {given} needs the argument {unknown[0]}, which nothing provides; there are "
            f"{', '.join(ARGUMENTS)}"
        )
    return {p.name for p in named if p.name in ARGUMENTS}


def _arguments(signals: Signals) -> dict[str, Any]:
    batch: RewardedGroups = signals.batch
    completions = batch.completions
    lists = arguments_of(batch.prompts, batch.texts, completions.completion_token_ids())
    own = {name: lists.pop(name) for name in ("prompts", "completions", "completion_ids")}
    plain = {name: values for name, values in lists.items() if not any(isinstance(v, Undecoded) for v in values)}
    return {
        "prompts": own["prompts"],
        "completions": own["completions"],
        "ids": completions.completion_ids.clone(),
        "masks": signals.mask.clone(),
        "log_probs": None if signals.log_probs is None else signals.log_probs.clone(),
        "entropies": None if signals.entropies is None else signals.entropies.clone(),
        "rewards": signals.task_rewards.clone(),
        "columns": plain,
    }


def _call(given: str, function: Callable[..., Any], arguments: dict[str, Any], timeout: float) -> Any:
    """The function's return value. DataError when it raises, or takes longer than `timeout` seconds."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            with exit_is_an_error(), torch.no_grad():
                outcome["value"] = function(**arguments)
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            outcome["error"] = error

    thread = threading.Thread(target=run, name=f"bonus {given}", daemon=True)
    with ended_without_the_interpreter(timeout):
        thread.start()
        thread.join(timeout)
    if thread.is_alive():
        raise DataError(f"bonus.source {given} had not returned after {timeout:g} s; fix it or raise rewards.timeout")
    if "error" in outcome:
        raise DataError(f"bonus.source {given} raised: {one_line(outcome['error'])}") from outcome["error"]
    return outcome["value"]
