"""Every source of the bonus is recomputed by the audit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from vdr_cli.audit import sources, states
from vdr_cli.audit.audit import settings_of
from vdr_cli.audit.files import RunFiles
from vdr_cli.audit.lines import Judge
from vdr_cli.audit.numbers import audit_export
from vdr_cli.config import Config
from vdr_cli.exploration.sources import SOURCES


def test_no_source_is_silently_taken_from_the_record() -> None:
    """Disagreement has its own way (audit/members.py); functions of the user's are named as left out."""
    assert set(sources.SOURCES) | set(states.SOURCES) | {"disagreement"} == set(SOURCES)


def test_a_step_is_audited_by_the_steps_of_its_time(tmp_path: Path) -> None:
    """A run that was resumed with more steps had another schedule when it made its first records."""
    run = RunFiles(tmp_path, Config.model_validate({"train": {"steps": 8}}), {})
    assert settings_of(run, SimpleNamespace(state={"steps": 4})).train.steps == 4  # type: ignore[arg-type]
    assert settings_of(run, SimpleNamespace(state={})).train.steps == 8  # type: ignore[arg-type]


def test_an_older_export_is_not_compared(tmp_path: Path) -> None:
    """The run was resumed, and interrupted before it wrote its model again."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    models = SimpleNamespace(run=RunFiles(tmp_path, Config(), {}), at=lambda step: None)
    (line,) = audit_export(Judge(3, "float32"), Config(), models)  # type: ignore[arg-type]
    assert line.within is None and "has not ended since it was resumed" in line.note
