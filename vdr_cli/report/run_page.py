"""The page of a run: learning curves, completions, first and last values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vdr_cli.errors import ConfigError
from vdr_cli.exploration.collapse import warnings_of
from vdr_cli.models.paths import adapter_directory
from vdr_cli.report.charts import Chart, finite, number
from vdr_cli.report.content import Page, decoder_of
from vdr_cli.report.data import Heat, RunData, over_seeds, reward_and_bonus_source, run_groups, settings_of

RUN_CHARTS = (
    ("Reward", ("reward",), "mean task reward"),
    ("Held-out pass@1", ("eval/pass@1",), "pass@1"),
    ("Held-out pass@k", ("eval/pass@{k}",), "pass@k"),
    ("Disagreement", ("disagreement/mean",), "nats"),
    ("Bonus source", ("bonus/mean",), "mean"),
    ("Groups whose rewards are all equal", ("frac_reward_zero_std",), "share"),
    ("Different completions per group", ("completions/distinct",), "completions"),
    ("Completion length", ("completions/mean_length",), "tokens"),
    ("Truncated completions", ("completions/clipped_ratio",), "share"),
    ("Entropy", ("entropy",), "nats"),
    ("KL to the reference", ("kl",), "nats"),
    ("Gradient norm", ("grad_norm",), "norm"),
    ("Seconds a step", ("step_time",), "s"),
)


def run_page(runs: Sequence[RunData], members: int = 0) -> Page:
    """Learning curves of all runs, completions of the first."""
    first = runs[0]
    charts = []
    for title, names, unit in RUN_CHARTS:
        name = names[0].replace("{k}", str(_largest_k(first.metrics)))
        if name == "eval/pass@1" and title != "Held-out pass@1":
            continue
        series = over_seeds(runs, name)
        if any(finite(one).x for one in series):
            charts.append(Chart(title.replace("@k", "@" + name.rpartition("@")[2]), "step", unit, series))
    points = [reward_and_bonus_source(group) for group in settings_of(runs)]
    if any(len(one.x) for one in points):
        name, unit = _source_name(first)
        charts.append(Chart(f"Reward against {name}", f"{name}{unit}", "task reward", points, True))
    final = _final_model(first)
    if members and final is None:
        raise ConfigError(
            f"--members {members}: {first.path} has no model to measure with (model/, which a finished run saves)"
        )
    heat = _measuring(first, final, members) if members and final else None
    groups, saved = run_groups(first, decoder_of(final or _start_model(first)), heat)
    facts = [[name, *(_first_to_last(run, name) for run in runs)] for name in _named_facts(runs)]
    return Page(
        title=", ".join(run.name for run in runs),
        subtitle=_settings_line(first),
        charts=charts,
        groups=groups,
        groups_saved=saved,
        facts_header=[run.name for run in runs],
        facts=facts,
        facts_note=" ".join(["First and last measured value.", *map(_warnings, runs)]).strip(),
        ranking_header=[],
        ranking=[],
        ranked=None,
        heat="disagreement",
        command=("vdr report RUN --members 8", "measures the tokens of all of them, with the final model"),
    )


def _measuring(run: RunData, model: str, members: int) -> Heat:
    """The run's measure a token under its ensemble settings, of `model`."""
    from vdr_cli.config import DisagreementConfig
    from vdr_cli.disagreement.masks import EnsembleSpec
    from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
    from vdr_cli.models.loading import load_causal_lm
    from vdr_cli.scoring.batches import collate
    from vdr_cli.scoring.tokens import Item

    own = run.config.get("disagreement", {})
    kept = {key: own[key] for key in ("dropout", "scope", "last_k", "mask_sharing", "blocks") if key in own}
    if own.get("mode") == "per_token":
        kept["mode"] = "per_token"  # what scope None means depends on it
    settings = DisagreementConfig(members=members, **kept).member_settings
    spec = EnsembleSpec(**settings, seed=run.config["train"]["seed"])
    reader = EnsembleReader(spec)
    causal_lm = load_causal_lm(model)
    name = own.get("measure", "bald")

    def heat(prompt_ids: list[int], completions: list[list[int]]) -> list[list[float]]:
        items = [Item(at, prompt_ids, ids or [0], False) for at, ids in enumerate(completions)]
        request = MeasureRequest(collate(items, 0), len(items), measures=(name,))
        measured = reader.measure(causal_lm, request).get(name)  # (G, T)
        return [row[: len(ids)] for row, ids in zip(measured.tolist(), completions, strict=True)]

    return heat


def _final_model(run: RunData) -> str | None:
    """The model that the run has trained; None when it saved none."""
    folder = run.path / "model"
    if adapter_directory(str(folder)) is not None:
        return str(folder)
    return str(run.path) if (folder / "config.json").is_file() else None


def _start_model(run: RunData) -> str | None:
    """The model that the run began with, which has the same tokenizer."""
    name = run.config.get("model", {}).get("name")
    return name if isinstance(name, str) else None


def _largest_k(metrics: Mapping[str, Any]) -> int:
    found = [name.removeprefix("eval/pass@") for name in metrics if name.startswith("eval/pass@")]
    return max((int(k) for k in found if k.isdigit()), default=1)


def _named_facts(runs: Sequence[RunData]) -> list[str]:
    wanted = ["eval/pass@1", f"eval/pass@{_largest_k(runs[0].metrics)}", "reward", "disagreement/mean", "bonus/mean"]
    wanted += ["frac_reward_zero_std", "completions/mean_length", "entropy", "step_time"]
    return [name for name in dict.fromkeys(wanted) if any(name in run.metrics for run in runs)]


def _first_to_last(run: RunData, name: str) -> str:
    values = [value for value in run.metrics.get(name, ([], []))[1] if math.isfinite(value)]
    return f"{number(values[0])} → {number(values[-1])}" if values else ""


def _settings_line(run: RunData) -> str:
    def at(section: str, key: str) -> Any:
        return run.config.get(section, {}).get(key, "?")

    return (
        f"{at('model', 'name')} on {at('data', 'name')}: bonus {_bonus_line(run)}, loss {at('grpo', 'loss')}, "
        f"group size {at('rollout', 'group_size')}, seed {at('train', 'seed')}"
    )


def _bonus_line(run: RunData) -> str:
    """The bonus of a run, as `vdr train --dry-run` puts it."""
    from vdr_cli.config.load import validate
    from vdr_cli.planning.batches import bonus_line

    try:
        return bonus_line(validate(run.config))
    except ConfigError:
        return "unknown"


def _warnings(run: RunData) -> str:
    """Early warnings of a run, each with its step, as sentences; empty without any."""
    from vdr_cli.config.load import validate

    try:
        config = validate(run.config)
    except ConfigError:  # of another version
        return ""
    by_step: dict[int, dict[str, float]] = {}
    for name, (steps, values) in run.metrics.items():
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, {"step": step})[name] = value
    found = warnings_of(config, [by_step[step] for step in sorted(by_step)])
    return " ".join(f"Warning at step {step} of {run.name}: {warning}." for step, warning in found)


def _source_name(run: RunData) -> tuple[str, str]:
    """(name, unit in brackets) of the numbers that a run's bonus is made from."""
    source = run.config.get("bonus", {}).get("source", "disagreement")
    return ("disagreement", " (nats)") if source == "disagreement" else (run.bonus_column, "")
