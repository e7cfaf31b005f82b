"""A held-out evaluation from its record: texts, rewards, the draw of every token, and the eval/ metrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import inputs, model, numbers, rewards
from vdr_cli.audit.files import Record
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.audit.weights import Models
from vdr_cli.config import Config
from vdr_cli.rewards.base import TrainerState

Array = NDArray[np.float64]

ENDS = ("_low", "_high")
"""Ends of the names of intervals' ends."""

STREAM = 0
"""Random numbers of held-out prompts, by their row (docs/audit.md)."""


def audit(judge: Judge, record: Record, cfg: Config, models: Models, on_file: dict[str, float]) -> list[Line]:
    """The lines of one evaluation, their names beginning with `eval/`. on_file: the metrics of its step."""
    policy = models.at(record.step)
    lines = inputs.audit_texts(judge, record, cfg, models)
    lines += inputs.audit_functions(judge, record, cfg, TrainerState(0, 0))
    ours = expected(record, cfg)
    if policy is None:
        lines.append(judge.skipped("tokens drawn", numbers.no_weights(record.step)))
    else:
        ours["entropy"] = _entropy(record, cfg, policy)
        lines.append(_draws(judge, record, cfg, policy))
    lines = [line.named(f"eval/ {line.quantity}") for line in lines]
    names = sorted(name for name in on_file if name.startswith("eval/") and not name.endswith(ENDS))
    lines += [_metric(judge, name, on_file[name], ours) for name in names]
    return [*lines, judge.skipped("eval/ intervals", "their ends are drawn by bootstrap")]


def _metric(judge: Judge, name: str, theirs: float, ours: dict[str, float]) -> Line:
    quantity = name.removeprefix("eval/")
    if quantity in ours:
        return judge.compare(name, theirs, ours[quantity], "mean")
    return judge.skipped(name, "not recomputed here")


def _draws(judge: Judge, record: Record, cfg: Config, policy: Any) -> Line:
    if cfg.rollout.backend != "transformers":
        return judge.skipped("tokens drawn", "vLLM's random numbers are its own")
    rows = [int(row) for row in record.columns["row"][:: record.state["samples"]]]
    _, distance = numbers.drawn(record, cfg, policy, rows, STREAM)
    return judge.compare("tokens drawn: distance from u", np.zeros_like(distance), distance, "draw")


def _entropy(record: Record, cfg: Config, policy: Any) -> float:
    """Mean over all tokens, nats."""
    ids = record.columns["prompt_ids"], record.columns["completion_ids"]
    _, entropies = model.token_numbers(policy, *ids, cfg.rollout.temperature)
    return float(entropies[record.policy].mean()) if record.policy.any() else math.nan


def expected(record: Record, cfg: Config) -> dict[str, float]:
    """The metrics that need no model."""
    n = record.state["samples"]
    task = rewards.combined(record.rewards, inputs.weights_of(cfg, record.rewards.shape[1]))
    right = rewards.solved(task, cfg.rewards.solved_at).reshape(-1, n).sum(1)
    known = task[~np.isnan(task)]
    found = {f"pass@{k}": float(np.mean([_pass_at(n, int(c), k) for c in right])) for k in record.state["k"]}
    found |= {
        "reward": float(known.mean()) if len(known) else math.nan,
        "reward_std": float(known.std()) if len(known) else math.nan,
        "mean_length": float(record.policy.sum(1).mean()),
        "truncated_share": float(record.truncated.mean()),
    }
    for index, name in enumerate(record.state["rewards"]):
        given = record.rewards[:, index][~np.isnan(record.rewards[:, index])]
        found[f"rewards/{name}/mean"] = float(given.mean()) if len(given) else math.nan
    return found


def _pass_at(n: int, right: int, k: int) -> float:
    """The chance that k of n completions, drawn without putting back, hold a right one."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
