"""Reward functions: TRL's signature, and the columns that they need.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]     (sync or async)

Every argument is a list with one entry a completion. Completions are strings, or one assistant
message in a list when the prompts are chats. Columns are the dataset's, repeated for each
completion. None leaves a completion out of this function's share of the reward. As in TRL, a
function may also take `trainer_state`, the state of the run, and `log_extra` and `log_metric`
(logs.py). With rollout.environment or rollout.tools completions are lists of
messages, and a function with a parameter `environments` gets the instance of each completion.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Set
from contextvars import Context
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

from vdr_cli.config.sections.rewards import Extract
from vdr_cli.errors import DataError
from vdr_cli.rewards.answers import answer_in

NOT_LISTS = ("trainer_state", "log_extra", "log_metric")
"""Provided arguments without an entry per completion."""
PROVIDED = ("prompts", "completions", "completion_ids", "environments", *NOT_LISTS)
LOOKED_UP = (*NOT_LISTS, "environments")
"""Provided arguments that **columns gets only where the function looks them up: others may loop over it, and
environments may hold what cannot go to another process."""


SLACK = 1e-6
"""Rounding of a weighted sum of float32 rewards near 1: 0.7 + 0.2 + 0.1 is less than 1, in float64 too."""


def is_solved(task_rewards: Any, solved_at: float) -> Any:
    """task_rewards, tensor or array of any shape → bool, alike: each is at least solved_at, but for rounding.

    NaN, for a completion without a reward, is not solved.
    """
    return task_rewards >= solved_at - SLACK * max(1.0, abs(solved_at))


@dataclass(frozen=True)
class TrainerState:
    """The run's progress, under the names of transformers' TrainerState; both 0 outside a run."""

    global_step: int = 0
    """Optimizer steps done."""
    max_steps: int = 0
    """train.steps"""


class RefusedMessagesError(Exception):
    """A reward model's chat template refuses the messages of the call's completion `index`."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


class Elsewhere(Protocol):
    """A function in a process of its own (main_thread.py)."""

    @property
    def is_used(self) -> bool: ...

    def start(self) -> None: ...

    def start_for(self, label: str, need: str) -> None: ...

    def __call__(self, **arguments: Any) -> Any: ...


@dataclass(frozen=True)
class LoadedReward:
    """A reward function with its weight, or another function that is called like one (`role`)."""

    name: str
    """In metrics and errors."""
    weight: float
    function: Callable[..., Any]
    at_once: int = 1
    """Calls that may run beside each other; async functions have no such limit."""
    own_process: Elsewhere | None = None
    """Caller of a function that turns out to need a main thread; None: it is refused."""
    context: Context | None = None
    """Context variables as they were when the function was imported (decimal's precision, ...); None: none are set."""
    solution_class: Callable[..., Any] | None = None
    """Says which completions give the same answer (classes.py); None: those with the same text."""
    known_classes: Callable[..., Any] | None = None
    """Says how many right classes a prompt has; None: nobody knows."""
    extract: Extract = "whole"
    """The part of a completion that the function sees; None stands for a completion without it."""

    is_model: bool = False
    """A reward model (model.py): called on the caller's thread, without a time limit, once all texts are there."""
    role: str = "reward"
    """The word for it in errors, before its name."""

    @property
    def label(self) -> str:
        """The function in errors: `reward exact_match`."""
        return f"{self.role} {self.name}"

    @property
    def is_async(self) -> bool:
        call = getattr(self.function, "__call__", None)  # noqa: B004 - an object with an async __call__
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the function has a parameter for; with **columns also the data's other columns.

        **columns gets of LOOKED_UP what the function looks up.
        """
        arguments = {"log_extra": unrecorded, "log_metric": unrecorded, **arguments}
        if self.extract != "whole" and "completions" in arguments:
            answers = [answer_in(completion_text(each), self.extract) for each in arguments["completions"]]
            arguments = {**arguments, "completions": answers}
        return {name: value for name, value in arguments.items() if self._takes(name)}

    @property
    def logs_metrics(self) -> bool:
        """True when the function takes `log_metric`: it is then called once for a rank's whole batch, as in TRL."""
        return not self.is_model and self._takes("log_metric")

    def _takes(self, name: str) -> bool:
        return name in self._named() or (
            self._takes_all() and (name not in LOOKED_UP or _looks_up(self.function, name))
        )

    def asks_for(self, name: str) -> bool:
        """True when the function has a parameter of this name."""
        return name in self._named()

    def _named(self) -> set[str]:
        return {parameter.name for parameter in _parameters(self.function)}

    def _takes_all(self) -> bool:
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _parameters(self.function))

    def required_columns(self) -> list[str]:
        """Dataset columns without which the function cannot be called."""
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [
            parameter.name
            for parameter in _parameters(self.function)
            if parameter.kind in by_name
            and parameter.default is inspect.Parameter.empty
            and parameter.name not in PROVIDED
        ]


def listed(value: Any, count: int) -> Any:
    """A function's answer as a list, one entry too long at most (a generator may be endless); itself if it is none."""
    if isinstance(value, (str, bytes, Mapping, Set)) or not hasattr(value, "__iter__"):
        return value
    try:
        return list(itertools.islice(value, count + 1))
    except TypeError:
        if hasattr(value, "shape"):  # an array or tensor without dimensions: one number
            return value
        raise


def check_columns(loaded: Iterable[LoadedReward], columns: Iterable[str]) -> None:
    """DataError when a reward function needs a column that the data lack."""
    present = sorted(set(columns))
    for reward in loaded:
        missing = [name for name in reward.required_columns() if name not in present]
        if missing:
            have = ", ".join(present) or "none besides the prompt"
            raise DataError(
                f"{reward.label} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, which the "
                f"dataset lacks (it has: {have}); add it, or give the parameter a default"
            )


def completion_text(completion: Any) -> str:
    """The text of a completion, whether it came as a string or as an assistant message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def unrecorded(*_: Any, **__: Any) -> None:
    """Stands for TRL's log_extra and log_metric where nothing is recorded."""


def _looks_up(function: Callable[..., Any], name: str) -> bool:
    """True when the function's code holds the name as text: `kwargs["trainer_state"]`."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(getattr(function, "__call__", None), "__code__", None)  # noqa: B004
    return isinstance(code, CodeType) and _holds(code, name)


def _holds(code: CodeType, text: str) -> bool:
    return any(each == text or (isinstance(each, CodeType) and _holds(each, text)) for each in code.co_consts)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a C function: it tells no signature
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
