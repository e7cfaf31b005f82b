"""From rewards and measures on file to advantages: groups, KL in the reward, gates, shapes, the running RMS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import bonus as bonuses
from vdr_cli.audit import rewards
from vdr_cli.audit.files import Record
from vdr_cli.audit.inputs import weights_of
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.config import Config

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """(B,) or (B, T), as the run keeps them."""

    task_advantages: Array
    advantages: Array
    bonus: Array | None = None
    reduced: Array | None = None
    rms: bonuses.Rms | None = None


def found(record: Record, cfg: Config) -> Found:
    """Everything between the rewards and the update, each from what lies on file before it."""
    penalised = _penalised(record, cfg)
    task = _group_relative(record, cfg, penalised)
    d, mask = cfg.disagreement, record.mask
    if d.mode == "none":
        return Found(task, _over_tokens(task, record))
    reduced = record.numbers("reduced")
    if d.mode == "per_token":
        reduced = bonuses.reduced(record.tokens("measure_tokens"), mask, d.last_n)
    on_file = record.numbers("reduced")
    weight = bonuses.weight_at(d.schedule, d.weight, d.schedule_fraction, record.step, cfg.train.steps)
    gate = bonuses.open_gate(d.gate, record.numbers("task_reward"), cfg.rewards.solved_at, cfg.rollout.group_size)
    if d.shape == "reward":
        counted = np.ones((len(on_file), 1), dtype=bool)
        differs = np.repeat(bonuses.spread(on_file[:, None], counted, cfg.rollout.group_size), cfg.rollout.group_size)
        with_bonus = _group_relative(record, cfg, penalised + weight * on_file * gate * differs)
        return Found(task, _over_tokens(with_bonus, record), with_bonus - task, reduced)
    return _shaped(record, cfg, task, penalised, reduced, weight, gate)


def _shaped(
    record: Record, cfg: Config, task: Array, penalised: Array, reduced: Array, weight: float, gate: NDArray[np.bool_]
) -> Found:
    d, G = cfg.disagreement, cfg.rollout.group_size
    b, valid = record.numbers("reduced")[:, None], np.ones((len(record), 1), dtype=bool)
    if d.credit == "token":
        b = bonuses.credit(record.tokens("measure_tokens"), record.mask, d.measure, d.discount, d.last_n)
        valid = record.mask
    from_mean = bonuses.deviation(b, valid, G)
    rms = bonuses.Rms(**record.state["rms"]) if record.state["rms"] else bonuses.Rms()
    rms = rms.after(from_mean, valid)
    if d.shape != "additive":
        with_bonus = bonuses.shaped(d.shape, task, penalised, b[:, 0], gate, G, weight, d.clip)
        return Found(task, _over_tokens(with_bonus, record), with_bonus - task, reduced, rms)
    added = weight * np.clip(from_mean / rms.value, -d.clip, d.clip) * gate[:, None]
    if d.credit == "token":
        return Found(task, (task[:, None] + added) * record.mask, added, reduced, rms)
    return Found(task, _over_tokens(task + added[:, 0], record), added[:, 0], reduced, rms)


def _over_tokens(values: Array, record: Record) -> Array:
    return values[:, None] * record.mask


def _penalised(record: Record, cfg: Config) -> Array:
    """(B,) the task reward, less β Σ_t kl_t when the KL is in the reward."""
    task = record.numbers("task_reward")
    if not cfg.grpo.beta or cfg.grpo.kl_in != "reward":
        return task
    x = np.where(record.mask, record.tokens("logps") - record.tokens("ref_logps"), 0.0)
    per_token = {"k1": x, "k2": x**2 / 2.0, "k3": np.exp(-x) + x - 1.0}[cfg.grpo.kl]
    return task - cfg.grpo.beta * np.where(record.mask, per_token, 0.0).sum(1)


def _group_relative(record: Record, cfg: Config, values: Array) -> Array:
    G = cfg.rollout.group_size
    if cfg.grpo.advantage != "group":
        return rewards.other_advantages(values, G, cfg.grpo.advantage, cfg.grpo.pass_k)
    if cfg.grpo.multi_reward == "sum_then_normalise":
        return rewards.advantages(values, G, cfg.grpo.scale_rewards)
    weights = weights_of(cfg)
    added = values - rewards.combined(record.rewards, weights)
    columns = np.concatenate([record.rewards, added[:, None]], axis=1)
    return rewards.summed_advantages(columns, np.append(weights, 1.0), G)


def audit(judge: Judge, record: Record, cfg: Config, before: Record | None) -> list[Line]:
    """Advantages and bonus; before: the record of the rollout before, whose RMS this one starts from."""
    ours = found(record, cfg)
    # The run finds what was added to the functions' sum by a subtraction in float32, and normalises it.
    kind = "column" if cfg.grpo.multi_reward == "normalise_then_sum" else "advantage"
    lines = [judge.compare("task advantages", record.numbers("task_advantage"), ours.task_advantages, kind)]
    if ours.bonus is not None and ours.reduced is not None:
        if cfg.disagreement.mode == "per_token":
            on_file = record.numbers("reduced")
            lines.append(judge.compare(f"{cfg.disagreement.measure} of completions", on_file, ours.reduced, "bonus"))
        per_token = cfg.disagreement.credit == "token"
        theirs = record.tokens("bonus") if per_token else record.numbers("bonus")
        lines.append(judge.compare("bonus", theirs, ours.bonus, "bonus" if kind == "advantage" else kind))
    if ours.rms is not None:
        lines += _rms_lines(judge, record, before, ours.rms)
    lines.append(judge.compare("advantages", record.tokens("advantages"), ours.advantages, kind))
    return lines


def _rms_lines(judge: Judge, record: Record, before: Record | None, ours: bonuses.Rms) -> list[Line]:
    started = record.state["rms"] or {"average": 0.0, "weight": 0.0}
    lines = []
    if record.step == 0 or before is not None:
        expected = before.state["rms_after"] if before is not None else {"average": 0.0, "weight": 0.0}
        theirs, right = ([each["average"], each["weight"]] for each in (started, expected))
        lines.append(judge.compare("RMS before the step", theirs, right, "bonus"))
    after = record.state["rms_after"]
    lines.append(judge.compare("RMS after the step", bonuses.Rms(**after).value, ours.value, "bonus"))
    return lines
