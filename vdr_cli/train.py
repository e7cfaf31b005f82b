"""`vdr train`: GRPO with an exploration bonus. This file is the algorithm, top to bottom.

    prompts ─ rollout ─ rewards ─ bonus ─ advantages ─ update ─ (evaluate, record, checkpoint)

training/ holds what surrounds it: opening and resuming a run, its state, metrics and checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vdr_cli.config import Config, GrpoConfig
from vdr_cli.disagreement.acting import by_position
from vdr_cli.engine import collectives
from vdr_cli.engine.optimizer import learning_rate_at
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.exploration import bonus as bonuses
from vdr_cli.exploration.draws import uniforms
from vdr_cli.exploration.sources import Signals
from vdr_cli.grpo import advantages as grpo_advantages
from vdr_cli.grpo.estimators import ADVANTAGES
from vdr_cli.grpo.losses import (
    LossInputs,
    LossSettings,
    PolicyOutputs,
    Totals,
    entropy_threshold,
    kl_penalised_rewards,
    loss_mask,
    policy_loss,
    token_weights,
)
from vdr_cli.rewards.base import is_solved
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.samples import Completions, Stream, completion_key
from vdr_cli.training import audit_record
from vdr_cli.training.batch import (
    Advantages,
    Bonus,
    MicroBatch,
    RewardedGroups,
    Updates,
    concatenate,
    micro_batches_of,
    shared_micro_batches,
)
from vdr_cli.training.covariant_tokens import covariant_tokens
from vdr_cli.training.held_out import evaluate
from vdr_cli.training.minibatches import own_minibatches, read_old_logps
from vdr_cli.training.opening import open_run
from vdr_cli.training.pending_rollout import PendingRollout, reward_stream
from vdr_cli.training.reading import PolicyLogps, needs_policy, read_for_bonus, read_logps
from vdr_cli.training.refusals import stop_if_refused_too_often
from vdr_cli.training.resources import Resources
from vdr_cli.training.state import LoopState
from vdr_cli.training.step_metrics import step_metrics

CORRECTION_CAP = 2.0
"""grpo.importance_cap with rollout.ahead and rollout.members, unless it is given."""


def train(config: Config, resume: str | None = None) -> int:
    """Run the loop until its steps or its budget are used up.

    Returns the exit code: 0, or 130/143 after Ctrl-C or SIGTERM.

    resume: None, "auto" (the newest complete checkpoint of train.output, if any) or a checkpoint's path.
    Raises VdrError, the same one on every rank, after saving a checkpoint.
    """
    with open_run(config, resume) as run:
        res, state, log = run.resources, run.state, run.log
        if config.train.eval_every and (state.step == 0 or state.owes_evaluation):
            log.evaluation(state.step, evaluate(res, state, log))
        state.owes_evaluation = False
        while not state.is_over(config.train) and not run.stopped():
            before = state.step
            with res.timer.phase("step"):
                batch, advantages = collect(res, state)
                updates = update(res, state, batch, advantages)
            metrics = step_metrics(res, batch, advantages, updates)
            audit_record.save(res, state, log, batch, advantages, updates)
            state.end_step(len(updates.refused), **spent(metrics))
            follow_entropy(state, config.grpo, metrics)
            due = res.due(before, state.step, state.is_over(config.train))
            if due.reference:
                res.synchronise_reference()
            if due.evaluation:
                try:
                    metrics |= evaluate(res, state, log)
                except (ConfigError, DataError):  # the step's checkpoint is saved, so its record must be there
                    log.step(res, state, metrics, batch, advantages, due.completions)
                    state.count_refusals(updates.refused)
                    state.owes_evaluation = True
                    raise
            log.step(res, state, metrics, batch, advantages, due.completions)
            stop_if_refused_too_often(res, state, log, batch, advantages, updates)
            if due.checkpoint or run.checkpointer.best_is_new(state):
                run.checkpointer.save_if_possible(state)
        run.complete()
        if run.exit_code:
            log.finish_uploads()
    return run.exit_code


# ---- prompts ─ rollout ─ rewards ─ bonus ─ advantages ------------------------------------------------------------


def collect(res: Resources, state: LoopState) -> tuple[RewardedGroups, Advantages]:
    """This rank's groups, from prompts to advantages. Collective.

    The weights are gathered once for all of it; between the collectives ranks run independently.
    """
    cfg = res.config
    with res.engine.gathered_model() as model:
        batch = sample_informative(res, state, model)
        if cfg.rollout.ahead:
            counts = collectives.even_shares(cfg.train.prompts_per_step)
            next_step = state.step + cfg.grpo.updates_per_rollout
            state.next_pending = start_rollout(res, state, model, counts, next_step)
        res.rollout.rest()
        reference = reference_logps(res, model, batch.completions)
        policy = PolicyLogps(reference.policy, reference.entropy)
        signals = read_for_bonus(res, state, model, batch, policy)
    return batch, reward_head(res, state, batch, reference, signals)


def sample_informative(res: Resources, state: LoopState, model: Any) -> RewardedGroups:
    """prompts_per_step groups; those with equal task rewards are resampled, up to resample_groups times. Collective."""
    cfg, G = res.config, res.config.rollout.group_size
    counts = collectives.even_shares(cfg.train.prompts_per_step)
    pending = state.pending or start_rollout(res, state, model, counts, state.step)
    batch = await_rollout(res, pending)
    for _ in range(cfg.grpo.resample_groups):
        stalled = grpo_advantages.zero_variance(batch.task_reward, G)
        counts = collectives.gather_objects(int(stalled.sum()))
        if not sum(counts):
            break
        fresh = await_rollout(res, start_rollout(res, state, model, counts, state.step))
        batch = replace_groups(batch, stalled, fresh, G, res.tokenizer.pad_token_id)
    return batch


def start_rollout(res: Resources, state: LoopState, model: Any, counts: list[int], step: int) -> PendingRollout:
    """Start to sample the next prompts of the stream, counts[r] on rank r, for this step. Collective.

    Rewards are computed as groups finish, while others are still sampled.
    """
    cfg = res.config
    with collectives.agreed():
        positions = list(state.take(counts, collectives.rank()))
        episodes = res.begin_episodes([res.prompt_at(position) for position in positions])
        keys = [completion_key(cfg.train.seed, Stream.TRAINING, position) for position in positions]
        rewards = reward_stream(cfg, res.rewards, episodes, step)
    request = RolloutRequest(
        [prompt.token_ids for prompt in episodes.prompts],
        cfg.rollout.group_size,
        res.sampling,
        keys,
        rewards.finished,
        conversation=episodes.conversation,
        acting=None if res.acting is None else by_position(res.acting, step, positions),
    )
    with collectives.agreed(), res.timer.phase("rollout"):
        wait = res.rollout.start(model, request)
    return PendingRollout(positions, episodes, wait, rewards)


def await_rollout(res: Resources, pending: PendingRollout) -> RewardedGroups:
    """The completions with what every reward function returned for them. Collective."""
    cfg = res.config
    with collectives.agreed(), res.timer.phase("rollout"):
        completions = pending.wait()
    with res.timer.phase("rewards"), res.reward_models.ready(), collectives.agreed():  # what is left after sampling
        texts, rewards = pending.rewards.result()  # (B, F)
        pending.episodes.close()
    task_reward = grpo_advantages.combine_rewards(rewards, res.reward_weights())
    lengths = completions.policy_mask.sum(1)
    task_reward += grpo_advantages.overlong_penalty(lengths, cfg.rollout.completion_tokens, cfg.grpo.overlong_cache)
    G = cfg.rollout.group_size
    prompts = [prompt for prompt in pending.episodes.prompts for _ in range(G)]
    positions = [position for position in pending.positions for _ in range(G)]
    told = pending.episodes.counts, pending.rewards.logs
    return RewardedGroups(prompts, completions, texts, rewards, task_reward, positions, *told)


def replace_groups(
    batch: RewardedGroups, stalled: Tensor, fresh: RewardedGroups, group_size: int, pad_id: int
) -> RewardedGroups:
    """The batch with its stalled groups (groups,) bool replaced by the groups of `fresh`, in order."""
    if not bool(stalled.any()):
        return batch
    source = torch.arange(len(stalled))
    source[stalled] = len(stalled) + torch.arange(int(stalled.sum()))
    rows = (source[:, None] * group_size + torch.arange(group_size)).flatten()
    return concatenate([batch, fresh], pad_id).select(rows)


@dataclass(frozen=True)
class ReferenceLogps:
    """Log-probabilities that the loss or the reward compares with, where the settings ask for them."""

    reference: Tensor | None = None  # (B, T), under the reference model
    policy: Tensor | None = None  # (B, T), under the policy
    entropy: Tensor | None = None  # (B, T), of the policy
    high_entropy: Tensor | None = None  # (B, T) bool, the rollout's tokens of highest entropy


def reference_logps(res: Resources, model: Any, completions: Completions) -> ReferenceLogps:
    """Log-probabilities before the update; nothing is computed that the loss does not use. Collective."""
    cfg = res.config.grpo
    reference = policy = entropy = high_entropy = None
    if res.reference is not None and cfg.beta:
        with res.timer.phase("reference"), res.reference.whole(model) as reference_model:
            reference, _ = read_logps(res, reference_model, completions)
    if cfg.reads_policy_first or needs_policy(res.source, res.config.rollout, completions):
        with res.timer.phase("policy"):
            policy, entropy = read_old_logps(res, model, completions)
        if cfg.top_entropy_quantile < 1.0:
            trained = loss_mask(completions.policy_mask, completions.truncated, cfg.mask_truncated)
            everybody = torch.cat(collectives.gather_objects(entropy[trained]))
            high_entropy = entropy >= entropy_threshold(everybody, cfg.top_entropy_quantile)
    return ReferenceLogps(reference, policy, entropy, high_entropy)


# ---- advantages ─ update -----------------------------------------------------------------------------------------


def reward_head(
    res: Resources, state: LoopState, batch: RewardedGroups, logps: ReferenceLogps, signals: dict[str, Any]
) -> Advantages:
    """The reward head: task rewards and bonus to advantages. Collective.

    signals: what the bonus's source needs, by name.
    """
    completions = batch.completions
    mask = loss_mask(completions.policy_mask, completions.truncated, res.config.grpo.mask_truncated)
    rewards = rewards_less_kl(res.config.grpo, batch, logps)
    task_advantages = group_relative(res.config, res.reward_weights(), batch.rewards, rewards)
    shaped, bonus = task_advantages, None
    if res.source is not None:
        shaped, bonus = add_bonus(res, state, batch, signals, rewards, task_advantages)
    inputs = LossInputs(
        advantages=(shaped if shaped.dim() == 2 else shaped[:, None]).expand(mask.shape),
        mask=mask,
        old_logps=logps.policy,
        ref_logps=logps.reference,
        sampler_logps=completions.sampler_logps,
        selected=logps.high_entropy,
    )
    return Advantages(inputs, task_advantages, bonus, signals.get("visits"), logps.entropy)


def add_bonus(
    res: Resources,
    state: LoopState,
    batch: RewardedGroups,
    signals: dict[str, Any],
    rewards: Tensor,
    task_advantages: Tensor,
) -> tuple[Tensor, Bonus]:
    """(advantages with the bonus (B,) or (B, T), the bonus). Collective; updates state.rms.

    source -> b -> permutation -> gate -> shape -> weight
    """
    cfg, G, mask = res.config.bonus, res.config.rollout.group_size, batch.completions.policy_mask
    assert res.source is not None
    solved = is_solved(batch.task_reward, res.config.rewards.solved_at)
    with collectives.agreed():
        given = Signals(G, mask, batch.task_reward, solved, task_advantages, **signals)
        found = res.source.numbers(given, res.config)
    b, token_mask = found.b, None if found.b.dim() == 1 else mask
    if cfg.permute == "group":
        keys = uniforms(res.config.train.seed, Stream.PERMUTATION, batch.positions, G)[:, 0]
        b = bonuses.permuted(b, keys, G, token_mask)
    gate = bonuses.gated(cfg.gate, batch.task_reward, solved, G)
    weight = bonuses.weight_at(
        cfg.schedule, cfg.effective_weight, cfg.schedule_fraction, state.step, res.config.train.steps
    )
    if cfg.effective_shape == "reward":
        shaped = bonuses.shaped_rewards(rewards, b, gate, weight, G)
        advantages = group_relative(res.config, res.reward_weights(), batch.rewards, shaped)
        return advantages, Bonus(found.per_completion, gate, advantages - task_advantages)
    scale = bonus_scale(res.config, state.rms, b, token_mask)
    advantages, added = bonuses.shaped_advantages(
        cfg.effective_shape, task_advantages, rewards, b, gate, G, weight, cfg.clip, scale, token_mask
    )
    return advantages, Bonus(found.per_completion, gate, added)


def bonus_scale(config: Config, rms: bonuses.RunningRms, b: Tensor, token_mask: Tensor | None) -> float:
    """The divisor of the additive shape, this step's deviations included. Collective; updates rms."""
    cfg = config.bonus
    sums = bonuses.deviation_sums(b, config.rollout.group_size, token_mask)
    first = cfg.scale_steps if cfg.scale == "initial" else None
    squares, count = collectives.all_reduce_sum(sums)
    rms.update(squares, count, first)
    return 1.0 if cfg.scale == "none" else rms.value


