"""The log of a run's first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from vdr_cli.config import Config
from vdr_cli.config.schema import ObserveConfig
from vdr_cli.exploration.collapse import watch_of
from vdr_cli.rewards.watch import RewardWatch
from vdr_cli.training import run_log
from vdr_cli.training.metrics_writer import MetricsWriter
from vdr_cli.training.run_log import RunLog, counters, sampler_warning
from vdr_cli.training.state import LoopState

APART = {"sampling/sampling_logp_difference/mean": 0.2}


def test_a_sampler_that_is_not_the_policy_is_reported_with_the_number() -> None:
    assert "0.200 nats per token apart with the same weights" in str(sampler_warning(Config(), 1, APART))


@pytest.mark.parametrize(
    ("settings", "step", "metrics"),
    [
        ({}, 1, {"sampling/sampling_logp_difference/mean": 0.007}),
        ({}, 1, {"sampling/sampling_logp_difference/mean": float("nan")}),
        ({}, 1, {}),
        ({}, 2, APART),
        ({"grpo": {"num_iterations": 2}, "train": {"steps": 2}}, 1, APART),
        ({"rollout": {"members": True}}, 1, APART),
    ],
    ids=["rounding", "refused", "not measured", "later", "several updates", "members"],
)
def test_what_other_weights_or_rounding_explain_is_not(settings: dict, step: int, metrics: dict) -> None:
    assert sampler_warning(Config.model_validate(settings), step, metrics) is None


def test_tokens_are_counted_as_trl_counts_them() -> None:
    """Prompt and completion tokens of every completion; an epoch is a pass over the rows."""
    state = LoopState(drawn=30, tokens=7, prompt_tokens=50)
    assert counters(state, rows=20) == {"num_tokens": 57.0, "sampled_tokens": 7.0, "epoch": 1.5}


class Notes:
    """A live view that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def evaluated(folder: Path, notes: Notes, values: list[float], resume_at: int | None = None) -> None:
    """A log that is given held-out pass@8 of these values, after a resume at that step if there is one."""
    with MetricsWriter(folder, ObserveConfig(tensorboard=False)) as writer:
        log = RunLog(folder, writer, notes, None, RewardWatch([], 10), watch_of(Config()))  # type: ignore[arg-type]
        if resume_at is not None:
            log.truncate(resume_at)
        for value in values:
            log.evaluation(0, {"eval/pass@1": 0.5, "eval/pass@8": value, "eval/pass@8_high": value + 0.01})


def test_a_collapse_is_reported_once_also_over_a_resume(tmp_path: Path) -> None:
    notes = Notes()
    evaluated(tmp_path, notes, [0.9, 0.5])
    assert not any("has fallen" in line for line in notes.lines)
    evaluated(tmp_path, notes, [0.5, 0.4], resume_at=0)
    evaluated(tmp_path, notes, [0.3], resume_at=0)
    assert [line.partition(":")[0] for line in notes.lines if "fallen" in line] == [
        "held-out pass@8 has fallen from 0.900 to 0.500"
    ]


def test_ranks_wait_until_all_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends rank 0 when another rank exits after Ctrl-C."""
    events: list[str] = []

    @contextmanager
    def agreed() -> Iterator[None]:
        yield
        events.append("everybody is here")

    monkeypatch.setattr(run_log.collectives, "agreed", agreed)
    writer = SimpleNamespace(finish_wandb=lambda: events.append("uploaded"))
    for mine in (writer, None):  # rank 0, and any other
        RunLog(tmp_path, mine, None, None, RewardWatch([], 10), watch_of(Config())).finish_uploads()  # type: ignore[arg-type]
    assert events == ["uploaded", "everybody is here", "everybody is here"]
