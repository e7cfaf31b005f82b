"""`vdr score`: the uncertainty of completions that exist already."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.cli.checks import one_of, warn_of_older_model, writable_file
from vdr_cli.cli.options import LAUNCH_FLAGS, Flag, RewardOption, Typed, launch_from, panel, reward_settings, takes
from vdr_cli.cli.ranks import on_ranks
from vdr_cli.errors import ConfigError
from vdr_cli.launch.rank import is_first
from vdr_cli.system.imports import importing

if TYPE_CHECKING:
    from vdr_cli.config import RewardsConfig
    from vdr_cli.scoring.request import ScoreRequest, ScoreResult
    from vdr_cli.scoring.score import Progress

EXAMPLES = (
    "vdr score runs/wide --model runs/wide -o scores.parquet",
    "vdr score rows.jsonl --model Qwen/Qwen3-0.6B --completion-column answer",
    "vdr score rows.jsonl --model starter --members 0     # likelihood and entropy",
    "vdr score rows.jsonl --model runs/wide --label-column correct --tokens -o scores.parquet",
    "vdr score rows.jsonl --model runs/wide --reward model:my/judge   # also a reward model's scores",
    "vdr score rows.parquet --model runs/wide -o scores.parquet --hostfile hosts --resume",
)

TOTAL = "reward"
"""Column of the weighted sum of the rewards; with --reward the labels, unless others are named."""
LINE_EVERY = 30.0  # seconds

ENSEMBLE = "Ensemble"
ROWS = "Rows"

SCOPE = "Layers in which members differ: all (full), or only the top last_k; the layers below run once for all members."

FLAGS = (
    Flag("--model", "model.name", required=True),
    Flag("--dtype", "model.dtype"),
    Flag("--revision", "model.revision"),
    Flag("--trust-remote-code", "model.trust_remote_code"),
    Flag("--members", "disagreement.members", ENSEMBLE, note="0: likelihood and entropy only."),
    Flag("--dropout", "disagreement.dropout", ENSEMBLE),
    Flag("--scope", "disagreement.scope", ENSEMBLE, default="full", description=SCOPE),
    *panel(ENSEMBLE, "disagreement.last_k", "disagreement.mask_sharing"),
    Flag("--prompt-column", "data.prompt_column", ROWS),
    *LAUNCH_FLAGS,
)

Inputs = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="JSONL, CSV, Parquet, globs, a run, or - (JSONL on stdin).")
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="OUT.parquet, .jsonl or .csv. Default: FILE.scored.<kind>.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the masks.", rich_help_panel=ENSEMBLE)]
CompletionColumn = Annotated[
    str, typer.Option(help="Column of completions: strings or messages.", rich_help_panel=ROWS)
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of labels to rank the measures by: 1 right, 0 wrong, or a quality.", rich_help_panel=ROWS
    ),
]
GroupColumn = Annotated[
    str | None, typer.Option(help="Column that groups rows. Default: group by prompt.", rich_help_panel=ROWS)
]
Filter = Annotated[
    str | None,
    typer.Option(
        "--filter", help="lm-eval logs with several filters: rank the rows of this one.", rich_help_panel=ROWS
    ),
]
Tokens = Annotated[bool, typer.Option("--tokens", help="Add arrays with one value per token.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Score only this many tokens of each completion.")]
AppendEos = Annotated[bool, typer.Option("--append-eos", help="Completions given as text end with EOS.")]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens per forward pass; never changes the scores. Default: depends on the device.",
    ),
]
OnError = Annotated[str, typer.Option(help="stop at a row that cannot be used, or skip it and report it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted scoring.")]


@takes(FLAGS)
def command(
    context: typer.Context,
    inputs: Inputs,
    typed: Typed,
    output: Output = None,
    reward: RewardOption = None,
    seed: Seed = 0,
    completion_column: CompletionColumn = "completion",
    label_column: LabelColumn = None,
    group_column: GroupColumn = None,
    filter_name: Filter = None,
    tokens: Tokens = False,
    max_tokens: MaxTokens = None,
    append_eos: AppendEos = False,
    batch_tokens: BatchTokens = None,
    on_error: OnError = "stop",
    resume: Resume = False,
) -> None:
    """Score saved completions: likelihood, entropy, and how far the dropout members disagree (nats)."""
    rewards = rewards_from(reward)
    request = replace(
        request_from(typed, inputs, writable_file(output or default_output(inputs), "-o")),
        rewards=rewards,
        seed=seed,
        tokens=tokens,
        max_tokens=max_tokens,
        append_eos=append_eos,
        batch_tokens=batch_tokens,
        on_error=one_of(on_error, ("stop", "skip"), "--on-error"),  # type: ignore[arg-type]
        resume=resume,
    )
    columns = {
        "completion": completion_column,
        "label": label_column,
        "group": group_column,
        "filter": filter_name,
    } | ({} if rewards is None else {"implied_label": TOTAL})
    request = replace(request, fields=replace(request.fields, **columns))  # type: ignore[arg-type]

    def score() -> None:
        result = score_with_progress(request)
        if is_first():
            show(result)

    on_ranks(launch_from(typed), context.obj, score)


def request_from(typed: Typed, inputs: Sequence[str], output: str) -> ScoreRequest:
    """The model, the ensemble and the prompts' column that were typed, over the schema's defaults. Raises ConfigError.

    `--members 0` means no ensemble, which is not a number of members in the schema.
    """
    from vdr_cli.config.load import settings_typed
    from vdr_cli.models.paths import resolve_model_path
    from vdr_cli.scoring.request import Fields, ScoreRequest

    resolve_model_path(typed["model.name"], "--model")
    warn_of_older_model([typed["model.name"]])
    typed = typed.section("launch", inside=False)
    alone = typed["disagreement.members"] == 0
    if alone:
        refuse_ensemble_flags(typed)
    config = settings_typed((typed.section("disagreement", inside=False) if alone else typed).values, typed.names)
    return ScoreRequest(
        inputs=tuple(inputs),
        model=config.model.name,
        output=output,
        disagreement=None if alone else config.disagreement,
        fields=Fields(prompt=config.data.prompt_column),
        dtype=config.model.dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )


def refuse_ensemble_flags(typed: Typed) -> None:
    """Raise ConfigError for options of the ensemble beside --members 0: they would have no effect."""
    defaults = {flag.key: flag.default for flag in FLAGS}
    for key, value in typed.section("disagreement").values.items():
        if key != "disagreement.members" and value not in (None, defaults[key]):
            raise ConfigError(f"--members 0 measures no disagreement: leave out {typed.names[key]}")


def rewards_from(given: Sequence[str] | None) -> RewardsConfig | None:
    """The reward functions typed. Raises ConfigError."""
    from vdr_cli.config.load import validate
    from vdr_cli.rewards.loading import check_reward

    functions = reward_settings(given)
    if functions is None:
        return None
    rewards = validate({"rewards": {"functions": functions}}, {("rewards", "functions"): "--reward"}).rewards
    for entry in rewards.functions:
        check_reward(entry)
    return rewards


def score_with_progress(request: ScoreRequest) -> ScoreResult:
    """Score, with the time left on stderr: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import Progress

    with importing():
        from vdr_cli.scoring.score import run_score

    if not is_first():
        return run_score(request)
    if sys.stderr is None or not sys.stderr.isatty():
        return run_score(request, ProgressLines())
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=1.0)
        return run_score(request, lambda done: bar.update(task, completed=done.fraction))