def rewards_less_kl(cfg: GrpoConfig, batch: RewardedGroups, logps: ReferenceLogps) -> Tensor:
    """(B,) task rewards, less β times the KL to the reference when it is taken from the reward."""
    if cfg.kl_in == "loss" or logps.reference is None or logps.policy is None:
        return batch.task_reward
    mask = batch.completions.policy_mask
    return kl_penalised_rewards(batch.task_reward, logps.policy, logps.reference, mask, cfg.beta, cfg.kl)


def group_relative(config: Config, weights: Tensor, rewards: Tensor, task_reward: Tensor) -> Tensor:
    """(B,) advantages of task_reward (B,) within its groups. Collective when the scale is the whole step's.

    rewards: (B, F), what the functions of these weights (F,) returned.
    """
    cfg, G = config.grpo, config.rollout.group_size
    if cfg.multi_reward == "normalise_then_sum":
        # What was added to the functions' sum (overlong penalty, KL, bonus) keeps its size.
        added = task_reward - grpo_advantages.combine_rewards(rewards, weights)
        scores = grpo_advantages.normalised_sum(rewards, weights, G) + grpo_advantages.centred(added, G)
        return grpo_advantages.standardise(scores, step_moments(scores))
    if cfg.advantage != "group":
        return ADVANTAGES[cfg.advantage](task_reward, G, cfg.pass_k)
    batch_std = step_moments(task_reward).std if cfg.scale_rewards == "batch" else None
    return grpo_advantages.group_advantages(task_reward, G, cfg.scale_rewards, batch_std)


