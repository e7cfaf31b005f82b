"""A run goes on from the right checkpoint, and is alone in its directory."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.config.load import load_config
from vdr_cli.data.order import stream_indices
from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.system.stopping import StopSignal
from vdr_cli.training import opening
from vdr_cli.training.opening import Run, _check_end, _choose_checkpoint, _drawn, _prepare_directory
from vdr_cli.training.state import LoopState


def test_damaged_checkpoints_are_no_reason_to_start_again(tmp_path: Path) -> None:
    """From its start the run would write over its metrics, completions and checkpoints."""
    assert _choose_checkpoint(tmp_path, "auto") == (None, [])
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(MachineError, match=r"no checkpoint of .* is complete: .*step_000002 passed over: manifest"):
        _choose_checkpoint(tmp_path, "auto")
    assert _choose_checkpoint(tmp_path, None) == (None, [])


def test_a_home_directory_that_the_shell_left_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "step_000002"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "manifest.json").write_text(json.dumps({"files": checkpoints._digests(checkpoint)}))
    monkeypatch.setenv("HOME", str(tmp_path))
    found, _ = _choose_checkpoint(tmp_path, "~/step_000002")
    assert found is not None and found.path == checkpoint


def test_a_directory_where_another_process_writes_is_left_alone(tmp_path: Path, writer_elsewhere) -> None:
    config, run = load_config(), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("theirs")
    with writer_elsewhere(run), ExitStack() as stack:
        for fresh in (True, False):
            with pytest.raises(ConfigError, match=f"train.output {run}: another process is writing this run"):
                _prepare_directory(run, config, fresh, stack)
        assert (run / "config.yaml").read_text() == "theirs"
    with ExitStack() as stack:
        _prepare_directory(run, config, False, stack)
        with writer_elsewhere(run, refused=True):
            assert (run / "config.yaml").read_text() != "theirs"
    with writer_elsewhere(run):
        pass


def test_a_model_without_an_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Every completion is cut at the limit, which with mask_truncated leaves nothing to learn from."""
    _check_end(load_config(), [1])
    _check_end(load_config(overrides=["rollout.stop=[x]"]), [])
    assert not caplog.records
    _check_end(load_config(), [])
    assert "have no EOS token: every completion is cut" in caplog.text and "set rollout.stop" in caplog.text
    with pytest.raises(ConfigError, match=r"grpo.mask_truncated leaves nothing to train on: .* no EOS token"):
        _check_end(load_config(overrides=["grpo.mask_truncated=true"]), [])


def test_the_watchdog_knows_how_long_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their evaluations and checkpoints: a signal is looked at after all of it."""
    clock, noted = iter([13.0, 33.0]), list[float]()
    monkeypatch.setattr(opening, "monotonic", lambda: next(clock))
    monkeypatch.setattr(opening.watchdog, "note_step", noted.append)
    monkeypatch.setattr(opening.collectives, "all_reduce_max", lambda values: values)
    nothing: Any = None
    run = Run(nothing, LoopState(longest_step=8.0), nothing, nothing, StopSignal(), looked_at=10.0)
    assert not run.stopped() and not run.stopped()
    assert noted == [8.0, 20.0], "the first is from before the resume"
    assert LoopState.restored(run.state.saved()).longest_step == 20.0


def test_ranks_agree_on_how_long_a_step_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "monotonic", lambda: 13.0)
    monkeypatch.setattr(opening.collectives, "all_reduce_max", lambda values: [values[0], max(values[1], 5.0)])
    nothing: Any = None
    run = Run(nothing, LoopState(), nothing, nothing, StopSignal(), looked_at=10.0)
    assert not run.stopped() and run.state.longest_step == 5.0


def test_the_rows_that_a_run_draws() -> None:
    """Each once, in the order of the stream, and more where stalled groups are replaced."""
    settings = ["train.steps=4", "grpo.num_iterations=2", "train.prompts_per_step=3", "data.shuffle=false"]
    assert _drawn(load_config(overrides=settings), 100) == list(range(6))
    assert _drawn(load_config(overrides=settings), 5) == list(range(5))
    assert len(_drawn(load_config(overrides=[*settings, "grpo.resample_groups=2"]), 100)) == 18
    shuffled = load_config(overrides=[*settings[:3], "train.seed=7"])
    assert _drawn(shuffled, 100) == stream_indices(100, 0, 6, 7, True)
