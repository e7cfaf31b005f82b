"""`vdr eval`: models side by side on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.cli.checks import check_package, refuse_unread, warn_of_older_model, writable_file
from vdr_cli.cli.options import (
    LAUNCH_FLAGS,
    Flag,
    RewardOption,
    Typed,
    config_from,
    launch_from,
    reward_settings,
    run_config_of,
    takes,
)
from vdr_cli.cli.ranks import on_ranks
from vdr_cli.errors import ConfigError
from vdr_cli.launch.rank import is_first
from vdr_cli.system.imports import importing

if TYPE_CHECKING:
    from vdr_cli.config import Config, DisagreementConfig
    from vdr_cli.evaluation.request import EvalRequest
    from vdr_cli.evaluation.result import EvalResult

EXAMPLES = (
    "vdr eval starter runs/wide                     # before and after",
    "vdr eval Qwen/Qwen3-0.6B --data rows.jsonl --reward mine.py:right -n 16 --k 1,4,16",
    "vdr eval runs/a runs/b --greedy --json results.json",
    "vdr eval starter runs/wide --diversity --members 8 --markdown table.md --save samples.parquet",
    "vdr eval starter runs/wide --num-processes 8   # the same numbers, sooner",
)

SAMPLES = 8
SECTIONS_READ = ("model", "data", "rewards", "rollout", "launch")


FLAGS = (
    Flag("--data", "data.name"),
    Flag("--split", "data.eval_split"),
    Flag("--max-new-tokens", "rollout.max_new_tokens"),
    Flag("--temperature", "rollout.temperature", description="Sampling temperature; above 0."),
    *LAUNCH_FLAGS,
)

Models = Annotated[
    list[str], typer.Argument(metavar="MODEL_OR_RUN...", help="Bed (such as starter), directory, run or hub id.")
]
Samples = Annotated[int, typer.Option("--samples", "--n", "-n", help="Completions per prompt.")]
Ks = Annotated[
    list[str] | None,
    typer.Option("--k", metavar="K,...", help="k of pass@k, such as 1,8,64. Repeatable. Default: 1 and --samples."),
]
Prompts = Annotated[int | None, typer.Option(help="Evaluate only the first N prompts.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Greedy decoding: one completion per prompt.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed for samples, intervals and masks.")]
Diversity = Annotated[bool, typer.Option("--diversity", help="Also compute distinct-n and self-BLEU per prompt.")]
Reference = Annotated[str | None, typer.Option(metavar="COLUMN", help="Also compute ROUGE-L against this data column.")]
Members = Annotated[int, typer.Option(min=0, help="Also measure disagreement with this many dropout members; 0: off.")]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the numbers as JSON.")]
MarkdownFile = Annotated[str | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")]
SaveFile = Annotated[str | None, typer.Option(metavar="FILE.parquet", help="Also save every completion.")]
ReadOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of model, data, rewards, rollout or launch, such as rollout.top_p=0.9. Repeatable.",
    ),
]


@takes(FLAGS)
def command(
    context: typer.Context,
    models: Models,
    typed: Typed,
    reward: RewardOption = None,
    samples: Samples = SAMPLES,
    k: Ks = None,
    prompts: Prompts = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    diversity: Diversity = False,
    reference: Reference = None,
    members: Members = 0,
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
    save: SaveFile = None,
    overrides: ReadOverrides = None,
) -> None:
    """Sample, reward, and compare models: pass@k, mean reward, length, entropy, with 95 % intervals.

    Data, rewards and sampling are those of the first run given, if any; options override them.
    """
    if greedy and typed["rollout.temperature"] is not None:
        raise ConfigError("--greedy and --temperature cannot be combined; give one")
    if diversity:
        check_package("sacrebleu", "sacrebleu", "--diversity")
    if reference is not None:
        check_package("rouge_score", "rouge-score", "--reference")
    config = checked_config(models, typed.also("--reward", "rewards.functions", reward_settings(reward)), overrides)
    ks = numbers(k, "--k")
    if greedy and (samples not in (1, SAMPLES) or ks not in (None, (1,))):
        raise ConfigError("--greedy draws one completion per prompt: leave out --samples and --k")
    files = Files.checked(json_file, markdown, save)

    def evaluate() -> None:
        with importing():
            from vdr_cli.evaluation.evaluate import run_eval

        request = build_request(config, models, on_data=typed["data.name"] is not None)
        ensemble = ensemble_settings(members) if members else None
        request = replace(request, samples=samples, ks=ks, greedy=greedy, prompts=prompts, seed=seed)
        files.write(run_eval(replace(request, diversity=diversity, reference=reference, disagreement=ensemble)))

    on_ranks(launch_from(typed, launch_overrides(overrides)), context.obj, evaluate)


def checked_config(models: Sequence[str], typed: Typed, overrides: Sequence[str] | None) -> Config:
    """The settings of the first run among the models, under what was typed. Raises ConfigError or DataError."""
    from vdr_cli.checks import check_rewards
    from vdr_cli.config import DataConfig
    from vdr_cli.data.sources import check_data, check_options, check_subset
    from vdr_cli.models.paths import resolve_model_path

    for name in models:
        resolve_model_path(name, "MODEL")
    warn_of_older_model(models)
    refuse_unread(overrides, SECTIONS_READ, "vdr eval")
    refuse_unused(overrides, bool(typed["data.name"]))
    base = next(filter(None, map(run_config_of, models)), None)
    own = [text for text in overrides or () if text not in launch_overrides(overrides)]
    typed = typed.section("launch", inside=False)
    config = config_from(base, own, typed if base else typed.also("", "model.name", models[0]))
    given = typed["data.name"]
    if given and base is not None:  # these belong to the run's own data
        gone = [key for key in ("subset", "options") if not any(text.startswith(f"data.{key}") for text in own)]
        data = config.data.model_copy(update={key: DataConfig.model_fields[key].default for key in gone})
        config = config.model_copy(update={"data": data})
    check_data(
        given or config.data.eval_name or config.data.name,
        "--data" if given else "data.eval_name",
        config.data.prompt_column,
    )
    check_options(config.data)
    if given or config.data.eval_name is None:
        check_subset(config.data)
    check_rewards(config)
    return config


def refuse_unused(overrides: Sequence[str] | None, on_data: bool) -> None:
    """Refuse a --set of keys that would silently do nothing. Raises ConfigError.

    on_data: --data names the prompts.
    """
    ways_out = {
        "data.split": "give --split",
        "data.shuffle": "it takes prompts in the order of the data",
        "model.name": "name the models as arguments",
        "model.lora": "an adapter is named like a model",
        "rollout.group_size": "give --samples",
        "rollout.members": "the policy itself is evaluated",
        "rollout.backend": "it samples in its own process",
        "rollout.ahead": "it samples once",
    }
    if on_data:
        ways_out["data.eval_name"] = "--data names the prompts already, give one of the two"
    for override in overrides or ():
        key = override.partition("=")[0].strip()
        for unread, way_out in ways_out.items():
            if key == unread or key.startswith(f"{unread}."):
                raise ConfigError(f"--set {override}: vdr eval does not read {unread}; {way_out}")


def numbers(given: Sequence[str] | None, flag: str) -> tuple[int, ...] | None:
    """Whole numbers, each option holding one or several with commas between; None when none was given."""
    try:
        return tuple(int(part) for text in given for part in text.split(",")) if given else None
    except ValueError:
        raise ConfigError(f"{flag} {','.join(given or ())}: give whole numbers, such as {flag} 1,8,64") from None


def launch_overrides(overrides: Sequence[str] | None) -> list[str]:
    """Those of the --set options that say how processes are started."""
    return [text for text in overrides or () if text.partition("=")[0].partition(".")[0].strip() == "launch"]


def build_request(config: Config, models: Sequence[str], *, on_data: bool) -> EvalRequest:
    """The models on the held-out prompts of the configuration; with on_data, on those of data.name."""
    from vdr_cli.evaluation.request import EvalRequest

    held_out = config.data.name if on_data else config.data.eval_name or config.data.name
    return EvalRequest(
        models=tuple(models),
        data=config.data.model_copy(update={"eval_name": held_out}),
        rewards=config.rewards,
        rollout=config.rollout,
        model=config.model,
    )


def ensemble_settings(members: int) -> DisagreementConfig:
    """The default ensemble with this many members."""
    from vdr_cli.config.load import validate

    places = {("disagreement", "members"): "--members"}
    return validate({"disagreement": {"members": members, "scope": "full"}}, places).disagreement  # type: ignore[arg-type]


@dataclass(frozen=True)
class Files:
    """Files of the results beside the terminal; None: no file."""

    numbers: str | None
    """JSON."""
    tables: str | None
    """Markdown."""
    completions: str | None
    """Parquet."""

    @classmethod
    def checked(cls, numbers: str | None, tables: str | None, completions: str | None) -> Files:
        """Raises ConfigError or MachineError for a file that could not be written."""
        given = (numbers, "--json"), (tables, "--markdown"), (completions, "--save")
        names = [file if file is None else writable_file(file, flag) for file, flag in given]
        files = cls(*names)
        own = [Path(name).resolve() for name in names if name is not None and not name.startswith("/dev/")]
        if twice := [path for path in own if own.count(path) > 1]:
            raise ConfigError(f"{twice[0]} is given for two of --json, --markdown and --save; give each its own file")
        if completions is not None and not completions.endswith(".parquet"):
            raise ConfigError(f"--save {completions}: the completions are written as Parquet; give FILE.parquet")
        return files

    def write(self, results: Sequence[EvalResult]) -> None:
        """Write the files, then print the tables, on rank 0: a reader that goes (`| head`) ends the command.

        The tables are printed even if a file cannot be written.
        """
        from vdr_cli.cli.comparison import show
        from vdr_cli.evaluation.result import paired_differences

        records = [result.record() for result in results]
        differences = paired_differences(results)
        if not is_first():
            return
        try:
            self._save(results, records, differences)
        finally:
            show(records, differences)

    def _save(
        self, results: Sequence[EvalResult], records: list[dict[str, Any]], differences: list[dict[str, Any]]
    ) -> None:
        from vdr_cli.cli.comparison import as_markdown
        from vdr_cli.scoring.parts import plain
        from vdr_cli.system.files import write_whole

        if self.numbers is not None:
            written = plain({"models": records, "differences": differences})  # no NaN: JSON has none
            write_whole(Path(self.numbers), json.dumps(written, indent=2, allow_nan=False) + "\n")
        if self.tables is not None:
            write_whole(Path(self.tables), as_markdown(records, differences))
        if self.completions is not None:
            save_samples(Path(self.completions), results)


def save_samples(path: Path, results: Sequence[EvalResult]) -> None:
    """Every completion of every model, a row each."""
    from vdr_cli.data.completions import write_columns

    columns: dict[str, list[Any]] = {}
    for result in results:
        for name, values in result.samples().items():
            columns.setdefault(name, []).extend(values)
    write_columns(path, columns)
