"""Task suites of the package reasoning-gym by name: `reasoning_gym:leg_counting=2,spell_backward`.

The package generates problems, each with a reference answer and a verifier. A row holds the task, the generator's
settings and the problem's number, from which any process makes the same problem again: the verifier needs it whole,
and most of it is no JSON.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from vdr_cli.beds.gym_generate import Request, generated
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.system.text import did_you_mean

PREFIX = "reasoning_gym:"
PACKAGE = "reasoning_gym"
SIZES = {"size": 1000, "eval_size": 200, "seed": 0}
"""Keys of data.options that belong to the whole suite, and their defaults."""
HELD_OUT_SEED = 2**31
"""Added to the seed for held-out problems: beyond every seed that training can reach."""
CANDIDATES = 4
"""Held-out problems that are generated at most, as a multiple of `eval_size`: some occur in training."""
CHUNK = 1000
"""Problems that are generated together where a single one is asked for: starting a process takes seconds."""
LEAST_SHARE = 0.5
"""Share of `eval_size` below which a split is refused."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One generator of the package."""

    name: str
    weight: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The generator's own, without size and seed."""


@dataclass(frozen=True)
class Suite:
    """The tasks of a name and how many problems are drawn from them."""

    name: str
    tasks: tuple[Task, ...]
    size: int
    """Training problems."""
    eval_size: int
    """Held-out problems."""
    seed: int


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of a suite, none of which occurs in training."""

    rows: list[Row]
    in_training: int
    """Rows that were dropped because training has their question."""
    repeated: int
    """Rows that were dropped because an earlier held-out row has their question."""


def is_suite(name: str) -> bool:
    """True for `reasoning_gym:...`."""
    return name.startswith(PREFIX)


def is_task(name: str) -> bool:
    """True for the name of a task of the package, which must be installed."""
    return name in _package().factory.DATASETS


def suite_of(name: str, options: Mapping[str, Any], key: str = "data.name") -> Suite:
    """The suite of a name `reasoning_gym:TASK[=WEIGHT],...` under data.options.

    key: the setting that holds the name, for errors. Raises ConfigError, one line, for a package, task, weight or
    option that is not there.
    """
    known = _known(key, name)
    weights: dict[str, float] = {}
    for text in name.removeprefix(PREFIX).split(","):
        task, equals, weight = text.strip().partition("=")
        if task not in known:
            hint = did_you_mean(task, known, "see the package's gallery of tasks")
            raise ConfigError(f"{key} {name}: reasoning-gym has no task {task or 'without a name'}; {hint}")
        if task in weights:
            raise ConfigError(f"{key} {name}: {task} stands there twice; give it once, with a weight ({task}=2)")
        weights[task] = _weight(weight, f"{key} {name}: the weight of {task}") if equals else 1.0
    sizes = {name: _whole(options.get(name, default), f"data.options.{name}") for name, default in SIZES.items()}
    tasks = tuple(Task(task, weight, _settings(task, weights, options, known)) for task, weight in weights.items())
    suite = Suite(name, tasks, **sizes)
    for each in tasks:
        _generator(each.name, _settings_text(each, suite.seed, suite.size))
    return suite


def train_rows(suite: Suite) -> list[Row]:
    """The training rows: prompt, answer, task, settings, index. DataError when a generator fails."""
    return list(_rows(suite, suite.seed, suite.size, suite.size))


def held_out_rows(suite: Suite, trained: Suite) -> HeldOut:
    """`eval_size` held-out rows, or fewer: no question occurs twice, or in the training rows of `trained`.

    Raises DataError when less than half of eval_size is left.
    """
    known = {
        row["prompt"] for other in {suite.name: suite, trained.name: trained}.values() for row in train_rows(other)
    }
    rows: dict[str, Row] = {}
    in_training = repeated = 0
    for row in _rows(suite, (suite.seed + HELD_OUT_SEED) % 2**32, CANDIDATES * suite.eval_size, suite.eval_size):
        in_training += row["prompt"] in known
        repeated += row["prompt"] in rows
        if row["prompt"] not in known:
            rows.setdefault(row["prompt"], row)
        if len(rows) == suite.eval_size:
            break
    if len(rows) < LEAST_SHARE * suite.eval_size:
        raise DataError(
            f"{suite.name}: only {len(rows)} of data.options.eval_size {suite.eval_size} held-out problems are left "
            f"({in_training} generated ones occur in training, {repeated} twice): give a smaller data.options.size or "
            "eval_size, or settings with more problems"
        )
    return HeldOut(list(rows.values()), in_training, repeated)


def entry_of(task: str, settings: str, index: int) -> dict[str, Any]:
    """The problem of this number, whole. settings: JSON, as rows hold it. DataError when the generator fails."""
    if (task, settings, index) not in _entries:  # a process that made no rows: what follows are its neighbours
        size = json.loads(settings)["size"]
        _generate([(task, settings, number) for number in range(min(index, size - 1), min(index + CHUNK, size))])
    return _entries[task, settings, index]


def generator(task: str, settings: str) -> Any:
    """The package's data set of a task with these settings (JSON), as rows hold them."""
    _package()
    return _generator(task, settings)