def step_moments(values: Tensor) -> grpo_advantages.Moments:
    """Mean and standard deviation over the whole step. Collective."""
    own = grpo_advantages.Moments.of(values)
    return grpo_advantages.Moments(*collectives.all_reduce_sum([own.count, own.total, own.squares]))


def update(res: Resources, state: LoopState, batch: RewardedGroups, advantages: Advantages) -> Updates:
    """Optimizer steps on one rollout: num_iterations passes over its minibatches, a step each. Collective.

    The ratio's denominator is the policy before the first of them. With one minibatch the first pass, whose ratio is 1,
    reads it; with several it was read beforehand.
    """
    cfg, engine = res.config, res.engine
    settings = loss_settings(cfg)
    if cfg.grpo.entropy_target is not None:
        settings = replace(settings, entropy_weight=state.entropy.weight(cfg.grpo.entropy_target))
    updates = Updates(entropy_weight=settings.entropy_weight)
    with res.timer.phase("update"):
        for rows in own_minibatches(cfg) * cfg.grpo.num_iterations:
            now = state.step + len(updates.refused)
            totals, own = minibatch(cfg, batch.completions, advantages.inputs, rows, now, engine.device)
            micro_batches = shared_micro_batches(own, engine.sequence)
            for index, micro in enumerate(micro_batches):
                logps, entropy = engine.forward(*micro.tokens, cfg.rollout.temperature, micro.policy_mask)
                inputs = replace(micro.inputs, old_logps=updates.old_logps(micro, index, logps, entropy))
                output = policy_loss(PolicyOutputs(logps, entropy, engine.router_balance()), inputs, settings)
                engine.backward(output.loss, last=index == len(micro_batches) - 1)
                updates.add(micro, output)
            updates.learning_rate = learning_rate_at(now, cfg.train)
            updates.end_step(totals, engine.step(updates.learning_rate))
    return updates


