"""`vdr train`: the options. training.py runs what they ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vdr_cli.cli.options import (
    LAUNCH,
    LAUNCH_FLAGS,
    Flag,
    RewardOption,
    SetOption,
    Typed,
    config_from,
    panel,
    reward_settings,
    run_config_of,
    takes,
)
from vdr_cli.errors import ConfigError

EXAMPLES = (
    "vdr train                             # the embedded task, in minutes",
    "vdr train --mode per_token --members 16 --output runs/wide",
    "vdr train --model Qwen/Qwen3-0.6B --data rows.jsonl --reward mine.py:right",
    "vdr train run.yaml --set grpo.beta=0.01 --dry-run",
    "vdr train --output runs/wide --resume auto --steps 1000",
    "vdr train run.yaml --hostfile hosts --ds-config zero3_offload",
    "vdr recipes list                      # complete files to start from",
)

RUN = "The run"

FLAGS = (
    Flag("--model", "model.name"),
    Flag("--data", "data.name"),
    *panel(RUN, "train.output", "train.steps", "train.seed", "train.eval_k"),
    Flag("--bonus", "bonus.source", "Bonus"),
    *panel("Bonus", "bonus.weight", *(f"disagreement.{key}" for key in ("mode", "measure", "members"))),
    *panel("Rollout and update", "rollout.group_size", "rollout.max_new_tokens", "train.learning_rate", "grpo.loss"),
    *panel(LAUNCH, "engine.ds_config"),
    *LAUNCH_FLAGS,
    *panel(LAUNCH, "launch.max_restarts"),
)


@takes(FLAGS)
def command(
    context: typer.Context,
    typed: Typed,
    config_file: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="Settings; command-line options override it.")
    ] = None,
    reward: RewardOption = None,
    overrides: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Continue from the newest checkpoint of --output, or from the checkpoint PATH.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything; print the plan and the settings that differ from the defaults.",
            rich_help_panel=RUN,
        ),
    ] = False,
    all_settings: Annotated[
        bool, typer.Option("--all", help="With --dry-run: print every setting.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Fine-tune a model with GRPO and an exploration bonus: disagreement, unless --bonus names another."""
    if all_settings and not dry_run:
        raise ConfigError("--all shows every setting, with --dry-run only; add --dry-run")
    run = _run_of(resume)
    if typed["train.output"] is None and not _names_output(config_file, overrides):
        typed = typed.also("--output", "train.output", run)
    settings_file = _settings_file(config_file, resume, typed["train.output"], run)
    config = config_from(settings_file, overrides, typed.also("--reward", "rewards.functions", reward_settings(reward)))
    from vdr_cli.cli.training import start

    raise typer.Exit(start(config, resume, dry_run, context.obj, all_settings))


def _run_of(resume: str | None) -> str | None:
    """The run directory of a checkpoint given by path: RUN/checkpoints/step_000100."""
    from vdr_cli.config.paths import checked_path

    if resume is None or resume == "auto":
        return None
    folder = checked_path(resume, "--resume").absolute().parent
    return os.path.relpath(folder.parent) if folder.name == "checkpoints" else None


def _names_output(config_file: str | None, overrides: list[str] | None) -> bool:
    """True when the file or --set says which directory the run is to have."""
    from vdr_cli.config.load import read_document

    section = read_document(config_file).tree.get("train") if config_file is not None else None
    in_file = isinstance(section, dict) and section.get("output") is not None
    return in_file or any(override.startswith("train.output=") for override in overrides or ())


def _settings_file(
    config_file: str | None, resume: str | None, output: str | None, run: str | None
) -> str | Path | None:
    """The file typed; with --resume and none typed, the settings that the run was started with.

    run: that of the checkpoint that --resume names.
    """
    if config_file is not None or resume is None:
        return config_file
    return (run_config_of(output) if output else None) or (run_config_of(run) if run else None)
