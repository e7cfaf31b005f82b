"""From a study file to a study: every run's settings, resolved and checked before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vdr_cli.config.load import computed_settings, places_of, put, read_document, validate
from vdr_cli.config.messages import dotted_keys, refusal
from vdr_cli.config.moved import with_moved_keys
from vdr_cli.config.recipe import Tree, deep_merge
from vdr_cli.config.schema import Config
from vdr_cli.config.yaml_text import KeyPath
from vdr_cli.errors import ConfigError
from vdr_cli.stats.paired import detectable_deviations
from vdr_cli.study.endpoints import LOWER_IS_BETTER, NEEDS_START, check_endpoint
from vdr_cli.study.schema import Settings, StudyFile

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=@-]{0,63}")
OWNED = {
    "train.seed": "seeds",
    "train.output": "output",
    "train.max_seconds": "budget",
    "train.max_sampled_tokens": "budget",
    "train.save_model": "evaluation",
}
"""Settings that the study gives to each run itself, and the key that they follow from."""
UNDER_BASE: Tree = {"observe": {"tensorboard": False, "report": False}, "train": {"keep_last": 1}}
"""Defaults of a study's runs: there are hundreds of them on one disk."""
MOST_STEPS = 720_720
"""train.steps under a budget of seconds or tokens, where only the budget ends a run: a multiple of every number of
updates per rollout up to 16."""


@dataclass(frozen=True)
class Study:
    """A study whose settings have been checked."""

    file: StudyFile
    name: str
    """The file as it was typed, for messages."""
    places: Mapping[KeyPath, str]

    @property
    def beds(self) -> list[str]:
        return list(self.file.beds)

    @property
    def arms(self) -> list[str]:
        """The control first, the others in the order of the file."""
        return [self.file.control, *(arm for arm in self.file.arms if arm != self.file.control)]

    @property
    def rivals(self) -> list[str]:
        """Every arm but the control."""
        return self.arms[1:]

    @property
    def comparisons(self) -> int:
        """Differences of the endpoint that Holm's correction counts: every rival on every bed."""
        return len(self.rivals) * len(self.beds)

    @property
    def lower_is_better(self) -> bool:
        """The sense of the endpoint."""
        return self.file.endpoint in LOWER_IS_BETTER

    @property
    def needs_start(self) -> bool:
        """True when the endpoint cannot be computed before the starting model is evaluated."""
        return self.file.endpoint in NEEDS_START

    @cached_property
    def trials(self) -> int:
        """Settings tried for each arm; 0 without tuning."""
        return len(next(iter(self.file.tuning.trials.values()))) if self.file.tuning else 0

    def where(self, *key: str | int) -> str:
        """FILE:LINE and the dotted key, for messages."""
        return f"{places_of(self.places)(key) or self.name}: {'.'.join(map(str, key))}"

    def config(self, bed: str, arm: str, seed: int, trial: int | None = None) -> Config:
        """The settings of one run. trial: the index of the arm's tuned settings; None: the arm as it stands."""
        file = self.file
        given: list[tuple[KeyPath, Settings]] = [
            (("base",), file.base), (("beds", bed), file.beds[bed]), (("arms", arm), file.arms[arm])
        ]  # fmt: skip
        if trial is not None and file.tuning is not None:
            given.append((("tuning", "trials", arm, trial), file.tuning.trials[arm][trial]))
        tree, places = UNDER_BASE, dict[KeyPath, str]()
        for prefix, settings in given:
            own = with_moved_keys(nested(settings))
            tree = deep_merge(tree, own)
            places |= {key: self._place(prefix, settings, key) for key in _leaves(own)}
        tree = deep_merge(tree, self._owned(tree, seed))
        return validate(tree, {key: f"{place} ({arm})" for key, place in places.items()})

    def bed_config(self, bed: str) -> Config:
        """The bed's settings without any arm: data, rewards and sampling of the evaluation, the starting model."""
        return validate(deep_merge(nested(self.file.base), nested(self.file.beds[bed])))

    def _owned(self, tree: Tree, seed: int) -> Tree:
        """The settings that the study decides: the seed and the end."""
        budget = self.file.budget
        train: Tree = {"seed": seed, "save_model": True}
        if budget.steps is not None:
            train["steps"] = budget.steps
        else:
            train |= {"max_seconds": budget.seconds, "max_sampled_tokens": budget.sampled_tokens}
            train["steps"] = tree.get("train", {}).get("steps", MOST_STEPS)
        return {"train": train}

    def _place(self, prefix: KeyPath, settings: Settings, key: KeyPath) -> str:
        """FILE:LINE where a setting stands, written nested or dotted."""
        whole = tuple(part for word in key for part in str(word).split("."))
        for top in settings:
            head = tuple(top.split("."))
            if whole[: len(head)] == head:
                return places_of(self.places)((*prefix, top, *whole[len(head) :]))
        return places_of(self.places)(prefix)


