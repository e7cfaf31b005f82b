"""The plan of a configuration in batches, tokens and files, before anything starts. Pure."""

from __future__ import annotations

from math import ceil

from vdr_cli.config.schema import Config


def batch_plan(config: Config, processes: int) -> list[tuple[str, str]]:
    """Name and value of each line that --dry-run prints under the configuration."""
    group, groups = config.rollout.group_size, config.train.prompts_per_step
    completions = group * groups
    few, many = groups // processes, -(-groups // processes)
    in_minibatch = ceil(many / config.grpo.minibatches)
    micro_batches = ceil(in_minibatch * group / config.train.micro_batch_size)
    tokens = completions * config.rollout.completion_tokens
    rollouts = config.train.steps // config.grpo.updates_per_rollout
    lines = [
        ("processes", str(processes)),
        ("steps", f"{config.train.steps:,} from {rollouts:,} rollouts{_minibatches(config, few)}"),
        ("groups per rollout", f"{groups}, {few if few == many else f'{few} or {many}'} on a process"),
        ("completions per rollout", f"{completions} = {groups} groups x {group}"),
        (
            "micro-batches",
            f"{micro_batches} per process and step, at most {config.train.micro_batch_size} completions each",
        ),
        ("completion tokens", f"at most {tokens:,} per rollout, {tokens * rollouts:,} in the run"),
        ("bonus", bonus_line(config)),
        ("held-out evaluations", _evaluations(config)),
        ("checkpoints", _checkpoints(config)),
        ("output", config.train.output or "a new directory in runs/, named at the start"),
    ]
    if config.rollout.members:
        lines.insert(6, ("sampling", f"each group from one of {_members(config)}"))
    if config.grpo.resample_groups:
        lines.insert(
            6, ("resampling", f"up to {config.grpo.resample_groups} extra rollouts per step, not counted above")
        )
    return lines


def _minibatches(config: Config, groups: int) -> str:
    """groups: the fewest that a process holds."""
    parts = config.grpo.minibatches
    if parts == 1:
        return ""
    idle = "" if groups >= parts else "; a process without a group of a minibatch idles through its step"
    return f", {parts} minibatches of {config.train.prompts_per_step // parts} groups each{idle}"


def bonus_line(config: Config) -> str:
    """The bonus in one line: its source, what reads the completions for it, its shape and weight."""
    source, own = config.bonus_source, config.bonus
    if source == "none":
        return "none: plain GRPO"
    read = f" ({_disagreement(config)})" if source == "disagreement" else ""
    return f"{source}{read}, {own.effective_shape}, weight {own.effective_weight:g}"


def _disagreement(config: Config) -> str:
    cfg = config.disagreement
    return f"{cfg.measure}, {cfg.mode}, {_members(config)}"


def _members(config: Config) -> str:
    cfg = config.disagreement
    top = f"the top {cfg.last_k} layers" if cfg.last_k else "the top quarter of the layers"
    share = "every layer" if cfg.effective_scope == "full" else top
    return f"{cfg.members} members through {share}"


def _evaluations(config: Config) -> str:
    every, steps = config.train.eval_every, config.train.steps
    if not every:
        return "none"
    count = 1 + steps // every + (1 if steps % every else 0)
    return f"{count}, each {config.train.eval_prompts} prompts x {config.train.eval_samples} completions"


def _checkpoints(config: Config) -> str:
    every, steps = config.train.checkpoint_every, config.train.steps
    written = steps // every + (1 if steps % every else 0) if every else 1
    return f"{written} written, {min(written, config.train.keep_last)} kept"
