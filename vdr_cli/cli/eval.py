"""`vdr eval`: models side by side on held-out prompts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.cli.options import (
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
    SshPort,
    config_from,
    launch_from,
    reward_settings,
    run_config_of,
)
from vdr_cli.cli.ranks import is_first, on_ranks
from vdr_cli.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from vdr_cli.config import Config, DisagreementConfig
    from vdr_cli.evaluate import EvalRequest, EvalResult

EXAMPLES = (
    "vdr eval starter runs/wide                     # before and after",
    "vdr eval Qwen/Qwen3-0.6B --data rows.jsonl --reward mine.py:right -n 16 --k 4",
    "vdr eval runs/a runs/b --greedy --json results.json",
    "vdr eval starter runs/wide --diversity --members 8 --markdown table.md --save samples.parquet",
    "vdr eval starter runs/wide --num-processes 8   # the same numbers, sooner",
)

SECTIONS_READ = ("model", "data", "rewards", "rollout", "launch")


def command(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL_OR_RUN...", help="starter, directory, run or hub id.")],
    data: Annotated[str | None, typer.Option(help="starter, a file, a directory or a hub id.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the held-out prompts. Default: test.")] = None,
    reward: RewardOption = None,
    samples: Annotated[int, typer.Option("--samples", "--n", "-n", help="Completions of one prompt.")] = 8,
    k: Annotated[list[int] | None, typer.Option("--k", help="pass@k. Repeatable. Default: 1 and --samples.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Only the first this many prompts.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest completion.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="One completion a prompt, the likeliest tokens.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples, the intervals and the masks.")] = 0,
    diversity: Annotated[
        bool, typer.Option("--diversity", help="Also distinct-n and self-BLEU of a prompt's completions.")
    ] = False,
    reference: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Also ROUGE-L against this column of the data.")
    ] = None,
    members: Annotated[
        int, typer.Option(min=0, help="Also the mean disagreement of this many dropout members; 0: not.")
    ] = 0,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE.parquet", help="Also save every completion.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of model, data, rewards, rollout or launch, such as rollout.top_p=0.9. Repeatable.",
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
) -> None:
    """Sample, reward, and compare models: pass@k, mean reward, length, entropy, with 95 % intervals.

    Data, rewards and sampling are those of the first run named, if any; flags go over them.
    """
    if greedy and temperature is not None:
        raise ConfigError("--greedy and --temperature exclude each other; give one")
    flags = {
        ("--data", "data.name"): data,
        ("--reward", "rewards.functions"): reward_settings(reward),
        ("--max-new-tokens", "rollout.max_new_tokens"): max_new_tokens,
        ("--temperature", "rollout.temperature"): temperature,
    }
    from vdr_cli.config.preflight import check_data, check_model, check_rewards

    for name in models:
        check_model(name, "MODEL")
    refuse_unread(overrides, SECTIONS_READ, "vdr eval")
    base = next(filter(None, map(run_config_of, models)), None)
    own = [text for text in overrides or () if not text.startswith("launch.")]
    config = config_from(base, own, {**flags, ("", "model.name"): None if base else models[0]})
    held_out, key = data or config.data.eval_name or config.data.name, "--data" if data else "data.eval_name"
    check_data(held_out, key, config.data.prompt_column)
    check_rewards(config)
    for file, flag in ((json_file, "--json"), (markdown, "--markdown"), (save, "--save")):
        if file is not None:
            check_writable_file(file, flag)
    if save is not None and not save.endswith(".parquet"):
        raise ConfigError(f"--save {save}: the completions are written as Parquet; give FILE.parquet")
    launch = launch_from(context, [text for text in overrides or () if text.startswith("launch.")])

    def evaluate() -> None:
        from vdr_cli.evaluate import paired_differences, run_eval
        from vdr_cli.scoring.parts import plain

        results = run_eval(request())
        records = [result.record() for result in results]
        differences = paired_differences(results)
        if not is_first():
            return
        show(records, differences)
        if json_file is not None:
            written = plain({"models": records, "differences": differences})  # no NaN: JSON has none
            Path(json_file).write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if markdown is not None:
            Path(markdown).write_text(as_markdown(records, differences), encoding="utf-8")
        if save is not None:
            save_samples(Path(save), results)

    def request() -> EvalRequest:
        asked = build_request(config, models, data, split, samples, k, prompts, greedy, seed)
        ensemble = ensemble_settings(members) if members else None
        return replace(asked, diversity=diversity, reference=reference, disagreement=ensemble)

    on_ranks(launch, context.obj, evaluate)


def build_request(
    config: Config,
    models: Sequence[str],
    data: str | None,
    split: str | None,
    samples: int,
    k: Sequence[int] | None,
    prompts: int | None,
    greedy: bool,
    seed: int,
) -> EvalRequest:
    """The held-out prompts of the configuration, in another place when --data or --split say so."""
    from vdr_cli.evaluate import EvalRequest

    name = data or config.data.eval_name or config.data.name
    held_out = {"name": data or config.data.name, "eval_name": name, "eval_split": split or config.data.eval_split}
    return EvalRequest(
        models=tuple(models),
        data=config.data.model_copy(update=held_out),
        rewards=config.rewards,
        rollout=config.rollout,
        model=config.model,
        samples=samples,
        ks=tuple(k) if k else None,
        greedy=greedy,
        prompts=prompts,
        seed=seed,
        device=default_device(),
    )


def ensemble_settings(members: int) -> DisagreementConfig:
    """The default ensemble with this many members."""
    from vdr_cli.config.load import validate

    places = {("disagreement", "members"): "--members"}
    return validate({"disagreement": {"members": members, "scope": "full"}}, places).disagreement  # type: ignore[arg-type]


def as_markdown(records: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    """The two tables of the terminal, a column a model."""
    named = [{**row, "model": f"{row['model']} - {row['minus']}"} for row in differences]
    return "\n".join(_markdown_table(rows) for rows in (records, named) if rows)


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["", *(str(row["model"]).replace("|", "\\|") for row in rows)]
    lines = [header, ["---", *("---:" for _ in rows)]]
    lines += [[name, *(_cell(row, name) for row in rows)] for name in _shown_names(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_samples(path: Path, results: Sequence[EvalResult]) -> None:
    """Every completion of every model, a row each."""
    from vdr_cli.observe.completions import write_columns

    columns: dict[str, list[Any]] = {}
    for result in results:
        for name, values in result.samples().items():
            columns.setdefault(name, []).extend(values)
    write_columns(path, columns)


def default_device() -> str:
    """This process's accelerator when there is one."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def refuse_unread(overrides: Sequence[str] | None, sections: Sequence[str], name: str) -> None:
    """A --set of a section that a command does not read would silently do nothing."""
    from vdr_cli.config import Config

    for override in overrides or ():
        section = override.partition("=")[0].partition(".")[0].strip()
        if section in Config.model_fields and section not in sections:
            raise ConfigError(f"--set {override}: {name} does not read {section}; it reads {', '.join(sections)}")