def loss_settings(config: Config) -> LossSettings:
    """The loss's numbers and names from the settings of those names.

    Completions of older weights or of members are corrected (`importance_cap`) even if nothing is set.
    """
    settings = LossSettings(**{each.name: getattr(config.grpo, each.name) for each in fields(LossSettings)})
    others = config.rollout.ahead or config.rollout.members
    return replace(settings, importance_cap=CORRECTION_CAP) if others and settings.importance_cap is None else settings


def spent(metrics: dict[str, float]) -> dict[str, Any]:
    """The resources that a step used up, by the arguments of `LoopState.end_step`."""
    tokens, prompt_tokens = (int(metrics[name]) for name in ("step_tokens", "step_prompt_tokens"))
    return {"tokens": tokens, "prompt_tokens": prompt_tokens, "seconds": metrics["step_time"]}


def follow_entropy(state: LoopState, cfg: GrpoConfig, metrics: dict[str, float]) -> None:
    """Adapt the weight of the entropy bonus to the entropy of the rollout that has just been trained on."""
    if cfg.entropy_target is not None:
        entropy = metrics.get("entropy", math.nan)
        state.entropy.follow(entropy, cfg.entropy_target, cfg.entropy_delta, cfg.entropy_max)


def minibatch(
    config: Config, completions: Completions, inputs: LossInputs, rows: Tensor, step: int, device: torch.device
) -> tuple[Totals, list[MicroBatch]]:
    """One optimizer step's denominators, and these rows of this rank as its micro-batches on the device. Collective.

    The weights hold the denominators of the whole step, so its loss is one weighted sum over micro-batches and ranks.
    """
    own = inputs.map(lambda tensor: tensor[rows])
    totals = step_totals(own.mask)
    own = replace(own, covariant=covariant_tokens(config, own, rows, step))
    if not len(rows):  # this rank has no group of the minibatch: a row without valid tokens takes part for it
        rows = torch.zeros(1, dtype=torch.int64)
        nothing = torch.zeros_like(inputs.mask[rows])
        covariant = None if own.covariant is None else nothing
        own = replace(inputs.map(lambda tensor: tensor[rows]), mask=nothing, covariant=covariant)
    longest = config.rollout.completion_tokens
    weights = token_weights(config.grpo.loss, own.mask, totals, longest)
    entropy_weights = token_weights("dapo", own.mask, totals, longest)
    own = replace(own, weights=weights, entropy_weights=entropy_weights)
    return totals, micro_batches_of(completions.rows(rows), own, config.train.micro_batch_size, device)


def step_totals(mask: Tensor) -> Totals:
    """The denominators of the whole optimizer step, over all ranks, before the first backward. Collective.

    mask: (b, T) bool, the loss mask of this rank's rows of the step.
    """
    completions, tokens = collectives.all_reduce_sum([len(mask), float(mask.sum())])
    return Totals(completions=completions, tokens=tokens)
