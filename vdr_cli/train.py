"""`vdr train`: GRPO with a disagreement bonus. This file is the algorithm, top to bottom.

    prompts ─ rollout ─ rewards ─ disagreement ─ advantages ─ update ─ (metrics, completions, checkpoint)

How a run starts, saves and ends is in training/run.py; what it writes down, in training/record.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.layer_major import measure_by_layers
from vdr_cli.disagreement.members import measure
from vdr_cli.disagreement.recorder import StemRecorder, recorder_of
from vdr_cli.disagreement.stems import StemKeeper
from vdr_cli.engine import collectives
from vdr_cli.engine.build import learning_rate_at
from vdr_cli.exploration import bonus as bonuses
from vdr_cli.grpo import advantages as grpo_advantages
from vdr_cli.grpo.losses import (
    Totals,
    entropy_threshold,
    kl_penalised_rewards,
    loss_mask,
    policy_loss,
    token_weights,
)
from vdr_cli.models.policy import completion_logps
from vdr_cli.samples import Completions, Prompt, completion_key, to_device
from vdr_cli.training import record
from vdr_cli.training.batch import Batch, Signal, Updates, concatenate, micro_batches_of
from vdr_cli.training.pending_rollout import Drawing, reward_stream
from vdr_cli.training.run import Run, even_shares, open_run


def train(config: Config, resume: str | None = None) -> int:
    """Run the loop to train.steps; returns the exit code (0, or 130/143 after Ctrl-C or SIGTERM).

    resume: None, "auto" (the newest complete checkpoint of train.output, if any) or a checkpoint's path.
    Raises VdrError, the same one on every rank, after saving a checkpoint.
    """
    with open_run(config, resume) as run:
        record.evaluate_at_start(run)
        while run.step < config.train.steps and not run.stopped():
            with run.timer.phase("step"):
                batch, signal = collect(run)
                updates = update(run, batch, signal)
            record.end_step(run, batch, signal, updates)
        run.finish()
    return run.exit_code


# ---- prompts ─ rollout ─ rewards ─ disagreement ─ advantages -----------------------------------------------------


def collect(run: Run) -> tuple[Batch, Signal]:
    """This rank's groups, from prompts to advantages.

    Under ZeRO-3 the weights are gathered once for all of it; between the collectives ranks go their own pace.
    """
    with run.engine.twin() as model:
        batch = sample_informative(run, model)
        if run.config.rollout.ahead:
            next_step = run.step + run.config.grpo.num_iterations
            run.next_drawing = begin(run, model, even_shares(run.config.train.prompts_per_step), next_step)
        stems = stem_keeper(run, model, batch)
        batch = replace(batch, recorder=None)  # whose states are to go with the stems, before the update
        knowledge = consult(run, model, batch, stems)
        measured = disagree(run, model, batch, stems)
        by_token = shown_tokens(run, model, batch, measured, stems)
    return batch, reward_head(run, batch, measured, knowledge, by_token)


def sample_informative(run: Run, model: Any) -> Batch:
    """prompts_per_step groups; those whose task rewards are all equal are drawn anew, resample_groups times at most."""
    G = run.config.rollout.group_size
    drawing = run.drawing or begin(run, model, even_shares(run.config.train.prompts_per_step), run.step)
    batch = finish(run, drawing)
    for _ in range(run.config.grpo.resample_groups):
        stalled = grpo_advantages.zero_variance(batch.task_reward, G)
        counts = collectives.gather_objects(int(stalled.sum()))
        if not sum(counts):
            break
        fresh = finish(run, begin(run, model, counts, run.step))
        batch = replace_groups(batch, stalled, fresh, G, run.tokenizer.pad_token_id)
    return batch


def begin(run: Run, model: Any, counts: list[int], step: int) -> Drawing:
    """Start to sample the next prompts of the stream, counts[r] on rank r, for this step. Collective.

    Rewards are computed as groups finish, while others are still sampled.
    """
    cfg = run.config

    def here() -> Drawing:
        drawn = run.next_prompts(counts)  # each with its position in the stream
        prompts = [prompt for _, prompt in drawn]
        keys = [completion_key(cfg.train.seed, 1, position) for position, _ in drawn]
        rewards = reward_stream(cfg, run.rewards, run.tokenizer, prompts, step)
        recorder = stem_recorder(run, model, prompts, step)
        with run.timer.phase("rollout"), recorder.watching() if recorder else nullcontext():
            wait = run.rollout.begin(
                model,
                [prompt.token_ids for prompt in prompts],
                cfg.rollout.group_size,
                run.sampling,
                keys,
                rewards.finished,
                recorder,
            )
        return Drawing([position for position, _ in drawn], prompts, wait, rewards, recorder)

    return collectives.together(here)


def finish(run: Run, drawing: Drawing) -> Batch:
    """The completions with what every reward function says of them. Collective."""
    cfg = run.config

    def here() -> Batch:
        with run.timer.phase("rollout"):
            completions = drawing.wait()
        with run.timer.phase("rewards"):  # what is left of it after sampling
            texts, rewards = drawing.rewards.result()  # (B, F)
        weights = torch.tensor([reward.weight for reward in run.rewards])
        task_reward = grpo_advantages.combine_rewards(rewards, weights)
        lengths = completions.completion_mask.sum(1)
        task_reward += grpo_advantages.overlong_penalty(lengths, cfg.rollout.max_new_tokens, cfg.grpo.overlong_cache)
        prompts = [prompt for prompt in drawing.prompts for _ in range(cfg.rollout.group_size)]
        return Batch(prompts, completions, texts, rewards, task_reward, drawing.recorder)

    return collectives.together(here)


def replace_groups(batch: Batch, stalled: Tensor, fresh: Batch, group_size: int, pad_id: int) -> Batch:
    """The batch with its stalled groups (groups,) bool replaced by the groups of `fresh`, in order."""
    if not bool(stalled.any()):
        return batch
    source = torch.arange(len(stalled))
    source[stalled] = len(stalled) + torch.arange(int(stalled.sum()))
    rows = (source[:, None] * group_size + torch.arange(group_size)).flatten()
    return concatenate([batch, fresh], pad_id).select(rows)


def stem_recorder(run: Run, model: Any, prompts: list[Prompt], step: int) -> StemRecorder | None:
    """For the members' lower layers to be read in the sampling of these prompts, where that is done by this model."""
    if run.ensemble is None or run.engine.by_layers or step != run.step:
        return None
    cfg = run.config.rollout
    widest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    return recorder_of(model, run.ensemble, len(prompts) * (widest + cfg.group_size * cfg.max_new_tokens))


