"""`vdr plan`: memory per GPU and bytes over the network per step, before anything is rented."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.cli.options import Flag, SetOption, Typed, config_from, takes
from vdr_cli.errors import ConfigError
from vdr_cli.system.text import first_line

if TYPE_CHECKING:
    from rich.table import Table

    from vdr_cli.config import Config
    from vdr_cli.planning.shape import Shape
    from vdr_cli.planning.work import Work

EXAMPLES = (
    "vdr plan --model 7B --gpus 8                    a model size on 8 GPUs",
    "vdr plan run.yaml --hostfile hosts              a run on the slots of a hostfile",
    "vdr plan --model 70B --gpus 64 --gpu-memory 80 --set model.gradient_checkpointing=true",
)

GIB = 1 << 30
HOMES = {"device": "whole on every GPU", "sharded": "a share on every GPU", "host": "in the host's memory"}
FITS = 0.9
"""Share of a GPU's memory that may be planned for: kernels, NCCL and fragmentation need the rest."""


FLAGS = (
    Flag("--model", "model.name", note="Also accepts a size: 0.5B, 7B, 32B or 70B."),
    Flag("--ds-config", "engine.ds_config"),
    Flag("--hostfile", "launch.hostfile", note="Its slots count as GPUs."),
)


@takes(FLAGS)
def command(
    typed: Typed,
    config_file: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings of a run; command-line options override it.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs over all hosts.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens in the longest prompt.")] = 512,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GiB per GPU, to say whether the run fits.")] = None,
    bandwidth: Annotated[float, typer.Option(min=0.1, help="Network bandwidth per GPU, in Gbit/s.")] = 100.0,
    overrides: SetOption = None,
) -> None:
    """Memory per GPU and network bytes per step, by the formulas of docs/cluster.md."""
    from vdr_cli.launch.reexec import world_size
    from vdr_cli.planning.resources import home_of, server_share, wants_layers, weights_of

    config = config_from(config_file, overrides, typed)
    shape = find_shape(config.model.name)
    work = work_of(config, gpus or world_size(config.launch), prompt_tokens)
    gpu_bytes = None if gpu_memory is None else gpu_memory * GIB
    work = replace(work, by_layers=wants_layers(config.engine.gather, shape, work, gpu_bytes), gpu_bytes=gpu_bytes)
    show(config.model.name, shape, work, gpu_memory, bandwidth)
    for name, judge in zip(reward_model_names(config), work.reward_models, strict=True):
        print(
            f"reward model {name}: {weights_of(judge) / GIB:.1f} GiB, {HOMES[home_of(judge, work)]} between two steps"
        )
    if gpu_bytes is not None and config.rollout.vllm.python is not None:
        sleeps = config.rollout.vllm.sleep
        share = server_share(shape, work, gpu_bytes, sleeps)
        when = "between rollouts asleep" if sleeps else "never asleep (rollout.vllm.sleep)"
        print(f"a vLLM server on the same GPU, {when}: {share:.2f} of its memory")
    if config.model.lora is not None:
        print("model.lora: counted as if all parameters were trained; adapters need less")


def reward_model_names(config: Config) -> list[str]:
    """Directories and hub ids of the reward models."""
    names = [entry.name for entry in config.rewards.functions]
    return [name.removeprefix("model:") for name in names if name.startswith("model:")]


def find_shape(name: str, setting: str = "--model ") -> Shape:
    """A size by name, a config.json in a directory, or the hub's. setting: how errors begin, before the name."""
    from vdr_cli.planning.shape import SIZES, shape_of

    if name in SIZES:
        return SIZES[name]
    try:
        return shape_of(_config_json(name, setting))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # a file of anything
        raise ConfigError(f"{setting}{name}: its config.json cannot be used ({first_line(error)})") from None