def check_writable_file(path: str, flag: str) -> None:
    """The file's directory is there and can be written, before hours of work."""
    parent = Path(path).expanduser().absolute().parent
    if Path(path).expanduser().is_dir():
        raise ConfigError(f"{flag} {path}: a directory; give a file")
    if not parent.is_dir():
        raise ConfigError(f"{flag} {path}: no directory {parent}; make it first")
    if not os.access(parent, os.W_OK):
        raise MachineError(f"{flag} {path}: no permission to write in {parent}")


def show(records: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> None:
    """The numbers, a column a model; below, each pair's difference over the same prompts."""
    from rich.console import Console

    console = Console()
    first = records[0]
    named = [{**row, "model": f"{row['model']} - {row['minus']}"} for row in differences]
    _show_table(console, f"{first['prompts']} prompts x {first['samples']} completions", records)
    if named:
        _show_table(console, "Differences over the same prompts", named)
    if any(name.endswith("_low") for name in first):
        console.print("\\[low, high]: 95 % interval over prompts", style="italic")


def _show_table(console: Any, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column a model; where they do not fit beside each other, a block a model. Text of the user is never markup."""
    from rich.text import Text

    names = _shown_names(rows)
    widths = [max(map(len, names)), *(max(len(_cell(row, name)) for name in names) for row in rows)]
    console.print(Text(title, style="bold"))
    if sum(widths) + 3 * len(widths) + 1 <= console.width:
        console.print(_table(rows))
        return
    for row in rows:
        console.print(Text(str(row["model"]), style="bold"))
        console.print(_block(row))


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column()
    for row in rows:
        table.add_column(Text(str(row["model"])), justify="right", overflow="fold")
    for name in _shown_names(rows):
        table.add_row(Text(name), *(Text(_cell(row, name), no_wrap=True) for row in rows))
    return table


def _block(row: Mapping[str, Any]) -> Any:
    """One model's numbers, in as few columns of the terminal as they take."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1), pad_edge=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name in _shown_names([row]):
        table.add_row(Text(name), Text(_cell(row, name)))
    return table


def _shown_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    hidden = {"model", "minus", "prompts", "samples"}
    return [name for name in rows[0] if name not in hidden and not name.endswith(("_low", "_high"))]


def _cell(row: Mapping[str, Any], name: str) -> str:
    """`value [low, high]` where there is an interval."""
    value = row.get(name)
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    if math.isnan(low):
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"