def load_study(path: str | Path) -> Study:
    """The study of this file. Raises ConfigError, one line, for mistakes that would otherwise show only after hours."""
    document = read_document(path)
    places = {key: f"{path}:{line}" for key, line in document.lines.items()}
    study = study_of(document.tree, str(path), places)
    check_study(study)
    return study


def study_of(tree: Tree, name: str, places: Mapping[KeyPath, str] | None = None) -> Study:
    """The study of a plain tree. Raises ConfigError for keys that are wrong."""
    places = places or {}
    try:
        file = StudyFile.model_validate({key: value for key, value in tree.items() if value is not None})
    except ValidationError as error:
        at = places_of(places)
        raise ConfigError(refusal(error, lambda key: at(key) or name, StudyFile)) from None
    return Study(file, name, places)


def check_study(study: Study) -> None:
    """Raise ConfigError for a study that cannot answer its question, or whose runs would not start."""
    check_structure(study)
    _check_owned(study)
    _check_settings(study)


def check_structure(study: Study) -> None:
    """Raise ConfigError for arms, seeds or metrics that do not fit together. It does not look at the runs' settings."""
    file, where = study.file, study.where
    for section in ("beds", "arms"):
        _check_names(getattr(file, section), section, where)
    if file.control not in file.arms:
        raise ConfigError(f"{where('control')}: {file.control} is not an arm; there are {', '.join(file.arms)}")
    if len(file.arms) < 2:
        raise ConfigError(f"{where('arms')}: nothing to compare {file.control} with; give a second arm")
    check_endpoint(file.endpoint, file.evaluation.samples, where("endpoint"))
    for index, name in enumerate(file.secondary):
        check_endpoint(name, file.evaluation.samples, where("secondary", index))
    _check_once(file.seeds, where("seeds"))
    _check_once(file.secondary, where("secondary"))
    _check_once([f"[{', '.join(pair)}]" for pair in file.contrasts], where("contrasts"))
    _check_tuning(study)
    _check_contrasts(study)


def warnings(study: Study) -> list[str]:
    """Lines about a study that can run and will hardly find anything."""
    seeds = len(study.file.seeds)
    found = detectable_deviations(seeds, study.comparisons)
    if seeds == 1:
        return ["seeds: one seed gives differences without intervals; give at least 2"]
    if found <= 1:
        return []
    needed = next(n for n in itertools.count(seeds) if detectable_deviations(n, study.comparisons) <= 1)
    many = "comparison" if study.comparisons == 1 else "comparisons"
    return [
        f"seeds: with {seeds} seeds and {study.comparisons} {many}, a difference is found with probability 0.8 only if "
        f"it is {found:.2f} times the standard deviation of a seed's difference; {needed} seeds find one of 1.0"
    ]


def nested(settings: Mapping[str, Any]) -> Tree:
    """Dotted keys as sections: {"train.steps": 3} to {"train": {"steps": 3}}. A section that is null is empty."""
    tree: Tree = {}
    for key, value in settings.items():
        put(tree, key, {} if value is None and key in Config.model_fields else value)
    return tree


def _leaves(tree: Mapping[str, Any], prefix: KeyPath = ()) -> Iterable[KeyPath]:
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))