_entries: dict[Request, dict[str, Any]] = {}


def _generate(requests: Sequence[Request]) -> None:
    """Have those problems that are not there yet made, in a process of its own."""
    missing = [request for request in requests if request not in _entries]
    if missing:
        _entries.update(zip(missing, generated(missing), strict=True))


def _rows(suite: Suite, seed: int, count: int, chunk: int) -> Iterator[Row]:
    """`count` rows: after each, every task has had its share of them, to the nearest row.

    chunk: rows that are generated together.
    """
    settings = {task.name: _settings_text(task, seed, count) for task in suite.tasks}
    requests = [(name, settings[name], index) for name, index in _shares(suite.tasks, count)]
    for number, (name, text, index) in enumerate(requests):
        if number % chunk == 0:
            _generate(requests[number : number + chunk])
        entry = _entries[name, text, index]
        answer = None if entry["answer"] is None else str(entry["answer"])
        yield {"prompt": entry["question"], "answer": answer, "task": name, "settings": text, "index": index}


def _shares(tasks: Sequence[Task], count: int) -> Iterator[tuple[str, int]]:
    """The task of each row and the row's number among those of its task: always the task that is furthest behind."""
    total = sum(task.weight for task in tasks)
    drawn = [0] * len(tasks)
    for number in range(1, count + 1):
        behind = [number * task.weight / total - had for task, had in zip(tasks, drawn, strict=True)]
        chosen = max(range(len(behind)), key=behind.__getitem__)
        yield tasks[chosen].name, drawn[chosen]
        drawn[chosen] += 1


def _settings_text(task: Task, seed: int, size: int) -> str:
    return json.dumps({**task.settings, "seed": seed, "size": size}, sort_keys=True)


@cache
def _generator(task: str, settings: str) -> Any:
    """Raises ConfigError, naming the setting, where the package refuses it."""
    kind, config = _package().factory.DATASETS[task]
    given = json.loads(settings)
    try:
        made = config(**given)
        if hasattr(made, "validate"):
            made.validate()
        return kind(config=made)
    except TypeError as error:
        names = sorted(set(config.__dataclass_fields__) - {"seed", "size"})
        wrong = next((name for name in given if name not in config.__dataclass_fields__), None)
        if wrong is None:
            raise ConfigError(f"data.options: reasoning-gym's {task} refuses them ({error})") from None
        hint = did_you_mean(wrong, names, f"it has {', '.join(names) or 'none'}")
        raise ConfigError(f"data.options: reasoning-gym's {task} has no setting {wrong}; {hint}") from None
    except (AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or "it says no reason"
        raise ConfigError(f"data.options: reasoning-gym's {task} refuses its settings: {reason}") from None


def _settings(task: str, tasks: Iterable[str], options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The settings of one task: the keys under its name, and with one task alone those beside the sizes."""
    shared = {name: value for name, value in options.items() if name not in SIZES and name not in known}
    if shared and len(list(tasks)) > 1:
        name = next(iter(shared))
        raise ConfigError(
            f"data.options.{name}: {', '.join(SIZES)} are for all tasks; put {name} under its task, such as "
            f"data.options.{task}.{name}"
        )
    own = options.get(task, {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"data.options.{task} must be keys and values, the settings of the task {task}")
    fixed = next((name for name in ("seed", "size") if name in own), None)
    if fixed is not None:
        raise ConfigError(
            f"data.options.{task}.{fixed}: give data.options.{fixed}, for all tasks; weights share it out"
        )
    return {**shared, **own}


def _weight(text: str, what: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise ConfigError(f"{what} is {text or 'empty'}; give a number above 0")
    return weight


def _whole(value: Any, key: str) -> int:
    least = 0 if key.endswith("seed") else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < HELD_OUT_SEED:
        raise ConfigError(f"{key} is {value!r}; give a whole number, at least {least} and below 2^31")
    return value


def _known(key: str, name: str) -> dict[str, Any]:
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(f"{key} {name} needs reasoning-gym: pip install 'vdr-cli[gym]', or pip install reasoning-gym")
    return {name: kind for name, kind in _package().factory.DATASETS.items() if name != "composite"}


@cache
def _package() -> ModuleType:
    import reasoning_gym

    return reasoning_gym