def stem_keeper(run: Run, model: Any, batch: Batch) -> StemKeeper | None:
    """For the members' lower layers to be read in a pass that is made anyway: sampling, or for log-probabilities."""
    if run.ensemble is None or run.engine.by_layers:
        return None
    return StemKeeper(model, run.ensemble, batch.completions, run.config.rollout.group_size, batch.recorder)


def disagree(run: Run, model: Any, batch: Batch, stems: StemKeeper | None) -> Tensor | None:
    """The measure of every completion: (B, T) per token, (B,) at the end of the sequence; None without. Collective."""
    positions = "last" if run.config.disagreement.mode == "end_of_sequence" else "all"
    return None if run.ensemble is None else members_read(run, model, batch.completions, positions, stems)


def shown_tokens(
    run: Run, model: Any, batch: Batch, measured: Tensor | None, stems: StemKeeper | None
) -> Tensor | None:
    """(b, T) the measure token by token of the first b rows, for people to look at: all where it was measured so.

    At the end of the sequence: this rank's first group, in steps that are shown. It changes no number of the run.
    Collective.
    """
    if measured is None or measured.dim() == 2:
        return measured
    if not record.shows_tokens(run):
        return None
    first_group = batch.completions.rows(slice(0, run.config.rollout.group_size))
    return members_read(run, model, first_group, "all", stems)


def members_read(run: Run, model: Any, completions: Completions, positions: str, stems: StemKeeper | None) -> Tensor:
    """The measure under the step's ensemble: (B, T), or (B,) with positions "last". Collective."""
    cfg = run.config.disagreement
    asked: dict[str, Any] = {
        "completions": to_device(completions, run.engine.device),
        "group_size": run.config.rollout.group_size,
        "spec": run.ensemble,
        "step": run.step,
        "positions": positions,
        "measures": frozenset({cfg.measure}),
        "last_n": cfg.last_n,
    }

    def here() -> Statistics:
        if not run.engine.by_layers:
            return measure(model, **asked, stems=stems)
        with run.engine.one_by_one() as lend:
            return measure_by_layers(model, lend, **asked)

    with run.timer.phase("disagreement"):
        statistics = collectives.together(here)
    return statistics.get(cfg.measure).cpu()


