"""A step's line of metrics.jsonl from its record: every number but the clock's."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import bonus, losses, optimizer, rewards
from vdr_cli.audit.files import Record
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.config import Config

Array = NDArray[np.float64]

OF_THE_CLOCK = ("time/", "step_time", "tokens_per_second", "memory", "mfu")
"""Beginnings of names that a run does not repeat."""
ELSEWHERE = ("loss", "grad_norm")
"""Compared where the update is made again."""
KINDS = {"kl": "kl", "learning_rate": "rate", "sampling/": "logp", "ratio/": "logp"}


def audit(
    judge: Judge, record: Record, cfg: Config, on_file: dict[str, float], of_update: dict[str, float]
) -> list[Line]:
    """A line per metric; of_update: what the update made again says."""
    names = list(record.state["rewards"])
    ours = expected(record, cfg, names) | of_update
    lines = []
    for name in sorted(on_file):
        if name.startswith(OF_THE_CLOCK) or name in ELSEWHERE:
            continue
        if name in ours:
            lines.append(judge.compare(name, on_file[name], ours[name], _kind(name)))
        else:
            why = "an evaluation's samples are not on file" if name.startswith("eval/") else "not recomputed here"
            lines.append(judge.skipped(name, why))
    missing = sorted(set(ours) - set(on_file))
    return lines + [Line(judge.step, name, None, ours[name], within=False, note="not on file") for name in missing]


def audit_entropy_control(
    judge: Judge, record: Record, cfg: Config, before: Record | None, entropy: float | None
) -> list[Line]:
    """The adaptive coefficient as the rollout found it; before: the rollout before, entropy: what it logged."""
    if cfg.grpo.entropy_target is None:
        return []
    theirs = record.state["entropy"]["coefficient"]
    if record.step == 0:
        return [judge.compare("entropy coefficient", theirs, 0.0, "mean")]
    if before is None or entropy is None or math.isnan(entropy):
        return [judge.skipped("entropy coefficient", "no record of the rollout before")]
    ours = losses.next_coefficient(before.state["entropy"]["coefficient"], entropy, cfg.grpo)
    return [judge.compare("entropy coefficient", theirs, ours, "mean")]


def _kind(name: str) -> str:
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), "mean")


def expected(record: Record, cfg: Config, names: list[str]) -> dict[str, float]:
    """Metrics that need no model. A mean over nothing is absent."""
    G, task = cfg.rollout.group_size, record.numbers("task_reward")
    found = {
        "reward": _mean(task),
        "reward_std": _mean(_known_std(task, G)),
        "frac_reward_zero_std": _mean(rewards.stalled(task, G)),
        "solved": _mean(rewards.solved(task, cfg.rewards.solved_at).astype(np.float64)),
        "advantage_abs": _mean(np.abs(record.numbers("task_advantage"))),
        "learning_rate": optimizer.learning_rate(
            record.step + cfg.grpo.updates_per_rollout - 1,
            cfg.train.learning_rate,
            cfg.train.warmup_steps,
            cfg.train.lr_schedule,
            cfg.train.steps,
        ),
    }
    if cfg.grpo.entropy_target is not None:
        found["entropy_coef"] = losses.entropy_coefficient(record.state, cfg.grpo)
    for index, name in enumerate(names):
        found[f"rewards/{name}/mean"] = _mean(record.rewards[:, index])
        found[f"rewards/{name}/std"] = _mean(_known_std(record.rewards[:, index], G))
    found |= _of_lengths(record, G)
    if cfg.rollout.takes_turns:
        begins = record.policy & ~np.pad(record.policy, ((0, 0), (1, 0)))[:, :-1]
        found["episodes/mean_turns"] = _mean(begins.sum(1))
    if cfg.bonus_source != "none":
        found |= _of_bonus(record, cfg)
    return {name: value for name, value in found.items() if not np.isnan(value)}


def _of_lengths(record: Record, G: int) -> dict[str, float]:
    lengths = record.policy.sum(1).astype(np.float64)
    ended = lengths[~record.truncated]
    tokens, prompts = float(lengths.sum()), float(sum(map(len, record.columns["prompt_ids"])))
    texts = record.columns["text"]
    distinct = np.array([len(set(texts[row : row + G])) for row in range(0, len(texts), G)], dtype=np.float64)
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": _mean(ended),
        "completions/min_terminated_length": float(ended.min()) if len(ended) else math.nan,
        "completions/max_terminated_length": float(ended.max()) if len(ended) else math.nan,
        "completions/clipped_ratio": _mean(record.truncated),
        "step_tokens": tokens,
        "step_prompt_tokens": prompts,
        "sampled_tokens": record.state["tokens"] + tokens,
        "num_tokens": record.state["tokens"] + record.state["prompt_tokens"] + tokens + prompts,
        "epoch": (record.state["drawn"] + record.state["drawn_now"]) / record.state["dataset_rows"],
        "completions/distinct": _mean(distinct),
    }


def _of_bonus(record: Record, cfg: Config) -> dict[str, float]:
    G, reduced = cfg.rollout.group_size, record.numbers("reduced")
    every = np.ones((len(record), 1), dtype=bool)
    gate = bonus.open_gate(cfg.bonus.gate, record.numbers("task_reward"), cfg.rewards.solved_at, G)
    added = np.abs(record.tokens("bonus")[record.policy] if _per_token(record) else record.numbers("bonus"))
    prefix = "disagreement" if cfg.bonus_source == "disagreement" else "bonus"
    return {
        f"{prefix}/mean": _mean(reduced),
        f"{prefix}/group_std": _mean(reduced.reshape(-1, G).std(1, ddof=1)),
        f"{prefix}/groups_with_spread": _mean(bonus.spread(reduced[:, None], every, G)),
        f"{prefix}/gate_open": _mean(gate),
        f"{prefix}/bonus_abs": _mean(added),
    }


def _per_token(record: Record) -> bool:
    return any(isinstance(bonus, list) for bonus in record.columns["bonus"])


def _known_std(values: Array, G: int) -> Array:
    """(groups,) ddof 1 over the known values; NaN below two."""
    known = [group[~np.isnan(group)] for group in values.reshape(-1, G)]
    return np.array([group.std(ddof=1) if len(group) > 1 else np.nan for group in known])


def _mean(values: Array | NDArray[np.bool_]) -> float:
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def audit_completions(judge: Judge, record: Record, cfg: Config, saved: dict[str, list[object]] | None) -> list[Line]:
    """The columns of completions/ against the record."""
    if saved is None:
        return []
    texts = record.decoded("text")
    mask = record.policy
    source = cfg.bonus_source.rpartition(":")[2]
    measure = cfg.disagreement.measure if source == "disagreement" else source
    columns: dict[str, Array] = {
        "row": record.numbers("row"),
        "truncated": record.truncated.astype(np.float64),
        "reward": record.numbers("task_reward"),
        "advantage": (record.tokens("advantages") * mask).sum(1) / np.maximum(mask.sum(1), 1),
    }
    columns |= {f"rewards/{name}": record.rewards[:, index] for index, name in enumerate(record.state["rewards"])}
    if cfg.bonus_source != "none":
        per_token = _per_token(record)
        tokens = record.tokens("bonus").sum(1) / np.maximum(mask.sum(1), 1) if per_token else record.numbers("bonus")
        columns |= {"bonus": tokens, measure: record.numbers("reduced")}
    lines = [
        judge.compare(f"completions/ {name}", _floats(saved.get(name, [])), values, "advantage")
        for name, values in columns.items()
    ]
    ids = [list(row) for row in saved["completion_ids"]]  # type: ignore[call-overload]
    lines.append(
        judge.equal("completions/ completion_ids", ids, [list(row) for row in record.columns["completion_ids"]])
    )
    lines.append(judge.equal("completions/ completion", saved["completion"], texts))
    return lines


def _floats(values: list[object]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
