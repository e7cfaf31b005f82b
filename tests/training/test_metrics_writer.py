import json
import math
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vdr_cli.config import ObserveConfig
from vdr_cli.data.metrics import read_metrics
from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.training.metrics_writer import MetricsWriter

PLAIN = ObserveConfig(tensorboard=False)


def test_a_line_a_step_and_non_finite_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN) as writer:
        writer.log(1, {"reward": 0.5, "kl": math.nan})
        writer.log(2, {"reward": math.inf})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before close
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "reward": 0.5, "kl": None},
        {"step": 2, "reward": None},
    ]
    read = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert read[0]["reward"] == 0.5
    assert math.isnan(read[0]["kl"])


def test_truncate_drops_later_and_torn_lines(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN) as writer:
        for step in range(1, 6):
            writer.log(step, {"reward": step})
    with (tmp_path / "metrics.jsonl").open("ab") as torn:
        torn.write(b'{"step": 3, "\xff\n{"step": 3, "\xc3')  # the half of a character
    with MetricsWriter(tmp_path, PLAIN) as writer:
        writer.truncate(3)
        writer.log(4, {"reward": 40.0})
    read = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(line["step"], line["reward"]) for line in read] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_that_come_later_join_their_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"reward": step, "kl": math.nan})
    for value in (0.5, 0.25):  # the second time after a kill: the checkpoint does not know of the first
        with MetricsWriter(tmp_path, PLAIN) as writer:
            writer.truncate(2)
            writer.amend(2, {"eval/pass@1": value})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "reward": 1, "kl": None}
    assert json.loads(second) == {"step": 2, "reward": 2, "kl": None, "eval/pass@1": 0.25}
    with MetricsWriter(tmp_path / "other", PLAIN) as writer:  # a run that goes on from another run's checkpoint
        writer.amend(2, {"eval/pass@1": 0.5})
    assert list(read_metrics(tmp_path / "other" / "metrics.jsonl")) == [{"step": 2, "eval/pass@1": 0.5}]


def test_reading_leaves_out_a_torn_end_and_names_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2')
    assert len(list(read_metrics(path))) == 1
    for rubbish in (b"rubbish", b"\xff", b"9" * 5000, b'{"step": 2, "loss": "low"}'):
        path.write_bytes(b'{"step": 1, "a": 1}\n' + rubbish + b"\n")
        with pytest.raises(DataError, match=r"metrics.jsonl:2"):
            list(read_metrics(path))


def test_tensorboard_purges_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, ObserveConfig()) as writer:
        for step in range(1, 5):
            writer.log(step, {"reward": step})
    with MetricsWriter(tmp_path, ObserveConfig()) as writer:
        writer.truncate(2)
        writer.amend(2, {"eval/reward": 20})
        writer.log(3, {"reward": 30})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 1), (2, 2), (3, 30)]
    assert [(event.step, event.value) for event in events.Scalars("eval/reward")] == [(2, 20)]


def test_wandb_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        MetricsWriter(tmp_path, ObserveConfig(wandb=True, tensorboard=False))


class FakeWandb:
    """The part of wandb that a run uses. refusal: what `init` raises."""

    util = SimpleNamespace(generate_id=lambda: "id")

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal, self.calls = refusal, list[str]()

    def init(self, **_: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(f"log {step}")

    def finish(self) -> None:
        self.calls.append("finish")


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb.errors.UsageError and CommError are exceptions of its own."""
    refusal = type("UsageError", (Exception,), {})("No API key configured.\nUse `wandb login` to log in.")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refusal))
    line = r"^observe.wandb: .* \(No API key configured. Use .*\); run `wandb login`, set WANDB_MODE=offline, or .*$"
    with pytest.raises(MachineError, match=line):
        MetricsWriter(tmp_path, ObserveConfig(wandb=True, tensorboard=False))


def test_wandb_is_finished_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    with MetricsWriter(tmp_path, ObserveConfig(wandb=True, tensorboard=False)) as writer:
        writer.log(1, {"reward": 0.5})
        writer.finish_wandb()
        assert wandb.calls == ["log 1", "finish"]
    assert wandb.calls == ["log 1", "finish"]
    with MetricsWriter(tmp_path, ObserveConfig(wandb=True, tensorboard=False)):
        pass
    assert wandb.calls == ["log 1", "finish", "finish"]


def test_a_full_disk_costs_no_line(tmp_path: Path) -> None:
    """The limit of a file's size cuts a write in the middle, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, PLAIN) as writer:
        writer.log(1, {"reward": 0.5})
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, hard))
        try:
            for step in (2, 3):
                with pytest.raises(MachineError, match=r"metrics cannot be written"):
                    writer.log(step, {"reward": 0.5})
                assert path.read_bytes() == whole
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.log(4, {"reward": 0.5})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