class ProgressLines:
    """For a log file or a batch job: `scoring: 42 %, 0:03:10 left`, every LINE_EVERY seconds."""

    def __init__(self) -> None:
        self._first: Progress | None = None  # what a resumed scoring found done tells nothing of its speed
        self._said = 0.0

    def __call__(self, done: Progress) -> None:
        from vdr_cli.system.text import duration

        first = self._first = self._first or done
        if done.seconds - self._said < LINE_EVERY:
            return
        self._said = done.seconds
        behind = done.fraction - first.fraction
        left = (done.seconds - first.seconds) * (1.0 - done.fraction) / behind if behind > 0 else None
        text = f", {duration(left)} left" if left is not None else ""
        print(f"scoring: {done.fraction:.0%}{text}", file=sys.stderr, flush=True)


def default_output(inputs: Sequence[str]) -> str:
    """FILE.scored.<kind> beside the first file; scores.parquet in a directory."""
    from vdr_cli.config.paths import checked_path

    first = checked_path(inputs[0], "FILE")
    if inputs[0] == "-" or (any(mark in inputs[0] for mark in "*?[") and not first.exists()):
        raise ConfigError(f"-o is needed: {inputs[0]} does not say where the scores should go")
    if first.is_dir():
        return str(first / "scores.parquet")
    kind = first.suffix if first.suffix.lower() in (".csv", ".parquet") else ".jsonl"
    return str(first.with_name(f"{first.stem}.scored{kind}"))


def show(result: ScoreResult) -> None:
    """Print what was written and left out, and with labels the quality of each measure's ranking."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vdr_cli.system.text import visible

    console = Console()
    rate = result.rows / result.seconds if result.seconds > 0 else float("nan")
    said = "were scored already" if result.is_reused else f"scored in {result.seconds:.1f} s ({rate:.0f} rows/s)"
    console.print(escape(f"{result.rows:,} rows {said}: {result.output}"))
    for line in (*result.notes, *result.skipped_rows):
        console.print(escape(visible(line)), soft_wrap=True)
    if not result.ranking:
        return
    if all(row.get("auroc", row.get("prr")) != row.get("auroc", row.get("prr")) for row in result.ranking):  # NaN
        console.print("All labels are the same: there is nothing to rank.")
        return
    one_group = all(math.isnan(value) for row in result.ranking for name, value in row.items() if name.endswith("_low"))
    what = "one group of rows has no interval" if one_group else r"\[low, high]: 95 % interval over groups"
    table = Table(
        caption=f"{what}; higher is better; more beside the output",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,  # all of it in 80 columns
    )
    names = [name for name in ("measure", "auroc", "auprc", "prr") if name in result.ranking[0]]
    for name in names:
        table.add_column(escape(name), justify="left" if name == "measure" else "right", no_wrap=True)
    for row in result.ranking:
        table.add_row(*(escape(interval_cell(row, name)) for name in names))
    console.print(table)


def interval_cell(row: Mapping[str, Any], name: str) -> str:
    """`0.612 [0.55, 0.67]` where there is an interval."""
    value = row[name]
    if not isinstance(value, float):
        return "" if value is None else str(value)
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.2f}, {high:.2f}]"