def _check_names(names: Iterable[str], section: str, where: Any) -> None:
    """Names become directories. Two that differ in case only are one on some file systems."""
    seen: dict[str, str] = {}
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{where(section, name)}: names a directory; use letters, digits and _ . + = @ -")
        if name.lower() in seen:
            raise ConfigError(f"{where(section, name)}: differs from {seen[name.lower()]} in case only; rename one")
        seen[name.lower()] = name
    if not seen:
        raise ConfigError(f"{where(section)}: empty; name at least one")


def _check_owned(study: Study) -> None:
    """Refuse settings that the study gives to each run itself."""
    file, where = study.file, study.where
    trees: dict[KeyPath, Settings] = {("base",): file.base}
    trees |= {("beds", bed): settings for bed, settings in file.beds.items()}
    trees |= {("arms", arm): settings for arm, settings in file.arms.items()}
    for tuned, each in (file.tuning.trials if file.tuning else {}).items():
        trees |= {("tuning", "trials", tuned, index): settings for index, settings in enumerate(each)}
    for place, settings in trees.items():
        keys = {".".join(map(str, key)) for key in _leaves(nested(settings))}
        owned = OWNED | ({"train.steps": "budget"} if place[0] != "base" or file.budget.steps is not None else {})
        for key, ours in owned.items():
            if key in keys:
                raise ConfigError(f"{where(*place)}: {key} is the study's; it sets it from `{ours}`")


def _check_tuning(study: Study) -> None:
    file, where = study.file, study.where
    if file.tuning is None:
        return
    for arm in file.tuning.trials:
        if arm not in file.arms:
            raise ConfigError(f"{where('tuning', 'trials', arm)}: not an arm; there are {', '.join(file.arms)}")
    counts = {arm: len(file.tuning.trials.get(arm, [])) for arm in file.arms}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        shown = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        raise ConfigError(f"{where('tuning', 'trials')}: every arm gets the same number of trials; here: {shown}")
    if shared := sorted(set(file.tuning.seeds) & set(file.seeds)):
        raise ConfigError(
            f"{where('tuning', 'seeds')}: {shared[0]} is also one of seeds; tune on seeds that the result does not use"
        )
    _check_once(file.tuning.seeds, where("tuning", "seeds"))


def _check_contrasts(study: Study) -> None:
    where = study.where
    for index, pair in enumerate(study.file.contrasts):
        for arm in pair:
            if arm not in study.file.arms:
                raise ConfigError(
                    f"{where('contrasts', index)}: {arm} is not an arm; there are {', '.join(study.arms)}"
                )
        if pair[0] == pair[1]:
            raise ConfigError(f"{where('contrasts', index)}: {pair[0]} against itself; give two arms")


def _check_settings(study: Study) -> None:
    """Every run's settings are valid, and no arm is another one."""
    for bed in study.beds:
        known: dict[str, str] = {}
        for arm in study.arms:
            config = study.config(bed, arm, study.file.seeds[0])
            _check_schedules(study, config, arm)
            settings = repr(computed_settings(config))
            if settings in known:
                raise ConfigError(
                    f"{study.where('arms', arm)}: the same settings as {known[settings]}; remove one of them"
                )
            known[settings] = arm
            for trial in range(study.trials):
                study.config(bed, arm, study.file.seeds[0], trial)


def _check_schedules(study: Study, config: Config, arm: str) -> None:
    """A schedule goes by steps, so it needs to know how many there are."""
    if config.train.steps != MOST_STEPS or study.file.budget.steps is not None:
        return
    keys = [key for key in dotted_keys() if key.endswith("schedule")]
    for key in keys:
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name, "constant") != "constant":
            raise ConfigError(
                f"{study.where('arms', arm)}: {key} follows steps, and the budget is not in steps; set train.steps in "
                "base"
            )


def _check_once(items: Iterable[int | str], where: str) -> None:
    """Raise ConfigError for an item that is given twice."""
    seen: set[int | str] = set()
    for item in items:
        if item in seen:
            raise ConfigError(f"{where}: {item} is given twice; keep one")
        seen.add(item)