@dataclass(frozen=True)
class Knowledge:
    """What the loss needs to know of the completions under full weights, when it is configured to."""

    ref_logps: Tensor | None = None  # (B, T), under the reference model
    logps: Tensor | None = None  # (B, T), under the policy; only with the KL in the reward
    selected: Tensor | None = None  # (B, T) bool, the step's tokens of highest entropy


def consult(run: Run, model: Any, batch: Batch, stems: StemKeeper | None) -> Knowledge:
    """Reference log-probabilities and high-entropy tokens; nothing is computed that the loss does not use."""
    cfg = run.config.grpo
    ref_logps = logps = selected = None
    if run.reference is not None:
        with run.timer.phase("reference"), run.reference.whole(model) as reference:
            ref_logps, _ = logps_of(run, reference, batch)
    if cfg.top_entropy_quantile < 1.0 or (ref_logps is not None and cfg.kl_in == "reward"):
        logps, entropy = logps_of(run, model, batch, stems)
        if cfg.top_entropy_quantile < 1.0:
            everybody = torch.cat(collectives.gather_objects(entropy[trained_tokens(run, batch)]))
            selected = entropy >= entropy_threshold(everybody, cfg.top_entropy_quantile)
    return Knowledge(ref_logps, logps, selected)


def trained_tokens(run: Run, batch: Batch) -> Tensor:
    """(B, T) bool, the tokens that may give gradient."""
    completions = batch.completions
    return loss_mask(completions.completion_mask, completions.truncated, run.config.grpo.mask_truncated)


def logps_of(run: Run, model: Any, batch: Batch, stems: StemKeeper | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) of the completions under a whole model.

    In the update's own micro-batches, read in its own way: an unchanged policy gives the same numbers to the last bit.
    """
    logps = torch.zeros(batch.completions.completion_ids.shape)
    entropy = torch.zeros_like(logps)
    size = run.config.train.micro_batch_size
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        part = to_device(batch.completions.rows(rows).trimmed(), run.engine.device)
        T = part.completion_ids.shape[1]
        with stems.keeping(rows, part.prompt_ids.shape[1]) if stems else nullcontext():
            logps[rows, :T], entropy[rows, :T] = completion_logps(
                model,
                part.prompt_ids,
                part.prompt_mask,
                part.completion_ids,
                part.completion_mask,
                run.config.rollout.temperature,
                share_prompts=run.engine.share_prompts,
                as_trees=run.engine.as_trees,
            )
    return logps, entropy


# ---- advantages ─ update -----------------------------------------------------------------------------------------


def reward_head(
    run: Run, batch: Batch, measured: Tensor | None, knowledge: Knowledge, by_token: Tensor | None
) -> Signal:
    """Where task rewards and bonus become advantages. measured: (B, T) or (B,), None without disagreement."""
    mask = trained_tokens(run, batch)
    rewards = penalised(run, batch, knowledge)
    task_advantages = group_relative(run, batch.rewards, rewards)
    shaped, reduced, bonus = task_advantages, None, None
    if measured is not None:
        shaped, reduced, bonus = add_bonus(run, batch, measured, rewards, task_advantages)
    return Signal(
        advantages=(shaped if shaped.dim() == 2 else shaped[:, None]).expand(mask.shape),
        mask=mask,
        task_advantages=task_advantages,
        reduced=reduced,
        bonus=bonus,
        token_measure=by_token,
        ref_logps=knowledge.ref_logps,
        selected=knowledge.selected,
    )


def add_bonus(
    run: Run, batch: Batch, measured: Tensor, rewards: Tensor, task_advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages with the bonus, the measure of each completion (B,), the bonus). Collective."""
    cfg, G = run.config.disagreement, run.config.rollout.group_size
    mask = batch.completions.completion_mask
    weight = bonuses.weight_at(cfg, run.step, run.config.train.steps)
    solved = batch.task_reward >= run.config.rewards.solved_at
    gate = bonuses.gated(cfg.gate, batch.task_reward, solved, G)
    reduced = bonuses.reduce(measured, mask, cfg.last_n)
    if cfg.shape == "reward":
        shaped_rewards = bonuses.shaped_rewards(rewards, reduced, gate, weight)
        advantages = group_relative(run, batch.rewards, shaped_rewards)
        return advantages, reduced, advantages - task_advantages
    b, token_mask = reduced, None
    if cfg.credit == "token":
        b, token_mask = bonuses.token_credit(measured, mask, cfg.measure, cfg.discount, cfg.last_n), mask
    run.rms.update(*collectives.all_reduce_sum(bonuses.deviation_sums(b, G, token_mask)))
    advantages, bonus = bonuses.shaped_advantages(
        cfg.shape, task_advantages, rewards, b, gate, G, weight, cfg.clip, run.rms.value, token_mask
    )
    return advantages, reduced, bonus


