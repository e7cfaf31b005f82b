"""`vdr score`: the uncertainty of completions that exist already."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.cli.eval import check_writable_file
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
    SshPort,
    launch_from,
)
from vdr_cli.cli.ranks import is_first, on_ranks
from vdr_cli.errors import ConfigError

if TYPE_CHECKING:
    from vdr_cli.config import DisagreementConfig
    from vdr_cli.score import Progress
    from vdr_cli.scoring.request import ScoreRequest, ScoreResult

EXAMPLES = (
    "vdr score runs/wide --model runs/wide -o scores.parquet",
    "vdr score rows.jsonl --model Qwen/Qwen3-0.6B --completion-column answer",
    "vdr score rows.jsonl --model starter --members 0     # likelihood and entropy",
    "vdr score rows.jsonl --model runs/wide --label-column correct --tokens -o scores.parquet",
    "vdr score rows.parquet --model runs/wide -o scores.parquet --hostfile hosts --resume",
)

LINE_EVERY = 30.0  # seconds

ENSEMBLE = "Ensemble"
ROWS = "Rows"


def command(
    context: typer.Context,
    inputs: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="JSONL, CSV, Parquet, globs, a run, or - (JSONL on stdin).")
    ],
    model: Annotated[str, typer.Option(help="starter, a local directory, a run, or a hub id.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="OUT.parquet, .jsonl or .csv. Default: FILE.scored.<kind>.")
    ] = None,
    members: Annotated[
        int, typer.Option(min=0, help="M, dropout members; 0: likelihood and entropy only.", rich_help_panel=ENSEMBLE)
    ] = 8,
    dropout: Annotated[float, typer.Option(help="p of the members' masks.", rich_help_panel=ENSEMBLE)] = 0.1,
    scope: Annotated[str, typer.Option(help="full, or last_k: top layers alone.", rich_help_panel=ENSEMBLE)] = "full",
    last_k: Annotated[
        int | None, typer.Option(help="Layers of scope last_k. Default: a quarter.", rich_help_panel=ENSEMBLE)
    ] = None,
    mask_sharing: Annotated[
        str, typer.Option(help="member, or token: new masks at every position.", rich_help_panel=ENSEMBLE)
    ] = "member",
    seed: Annotated[int, typer.Option(min=0, help="Of the masks.", rich_help_panel=ENSEMBLE)] = 0,
    prompt_column: Annotated[str, typer.Option(help="String or chat messages.", rich_help_panel=ROWS)] = "prompt",
    completion_column: Annotated[
        str, typer.Option(help="String or one assistant message.", rich_help_panel=ROWS)
    ] = "completion",
    label_column: Annotated[
        str | None,
        typer.Option(help="1 right, 0 wrong, or a quality: measures are ranked by it.", rich_help_panel=ROWS),
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Rows of one group; default: of one prompt.", rich_help_panel=ROWS)
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also an array with a value a token.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Score only a completion's first tokens.")] = None,
    append_eos: Annotated[bool, typer.Option("--append-eos", help="Completions given as text end with EOS.")] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one forward; memory and speed only. Default: by the device.")
    ] = None,
    on_error: Annotated[str, typer.Option(help="stop at a row that cannot be used, or skip it and say so.")] = "stop",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed scoring stopped.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
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
    """Score saved completions: likelihood, entropy, and how far the dropout members disagree (nats)."""
    from vdr_cli.config.preflight import check_model
    from vdr_cli.scoring.request import Fields, ScoreRequest

    check_model(model, "--model")
    request = ScoreRequest(
        inputs=tuple(inputs),
        model=model,
        output=output or default_output(inputs),
        disagreement=ensemble_settings(members, dropout, scope, last_k, mask_sharing),
        seed=seed,
        fields=Fields(prompt_column, completion_column, label=label_column, group=group_column),
        tokens=tokens,
        max_tokens=max_tokens,
        append_eos=append_eos,
        batch_tokens=batch_tokens,
        on_error=one_of(on_error, ("stop", "skip"), "--on-error"),  # type: ignore[arg-type]
        resume=resume,
        dtype=one_of(dtype, ("auto", "float32", "bfloat16"), "--dtype"),  # type: ignore[arg-type]
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    check_writable_file(request.output, "-o")

    def score() -> None:
        result = score_with_progress(request)
        if is_first():
            show(result)

    on_ranks(launch_from(context), context.obj, score)


def score_with_progress(request: ScoreRequest) -> ScoreResult:
    """Score, with the time left on stderr: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import Progress

    from vdr_cli.score import run_score

    if not is_first():
        return run_score(request)
    if not sys.stderr.isatty():
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
        from vdr_cli.observe.live import duration

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
    first = Path(inputs[0])
    if inputs[0] == "-" or any(mark in inputs[0] for mark in "*?["):
        raise ConfigError(f"-o is needed: {inputs[0]} does not say where the scores should go")
    if first.is_dir():
        return str(first / "scores.parquet")
    kind = first.suffix if first.suffix.lower() in (".csv", ".parquet") else ".jsonl"
    return str(first.with_name(f"{first.stem}.scored{kind}"))


def ensemble_settings(
    members: int, dropout: float, scope: str, last_k: int | None, mask_sharing: str
) -> DisagreementConfig | None:
    """The ensemble of the flags; None with --members 0."""
    from vdr_cli.config.load import validate

    if members == 0:
        return None
    keys: dict[str, Any] = {
        "members": members,
        "dropout": dropout,
        "scope": scope,
        "last_k": last_k,
        "mask_sharing": mask_sharing,
    }
    places = {("disagreement", key): f"--{key.replace('_', '-')}" for key in keys}
    return validate({"disagreement": keys}, places).disagreement  # type: ignore[arg-type]


def one_of(value: str, allowed: Sequence[str], flag: str) -> str:
    """The value, if it is allowed."""
    if value not in allowed:
        raise ConfigError(f"{flag} {value}: give one of {', '.join(allowed)}")
    return value


def show(result: ScoreResult) -> None:
    """What was written, what was left out, and with labels how well each measure ranks."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vdr_cli.observe.text import visible

    console = Console()
    rate = result.rows / result.seconds if result.seconds > 0 else float("nan")
    console.print(escape(f"{result.rows:,} rows scored in {result.seconds:.1f} s ({rate:.0f} rows/s): {result.output}"))
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
