"""The audit of a run: steps, in sections, to lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vdr_cli.audit import evaluation, inputs, metrics, numbers, signal, sources, states
from vdr_cli.audit.files import Record, RunFiles, open_run
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.audit.weights import Models
from vdr_cli.config import Config
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.system.files import write_whole

OF_A_STEP = ("inputs", "rewards", "sampling", "members", "advantages", "policy", "update", "metrics")
SECTIONS = (*OF_A_STEP, "evaluation", "export")
"""Values of --only: a step's parts in its order, evaluations, and last the model that the run exported."""


def audit_run(
    path: str | Path,
    steps: Sequence[int] | None = None,
    only: Iterable[str] = SECTIONS,
    tell: Callable[[str], None] | None = None,
) -> list[Line]:
    """Every line of these steps; None: all that have a record. tell: what is being done, for a person who waits.

    Raises ConfigError when the run or a step cannot be audited, DataError when its files are damaged.
    """
    run = open_run(Path(path))
    chosen = run.steps if steps is None else list(steps)
    missing = [step for step in chosen if step not in run.steps]
    if missing:
        there = ", ".join(map(str, run.steps))
        raise ConfigError(f"{path}: step {missing[0]} has no audit record; there are {there}")
    parts = set(only)
    lines: list[Line] = []
    models: Models | None = None
    for step in sorted(chosen):
        record = run.record(step)
        if models is None or models.dtype != record.state["dtype"]:
            models = Models(run, record.state["dtype"])
        lines += audit_step(run, record, models, parts, tell or (lambda text: None))
    if "evaluation" in parts and models is not None:
        for step in (step for step in run.evaluations if steps is None or step in steps):
            record = run.record(step, "eval")
            judge = Judge(step, record.state["dtype"])
            lines += evaluation.audit(judge, record, run.config, models, run.metrics.get(step, {}))
    if "export" in parts and models is not None:
        last = max(run.metrics, default=0)
        lines += numbers.audit_export(Judge(last, models.dtype), run.config, models)
    return lines


def settings_of(run: RunFiles, record: Record) -> Config:
    """The run's settings when it made the record: a run that was resumed may have got more steps since."""
    steps = record.state.get("steps", run.config.train.steps)
    return run.config.model_copy(update={"train": run.config.train.model_copy(update={"steps": steps})})


def audit_step(
    run: RunFiles, record: Record, models: Models, only: set[str], tell: Callable[[str], None]
) -> list[Line]:
    """The lines of one step."""
    cfg, judge = settings_of(run, record), Judge(record.step, record.state["dtype"])
    stride = cfg.grpo.updates_per_rollout
    on_file = run.metrics.get(record.step + stride, {})
    if record.step + stride in run.evaluations:  # its numbers have lines of their own
        on_file = {name: value for name, value in on_file.items() if not name.startswith("eval/")}
    before = run.record(record.step - stride) if record.step - stride in run.steps else None
    of_update: dict[str, float] = {}

    def advantages() -> list[Line]:
        counts = cfg.bonus_source == "counts"
        earlier = [run.record(step) for step in run.steps if step < record.step] if counts else []
        return sources.audit_visits(judge, record, cfg, earlier) + signal.audit(judge, record, cfg, before)

    def updated() -> list[Line]:
        lines, found = numbers.audit_update(judge, record, cfg, models, on_file)
        of_update.update(found)
        return lines

    def logged() -> list[Line]:
        saved = run.completions(record.step + stride)
        lines = metrics.audit(judge, record, cfg, on_file, of_update)
        entropy = run.metrics.get(record.step, {}).get("entropy")
        lines += metrics.audit_entropy_control(judge, record, cfg, before, entropy)
        return lines + metrics.audit_completions(judge, record, cfg, saved)

    sections: dict[str, Callable[[], list[Line]]] = {
        "inputs": lambda: inputs.audit(judge, record, cfg, models),
        "rewards": lambda: inputs.audit_rewards(judge, record, cfg),
        "sampling": lambda: numbers.audit_sampling(judge, record, cfg, models),
        "members": lambda: numbers.audit_members(judge, record, cfg, models) + states.audit(judge, record, cfg, models),
        "advantages": advantages,
        "policy": lambda: numbers.audit_policy(judge, record, cfg, models),
        "update": updated,
        "metrics": logged,
    }
    lines: list[Line] = []
    for name, section in sections.items():
        if name in only:
            tell(f"step {record.step}: {name}")
            lines += section()
    return lines


def write_json(lines: Sequence[Line], path: Path, run: str) -> None:
    """All lines as one JSON object. MachineError when it cannot be written."""
    content: dict[str, Any] = {
        "run": run,
        "within": not any(line.within is False for line in lines),
        "lines": [line.as_json() for line in lines],
    }
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror or error}") from error
