"""From rewards and measures on file to advantages: groups, KL in the reward, gates, shapes, the running RMS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import bonus as bonuses
from vdr_cli.audit import rewards, sources
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
    if cfg.bonus_source == "none":
        return Found(task, _over_tokens(task, record))
    if sources.is_taken_whole(record, cfg):
        added = record.tokens("bonus")
        return Found(task, (task[:, None] + added) * record.mask, added)
    b, valid, reduced = sources.numbers(record, cfg, task)
    if cfg.bonus.permute == "group":
        b = bonuses.permuted(b, valid, sources.permutation_keys(record, cfg), cfg.rollout.group_size)
    return _with_bonus(record, cfg, task, penalised, (b, valid), reduced)


def _with_bonus(
    record: Record,
    cfg: Config,
    task: Array,
    penalised: Array,
    numbers: tuple[Array, NDArray[np.bool_]],
    reduced: Array | None,
) -> Found:
    """The advantages from the source's numbers and where they are valid: (B, 1) each, or (B, T)."""
    own, G, (b, valid) = cfg.bonus, cfg.rollout.group_size, numbers
    weight = bonuses.weight_at(own.schedule, own.effective_weight, own.schedule_fraction, record.step, cfg.train.steps)
    gate = bonuses.open_gate(own.gate, record.numbers("task_reward"), cfg.rewards.solved_at, G)
    if own.effective_shape == "reward":
        differs = np.repeat(bonuses.spread(b, valid, G), G)
        with_bonus = _group_relative(record, cfg, penalised + weight * b[:, 0] * gate * differs)
        return Found(task, _over_tokens(with_bonus, record), with_bonus - task, reduced)
    from_mean = bonuses.deviation(b, valid, G)
    rms = bonuses.Rms(**record.state["rms"]) if record.state["rms"] else bonuses.Rms()
    rms = rms.after(from_mean, valid, own.scale_steps if own.scale == "initial" else None)
    if own.effective_shape in ("multiplicative", "quality"):
        with_bonus = bonuses.shaped(own.effective_shape, task, penalised, b[:, 0], gate, G, weight, own.clip)
        return Found(task, _over_tokens(with_bonus, record), with_bonus - task, reduced, rms)
    size = b * valid if own.effective_shape == "plain" else from_mean / (1.0 if own.scale == "none" else rms.value)
    added = weight * np.clip(size, -own.clip, own.clip) * gate[:, None]
    if b.shape[1] > 1 or cfg.token_bonus:
        return Found(task, (task[:, None] + added) * record.mask, added, reduced, rms)
    return Found(task, _over_tokens(task + added[:, 0], record), added[:, 0], reduced, rms)


def _over_tokens(values: Array, record: Record) -> Array:
    return values[:, None] * record.mask


def _penalised(record: Record, cfg: Config) -> Array:
    """(B,) the task reward, less β Σ_t kl_t when the KL is in the reward."""
    task = record.numbers("task_reward")
    if not cfg.grpo.beta or cfg.grpo.kl_in != "reward":
        return task
    x = np.where(record.policy, record.tokens("logps") - record.tokens("ref_logps"), 0.0)
    per_token = {"k1": x, "k2": x**2 / 2.0, "k3": np.exp(-x) + x - 1.0}[cfg.grpo.kl]
    return task - cfg.grpo.beta * np.where(record.policy, per_token, 0.0).sum(1)


def _group_relative(record: Record, cfg: Config, values: Array) -> Array:
    G = cfg.rollout.group_size
    if cfg.grpo.advantage != "group":
        return rewards.other_advantages(values, G, cfg.grpo.advantage, cfg.grpo.pass_k)
    if cfg.grpo.multi_reward == "sum_then_normalise":
        return rewards.advantages(values, G, cfg.grpo.scale_rewards)
    weights = weights_of(cfg, record.rewards.shape[1])
    added = values - rewards.combined(record.rewards, weights)
    return rewards.summed_advantages(record.rewards, weights, added, G)


def audit(judge: Judge, record: Record, cfg: Config, before: Record | None) -> list[Line]:
    """Advantages and bonus; before: the record of the rollout before, whose RMS this one starts from."""
    ours = found(record, cfg)
    lines = [judge.compare("task advantages", record.numbers("task_advantage"), ours.task_advantages, "advantage")]
    if ours.bonus is not None:
        if ours.reduced is not None:
            source = cfg.bonus_source
            name = cfg.disagreement.measure if source == "disagreement" else source
            lines.append(judge.compare(f"{name} of completions", record.numbers("reduced"), ours.reduced, "bonus"))
        lines += sources.left_out(judge, record, cfg)
        theirs = record.tokens("bonus") if ours.bonus.ndim == 2 else record.numbers("bonus")
        lines.append(judge.compare("bonus", theirs, ours.bonus, "bonus"))
    if ours.rms is not None:
        lines += _rms_lines(judge, record, before, ours.rms)
    lines.append(judge.compare("advantages", record.tokens("advantages"), ours.advantages, "advantage"))
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