def penalised(run: Run, batch: Batch, knowledge: Knowledge) -> Tensor:
    """(B,) task rewards, less β times the KL to the reference when it is taken from the reward."""
    cfg, mask = run.config.grpo, batch.completions.completion_mask
    if cfg.kl_in == "loss" or knowledge.ref_logps is None or knowledge.logps is None:
        return batch.task_reward
    return kl_penalised_rewards(batch.task_reward, knowledge.logps, knowledge.ref_logps, mask, cfg.beta, cfg.kl)


def group_relative(run: Run, rewards: Tensor, task_reward: Tensor) -> Tensor:
    """(B,) advantages of the rewards within their groups. Collective when the scale is the whole step's."""
    cfg, G = run.config.grpo, run.config.rollout.group_size
    if cfg.multi_reward == "normalise_then_sum":
        weights = torch.tensor([reward.weight for reward in run.rewards])
        # What was added to the functions' sum (overlong penalty, KL, bonus) is a column of its own.
        added = task_reward - grpo_advantages.combine_rewards(rewards, weights)
        columns = torch.cat([rewards, added[:, None]], dim=1)
        scores = grpo_advantages.normalised_sum(columns, torch.cat([weights, torch.ones(1)]), G)
        return grpo_advantages.standardise(scores, step_moments(scores))
    batch_std = step_moments(task_reward).std if cfg.scale_rewards == "batch" else None
    return grpo_advantages.group_advantages(task_reward, G, cfg.scale_rewards, batch_std)


def step_moments(values: Tensor) -> grpo_advantages.Moments:
    """Mean and standard deviation over the whole step. Collective."""
    own = grpo_advantages.Moments.of(values)
    return grpo_advantages.Moments(*collectives.all_reduce_sum([own.count, own.total, own.squares]))


def update(run: Run, batch: Batch, signal: Signal) -> Updates:
    """num_iterations optimizer steps on one rollout.

    The weights hold the denominators of the whole step, so its loss is one weighted sum over micro-batches
    and ranks. The first iteration is on-policy: its log-probabilities are the old ones of the others.
    """
    cfg = run.config
    totals = step_totals(signal)
    weights = token_weights(cfg.grpo.loss, signal.mask, totals, cfg.rollout.max_new_tokens)
    entropy_weights = token_weights("dapo", signal.mask, totals, cfg.rollout.max_new_tokens)
    size, device = cfg.train.micro_batch_size, run.engine.device
    micro_batches = micro_batches_of(batch, signal, weights, entropy_weights, size, device)
    updates = Updates()
    with run.timer.phase("update"):
        for iteration in range(cfg.grpo.num_iterations):
            for index, micro in enumerate(micro_batches):
                logps, entropy = run.engine.forward(*micro.tokens, cfg.rollout.temperature)
                if iteration == 0:
                    updates.first_logps.append(logps.detach())
                    updates.first_entropies.append(entropy.detach())
                inputs = micro.inputs(logps, updates.first_logps[index], entropy)
                output = policy_loss(inputs, micro.weights, cfg.corrected_grpo)
                run.engine.backward(output.loss, last=index == len(micro_batches) - 1)
                updates.add(output)
            updates.learning_rate = learning_rate_at(run.step + iteration, cfg.train)
            result = run.engine.step(updates.learning_rate)
            updates.grad_norm = result.grad_norm
            updates.refused.append(result.refused)
    return updates


def step_totals(signal: Signal) -> Totals:
    """The denominators of the whole optimizer step, over all ranks, before the first backward."""
    completions, tokens = collectives.all_reduce_sum([len(signal.mask), float(signal.mask.sum())])
    return Totals(completions=completions, tokens=tokens)
