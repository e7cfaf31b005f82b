"""`vdr train`: the flags. What they start is in training.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vdr_cli.cli.options import (
    LAUNCH,
    Exclude,
    Hostfile,
    Include,
    Launcher,
    MasterAddr,
    MasterPort,
    NodeRank,
    NoSsh,
    NumProcesses,
    RewardOption,
    SetOption,
    SshPort,
    config_from,
    ds_configs,
    reward_settings,
    run_config_of,
    values_of,
)

EXAMPLES = (
    "vdr train                             # the embedded task, in minutes",
    "vdr train --mode per_token --members 16 --output runs/wide",
    "vdr train --model Qwen/Qwen3-0.6B --data rows.jsonl --reward mine.py:right",
    "vdr train run.yaml --set grpo.beta=0.01 --dry-run",
    "vdr train --output runs/wide --resume auto --steps 1000",
    "vdr train run.yaml --hostfile hosts --ds-config zero3_offload",
    "vdr recipes list                      # complete files to start from",
)

DISAGREEMENT = "Disagreement"
ROLLOUT = "Rollout and update"
RUN = "The run"


def command(
    context: typer.Context,
    config_file: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="Settings; flags go over it.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Run directory. Default: a new one in runs/.", rich_help_panel=RUN)
    ] = None,
    model: Annotated[str | None, typer.Option(help="starter, a local directory, a run, or a hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="starter, a JSONL/CSV/Parquet file, a directory, or a hub id.")
    ] = None,
    reward: RewardOption = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="Where members are compared: none, per_token or end_of_sequence.",
            rich_help_panel=DISAGREEMENT,
            autocompletion=values_of("disagreement.mode"),
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="bald (any token) or rmi (the sampled one).",
            rich_help_panel=DISAGREEMENT,
            autocompletion=values_of("disagreement.measure"),
        ),
    ] = None,
    members: Annotated[int | None, typer.Option(help="M, dropout members.", rich_help_panel=DISAGREEMENT)] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the bonus.", rich_help_panel=DISAGREEMENT)] = None,
    group_size: Annotated[
        int | None, typer.Option(help="G, completions of one prompt.", rich_help_panel=ROLLOUT)
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest completion.", rich_help_panel=ROLLOUT)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.", rich_help_panel=ROLLOUT)] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="grpo, dr_grpo, dapo, bnpo, cispo, gspo or sapo.",
            rich_help_panel=ROLLOUT,
            autocompletion=values_of("grpo.loss"),
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=RUN)] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts, samples and members.", rich_help_panel=RUN)] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH", help="Go on from the newest checkpoint of --output, or from PATH.", rich_help_panel=RUN
        ),
    ] = None,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the settings and the plan.", rich_help_panel=RUN)
    ] = False,
    ds_config: Annotated[
        str | None,
        typer.Option(
            help="zero3, zero2, zero1, zero3_offload, or a DeepSpeed JSON.",
            rich_help_panel=LAUNCH,
            autocompletion=ds_configs,
        ),
    ] = None,
    num_processes: NumProcesses = None,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    ssh_port: SshPort = None,
    launcher: Launcher = None,
    no_ssh: NoSsh = None,
    node_rank: NodeRank = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="Restarts from the newest checkpoint after a fault.", rich_help_panel=LAUNCH)
    ] = None,
) -> None:
    """Fine-tune a model with GRPO and the disagreement bonus."""
    flags = {
        ("--output", "train.output"): _run_of(resume) if output is None else output,
        ("--model", "model.name"): model,
        ("--data", "data.name"): data,
        ("--reward", "rewards.functions"): reward_settings(reward),
        ("--mode", "disagreement.mode"): mode,
        ("--measure", "disagreement.measure"): measure,
        ("--members", "disagreement.members"): members,
        ("--weight", "disagreement.weight"): weight,
        ("--group-size", "rollout.group_size"): group_size,
        ("--max-new-tokens", "rollout.max_new_tokens"): max_new_tokens,
        ("--learning-rate", "train.learning_rate"): learning_rate,
        ("--loss", "grpo.loss"): loss,
        ("--steps", "train.steps"): steps,
        ("--seed", "train.seed"): seed,
        ("--ds-config", "engine.ds_config"): ds_config,
        ("--num-processes", "launch.num_processes"): num_processes,
        ("--hostfile", "launch.hostfile"): hostfile,
        ("--include", "launch.include"): include,
        ("--exclude", "launch.exclude"): exclude,
        ("--master-addr", "launch.master_addr"): master_addr,
        ("--master-port", "launch.master_port"): master_port,
        ("--ssh-port", "launch.ssh_port"): ssh_port,
        ("--launcher", "launch.launcher"): launcher,
        ("--no-ssh", "launch.no_ssh"): no_ssh,
        ("--node-rank", "launch.node_rank"): node_rank,
        ("--max-restarts", "launch.max_restarts"): max_restarts,
    }  # fmt: skip
    config = config_from(_settings_file(config_file, resume, flags), overrides, flags)
    from vdr_cli.cli.training import start

    raise typer.Exit(start(config, resume, dry_run, context.obj))


def _run_of(resume: str | None) -> str | None:
    """The run directory of a checkpoint given by path: RUN/checkpoints/step_000100."""
    if resume in (None, "auto"):
        return None
    folder = Path(str(resume)).absolute().parent
    return os.path.relpath(folder.parent) if folder.name == "checkpoints" else None


def _settings_file(config_file: str | None, resume: str | None, flags: dict[tuple[str, str], Any]) -> str | Path | None:
    """The file typed; with --resume and none typed, the settings that the run was started with."""
    output = flags[("--output", "train.output")]
    if config_file is not None or resume is None or output is None:
        return config_file
    whose = _run_of(resume)
    return run_config_of(output) or (run_config_of(whose) if whose else None)
