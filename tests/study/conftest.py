"""A study that has run, without running it: counts and metrics drawn from known rates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdr_cli.config.load import dump_given
from vdr_cli.study.directory import StudyDirectory, study_tree
from vdr_cli.study.load import Study, study_of
from vdr_cli.study.plan import Task, tasks_of

EFFECTS = {"grpo": (0.0, 0.0), "disagreement": (0.0, 0.0), "pass_at_k": (-0.25, 0.9), "bald per token": (-0.1, -0.7)}
"""Arm to what it adds to a run's log-odds of solving a problem, and to those of hard problems."""


def study_with(names: Sequence[str], folder: Path, **more: Any) -> Study:
    """A study whose arms differ in their learning rate, which nothing here uses."""
    tree = {
        "output": str(folder),
        "arms": {
            arm.replace(" ", "_"): {"train.learning_rate": 1e-4 + index * 1e-5} for index, arm in enumerate(names)
        },
        "control": names[0],
        "seeds": 20,
        "budget": {"steps": 40},
        **more,
    }
    return study_of(tree, "study.yaml")


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., tuple[Study, StudyDirectory]]:
    """make_study(effects, prompts=64, **keys): the study and its directory, as if every run had ended."""

    def make(
        effects: Mapping[str, tuple[float, float]] = EFFECTS, prompts: int = 64, folder: str = "wide", **more: Any
    ) -> tuple[Study, StudyDirectory]:
        study = study_with(list(effects), tmp_path / folder, **more)
        directory = StudyDirectory(tmp_path / folder)
        fill(study, directory, {arm.replace(" ", "_"): effect for arm, effect in effects.items()}, prompts)
        return study, directory

    return make


def fill(
    study: Study, directory: StudyDirectory, effects: Mapping[str, tuple[float, float]], prompts: int, seed: int = 0
) -> None:
    """Write the counts and the metrics of every task."""
    directory.path.mkdir(parents=True)
    (directory.path / "study.yaml").write_text(json.dumps(study_tree(study)))
    generator = np.random.default_rng(seed)
    hardness = generator.normal(1.0, 1.5, (len(study.beds), prompts))
    shared = {run: generator.normal(0.0, 0.15) for run in (study.file.tuning.seeds if study.file.tuning else [])}
    shared |= {run: generator.normal(0.0, 0.15) for run in study.file.seeds}
    for task in tasks_of(study):
        level, wide = effects[task.arm] if task.arm is not None else (-0.9, 1.6)
        hard = hardness[study.beds.index(task.bed)]
        odds = 0.6 + level - hard * (1.6 - 0.6 * wide) + shared.get(task.seed or 0, 0.0)
        odds += generator.normal(0.0, 0.12) + generator.normal(0.0, 0.3, prompts)
        write_counts(study, directory, task, 1 / (1 + np.exp(-odds)), generator)
        if not task.is_start:
            write_metrics(directory, task, level, generator)
            write_config(study, directory, task)


def write_counts(
    study: Study, directory: StudyDirectory, task: Task, rates: np.ndarray, generator: np.random.Generator
) -> None:
    asked = study.file.evaluation
    samples = asked.start_samples if task.is_start else asked.samples
    solved = generator.binomial(samples, rates)
    counts = {
        "request": "drawn",
        "samples": samples,
        "rows": list(range(len(rates))),
        "solved": solved.tolist(),
        "classes": np.minimum(solved, generator.integers(1, 5, len(rates))).tolist(),
        "reward": (solved / samples).round(6).tolist(),
    }
    path = directory.evaluation(task)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(counts))


def write_config(study: Study, directory: StudyDirectory, task: Task) -> None:
    """The run's config.yaml, with what differs from the defaults."""
    assert task.arm is not None and task.seed is not None
    text = dump_given(study.config(task.bed, task.arm, task.seed, task.trial))
    (directory.run(task) / "config.yaml").write_text(text)


def write_metrics(directory: StudyDirectory, task: Task, level: float, generator: np.random.Generator) -> None:
    lines = []
    for step in range(41):
        rise = 0.2 + (0.4 + 0.2 * level) * (1 - math.exp(-step / 12))
        line: dict[str, float] = {"step": step}
        if step:
            line |= {"solved": rise, "reward": rise + generator.normal(0, 0.03), "entropy": 1.2 * math.exp(-step / 30)}
            line |= {"step_time": 0.5, "sampled_tokens": step * 1500.0}
        if step % 10 == 0:
            line |= {"eval/pass@1": rise + generator.normal(0, 0.02), "eval/pass@8": 0.9 - step / 200}
        lines.append(json.dumps(line))
    (directory.run(task) / "metrics.jsonl").write_text("\n".join(lines) + "\n")