def work_of(config: Config, gpus: int, prompt_tokens: int) -> Work:
    """One step of a run on this many GPUs, in bfloat16 unless the configuration says float32."""
    from vdr_cli.engine.ds_config import read_ds_config, zero_stage
    from vdr_cli.planning.work import Work

    return Work(
        gpus=gpus,
        stage=zero_stage(read_ds_config(config.engine.ds_config)),
        element_bytes=4 if config.model.dtype == "float32" else 2,
        prompts_per_step=max(config.train.prompts_per_step, gpus),
        group_size=config.rollout.group_size,
        prompt_tokens=prompt_tokens,
        new_tokens=config.rollout.completion_tokens,
        micro_batch_size=config.train.micro_batch_size,
        num_iterations=config.grpo.num_iterations,
        minibatches=config.grpo.minibatches,
        cached_tokens=config.rollout.batch_tokens,
        members=config.disagreement.members if config.needs_ensemble else 0,
        checkpointing=config.model.gradient_checkpointing,
        reference=config.needs_reference and config.model.lora is None,
        sequence=config.engine.sequence_parallel,
        reward_models=tuple(find_shape(name, "rewards.functions model:") for name in reward_model_names(config)),
        balances_experts=config.grpo.router_aux_loss_coef > 0,
        muon=config.train.optimizer == "muon",
    )


def show(name: str, shape: Shape, work: Work, gpu_memory: float | None, bandwidth: float) -> None:
    """The tables, and what they amount to."""
    from rich.console import Console

    from vdr_cli.planning.resources import model_states, peak_memory, phase_memory, traffic

    console = Console()
    print(f"{name}: {shape.parameters:,} parameters, {work.gpus} GPUs, ZeRO stage {work.stage}, {_dtype(work)}")
    print(
        f"a step: {work.prompts_per_step} prompts of {work.prompt_tokens} tokens x {work.group_size} completions of "
        f"{work.new_tokens}; {work.micro_batches} micro-batches per GPU"
    )
    if work.stage >= 3:
        held = "one decoder layer at a time" if work.by_layers else "a full copy of the weights"
        print(f"rollout and disagreement read {held} (engine.gather)")
    console.print(_table("Memory per GPU, always", model_states(shape, work), GIB, "GiB"))
    console.print(_table("Memory per GPU, one phase at a time", phase_memory(shape, work), GIB, "GiB"))
    moved = traffic(shape, work)
    console.print(_table("Network, received per GPU and step", moved, 1e9, "GB"))
    seconds = sum(moved.values()) * 8 / (bandwidth * 1e9)
    print(f"peak: {peak_memory(shape, work) / GIB:.1f} GiB per GPU")
    print(f"network: {seconds:.1f} s per step at {bandwidth:g} Gbit/s per GPU, without overlap")
    if gpu_memory is not None:
        fits = peak_memory(shape, work) <= FITS * gpu_memory * GIB
        print(f"{'fits' if fits else 'does not fit'} in {gpu_memory:g} GiB with a tenth left free")


def _table(title: str, rows: dict[str, float], unit: float, unit_name: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column(unit_name, justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value / unit:,.2f}")
    return table


def _dtype(work: Work) -> str:
    return "float32" if work.element_bytes == 4 else "bfloat16"


def _config_json(name: str, setting: str) -> dict[str, Any]:
    from vdr_cli.beds.registry import BEDS
    from vdr_cli.config.paths import looks_like_path
    from vdr_cli.planning.shape import SIZES

    folder = Path(BEDS[name].model_path if name in BEDS else name).expanduser()
    for path in (folder / "config.json", folder / "model" / "config.json"):
        if path.is_file():
            return dict(json.loads(path.read_text()))
    if looks_like_path(str(folder)):
        raise ConfigError(f"{setting}{name}: no config.json there; give a model's directory or {', '.join(SIZES)}")
    from vdr_cli.models.hub import settle_on_cache_if_away

    settle_on_cache_if_away()
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(name).to_dict())
    except (OSError, ValueError) as error:
        sizes = ", ".join(SIZES)
        raise ConfigError(f"{setting}{name}: neither a size ({sizes}) nor on the hub: {first_line(error)}") from None
