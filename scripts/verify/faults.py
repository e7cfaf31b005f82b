"""Faults of one place each, every one of which changes a number that a user sees; plant.py plants them."""

from __future__ import annotations

from typing import NamedTuple

UNITS = {
    "train.py": "tests/test_train.py",
    "engine/optimizer.py": "tests/engine/test_optimizer_settings.py",
    "engine/engine.py": "tests/engine/test_engine.py",
    "engine/ds_config.py": "tests/engine/test_optimizer_settings.py",
    "engine/checkpoint.py": "tests/engine/test_checkpoint.py",
    "engine/reference.py": "tests/engine/test_engine.py",
    "disagreement/masks.py": "tests/disagreement/test_masks.py",
    "disagreement/hooks.py": "tests/disagreement/test_masks.py tests/disagreement/test_reading.py",
    "disagreement/information.py": "tests/disagreement/test_information.py",
    "disagreement/reading.py": "tests/disagreement/test_reading.py",
    "models/loading.py": "tests/models/test_loading.py",
    "models/logprobs.py": "tests/models/test_logprobs.py",
    "models/policy.py": "tests/models/test_policy.py",
    "models/adapters.py": "tests/models/test_adapters.py",
    "rollout/base.py": "tests/rollout/test_sampling.py",
    "rollout/sampling.py": "tests/rollout/test_sampling.py",
    "rollout/transformers_backend.py": "tests/rollout/test_transformers_rollout.py",
    "training/batch.py": "tests/training/test_batch.py",
    "training/completion_table.py": "tests/training/test_step_metrics.py",
    "training/opening.py": "tests/training/test_resources.py",
    "training/reading.py": "tests/training/test_reading.py",
    "training/step_metrics.py": "tests/training/test_step_metrics.py",
    "training/resources.py": "tests/training/test_resources.py",
    "training/state.py": "tests/training/test_state.py",
    "training/metric_pairs.py": "tests/training/test_metric_pairs.py",
    "rewards/calling.py": "tests/rewards/test_reward_calling.py",
    "rewards/loading.py": "tests/rewards/test_reward_loading.py",
    "data/prompts.py": "tests/data/test_prompts.py",
    "data/order.py": "tests/data/test_order.py",
    "stats/passk.py": "tests/stats/test_passk_bootstrap.py",
    "stats/bootstrap.py": "tests/stats/test_passk_bootstrap.py",
    "stats/ranking.py": "tests/stats/test_ranking.py",
    "scoring/columns.py": "tests/scoring/test_columns.py",
    "grpo/advantages.py": "tests/grpo/test_advantages.py",
    "grpo/estimators.py": "tests/grpo/test_estimators.py",
    "grpo/losses.py": "tests/grpo/test_losses.py",
}
"""Test files of the code in large directories; for others the whole directory is run."""


class Fault(NamedTuple):
    """`old`, which stands in `file` exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    unit: str
    """Test directories or files that are tried first; "": none."""
    runs: str = ""
    """Runs of the audit matrix that are tried next, names with commas; "": none."""


def _of(folder: str, *rows: tuple[str, ...]) -> list[Fault]:
    return [Fault(row[0], f"vdr_cli/{row[1]}", row[2], row[3], UNITS.get(row[1], folder), *row[4:]) for row in rows]


LOOP = _of(
    "tests",
    (
        "temperature 1 in the update",
        "train.py",
        "engine.forward(*micro.tokens, cfg.rollout.temperature, micro.policy_mask)",
        "engine.forward(*micro.tokens, 1.0, micro.policy_mask)",
        "sapo",
    ),
    (
        "temperature 1 for the reference",
        "training/reading.py",
        "cfg.train.micro_batch_size, cfg.rollout.temperature)",
        "cfg.train.micro_batch_size, 1.0)",
        "kl_reward",
    ),
    (
        "RMS updated after the bonus",
        "train.py",
        """    rms.update(squares, count, first)
    return 1.0 if cfg.scale == "none" else rms.value
""",
        """    before = rms.value
    rms.update(squares, count, first)
    return 1.0 if cfg.scale == "none" else before
""",
        "members",
    ),
    (
        "the denominator counts padding",
        "train.py",
        "float(mask.sum())])",
        "float(mask.numel())])",
        "dapo",
    ),
    (
        "the bonus's weight is a step ahead",
        "train.py",
        "cfg.schedule_fraction, state.step, res",
        "cfg.schedule_fraction, state.step + 1, res",
        "linear",
    ),
    (
        "a reward that reaches solved_at is not solved",
        "train.py",
        "is_solved(batch.task_reward, res.config.rewards.solved_at)",
        "batch.task_reward > res.config.rewards.solved_at",
        "epochs",
    ),
    (
        "members of step 0 in every step",
        "training/reading.py",
        "        step,\n        positions=",
        "        0,\n        positions=",
        "members",
    ),
    (
        "samples do not depend on train.seed",
        "train.py",
        "completion_key(cfg.train.seed, Stream.TRAINING, position)",
        "completion_key(0, Stream.TRAINING, position)",
        "members",
    ),
    (
        "the overlong penalty is a prize",
        "train.py",
        "task_reward += grpo_advantages.overlong_penalty(",
        "task_reward -= grpo_advantages.overlong_penalty(",
        "batch",
    ),
    (
        "every iteration is its own old policy",
        "train.py",
        "PolicyOutputs(logps, entropy, engine.router_balance()), inputs, settings)",
        "PolicyOutputs(logps, entropy, engine.router_balance()), replace(inputs, old_logps=None), settings)",
        "dapo",
    ),
    (
        "learning rate a step ahead",
        "train.py",
        "learning_rate_at(now, cfg.train)",
        "learning_rate_at(now + 1, cfg.train)",
        "dr_grpo",
    ),
    (
        "truncated completions train although masked",
        "train.py",
        "completions.truncated, res.config.grpo.mask_truncated)",
        "completions.truncated, False)",
        "batch",
    ),
    (
        "the importance cap of rollout.ahead is left out",
        "train.py",
        "if others and settings.importance_cap is None",
        "if False",
        "ahead",
    ),
    (
        "the KL's weight in the reward is doubled",
        "train.py",
        "logps.reference, mask, cfg.beta, cfg.kl)",
        "logps.reference, mask, 2 * cfg.beta, cfg.kl)",
        "kl_reward",
    ),
    (
        "replaced groups in another order",
        "train.py",
        "rows = (source[:, None] * group_size + torch.arange(group_size)).flatten()",
        "rows = (source[:, None] * group_size + torch.arange(group_size).flip(0)).flatten()",
        "resample",
    ),
)

ENGINE = _of(
    "tests/engine",
    ("AdamW's betas swapped", "engine/optimizer.py", "betas=cfg.adam_betas,", "betas=cfg.adam_betas[::-1],", "dapo"),
    ("AdamW's epsilon is torch's", "engine/optimizer.py", "eps=cfg.adam_epsilon,", "eps=1e-8,", "dapo"),
    (
        "linear schedule inverted",
        "engine/optimizer.py",
        '"linear": 1.0 - progress, "',
        '"linear": progress, "',
        "dr_grpo",
    ),
    (
        "cosine schedule inverted",
        "engine/optimizer.py",
        '"cosine": 0.5 * (1.0 + math.cos',
        '"cosine": 0.5 * (1.0 - math.cos',
        "grpo",
    ),
    (
        "warm-up off by one",
        "engine/optimizer.py",
        "* (step + 1) / cfg.warmup_steps",
        "* step / cfg.warmup_steps",
        "dr_grpo",
    ),
    (
        "the schedule forgets the warm-up",
        "engine/optimizer.py",
        "progress = (step - cfg.warmup_steps) /",
        "progress = step /",
        "dr_grpo",
    ),
    (
        "norms and biases decay",
        "engine/optimizer.py",
        "matrices = [p for p in parameters if dimensions(p) > 1]",
        "matrices = [p for p in parameters if dimensions(p) > 0]",
        "zero1",
    ),
    (
        "the loss is averaged over ranks",
        "engine/engine.py",
        "loss * finite * collectives.world_size()",
        "loss * finite",
        "two",
    ),
    (
        "the gradient is clipped at 1 whatever is set",
        "engine/ds_config.py",
        '["gradient_clipping"] = config.train.max_grad_norm',
        '["gradient_clipping"] = 1.0',
        "dapo",
    ),
    (
        "random states are not restored on resume",
        "engine/checkpoint.py",
        "_set_random_states(torch.load(own, weights_only=False))",
        "torch.load(own, weights_only=False)",
    ),
    (
        "the optimizer is not restored on resume",
        "engine/checkpoint.py",
        "load_optimizer_states=True",
        "load_optimizer_states=False",
        "resumed",
    ),
    (
        "a reference that is synchronised stays",
        "engine/reference.py",
        "target.data.copy_(source.data)",
        "target.data.copy_(target.data)",
        "kl_loss",
    ),
)

AROUND = _of(
    "tests/training",
    (
        "texts out of order after resampling",
        "training/batch.py",
        "[self.texts[row] for row in chosen]",
        "[self.texts[row] for row in sorted(chosen)]",
        "resample",
    ),
    (
        "the bonus does not reach the update",
        "train.py",
        "minibatch(cfg, batch.completions, advantages.inputs, rows,",
        "minibatch(cfg, batch.completions, replace(advantages.inputs, advantages=advantages.task_advantages), rows,",
        "members",
    ),
    (
        "the smallest in place of the largest",
        "training/batch.py",
        "self.maxima[name] = max(",
        "self.maxima[name] = min(",
        "dapo",
    ),
    (
        "the bonus column doubled",
        "training/completion_table.py",
        "_per_completion(advantages.bonus.added, completions.policy_mask)",
        "_per_completion(2 * advantages.bonus.added, completions.policy_mask)",
        "members",
    ),
    (
        "the mean bonus counts padding",
        "training/step_metrics.py",
        "added[batch.completions.policy_mask]",
        "added",
        "credit",
    ),
    (
        "the loss counts every iteration",
        "training/step_metrics.py",
        '"loss": loss / res.config.grpo.updates_per_rollout',
        '"loss": loss',
        "dapo",
    ),
    (
        "tokens are not added up",
        "training/state.py",
        "self.tokens += tokens",
        "self.tokens = tokens",
        "members",
    ),
    (
        "members do not depend on train.seed",
        "training/opening.py",
        "EnsembleSpec(**config.disagreement.member_settings, seed=seed)",
        "EnsembleSpec(**config.disagreement.member_settings, seed=0)",
        "last_k",
    ),
    (
        "the order of prompts does not depend on train.seed",
        "training/resources.py",
        "position, 1, cfg.train.seed, cfg.data.shuffle)",
        "position, 1, 0, cfg.data.shuffle)",
        "members",
    ),
    (
        "both ranks take the same prompts",
        "training/state.py",
        "self.drawn_in_step + sum(counts[:rank])",
        "self.drawn_in_step",
        "two",
    ),
    (
        "the running RMS is not restored",
        "training/state.py",
        "state.rms.load_state_dict(saved",
        "RunningRms().load_state_dict(saved",
        "resumed",
    ),
    (
        "the reference follows a step late",
        "training/state.py",
        "now // every > before // every",
        "(now - 1) // every > (before - 1) // every",
        "kl_loss",
    ),
    (
        "the repetition penalty is left out",
        "rollout/base.py",
        "repetition_penalty=cfg.repetition_penalty,",
        "repetition_penalty=1.0,",
        "gspo",
    ),
    (
        "reward_std with another ddof",
        "training/metric_pairs.py",
        "(squares / (count - 1).clamp(min=1)).sqrt()",
        "(squares / count.clamp(min=1)).sqrt()",
        "members",
    ),
    ("group_std with another ddof", "training/metric_pairs.py", ".std(1)", ".std(1, correction=0)", "members"),
    (
        "lengths of those that did not end",
        "training/metric_pairs.py",
        "_sum_and_count(lengths[~truncated])",
        "_sum_and_count(lengths[truncated])",
        "members",
    ),
)

GRPO = _of(
    "tests/grpo",
    (
        "groups divided by the population's deviation",
        "grpo/advantages.py",
        "(squares / (count - 1).clamp_min(1)).sqrt()",
        "(squares / count.clamp_min(1)).sqrt()",
    ),
    ("step divided by the population's deviation", "grpo/advantages.py", "/ (self.count - 1)", "/ self.count"),
    ("a smaller floor under deviations", "grpo/advantages.py", "STD_FLOOR = 1e-4", "STD_FLOOR = 1e-6"),
    (
        "one None silences a completion",
        "grpo/advantages.py",
        "masked_fill(rewards.isnan().all(dim=1), torch.nan)",
        "masked_fill(rewards.isnan().any(dim=1), torch.nan)",
    ),
    ("no group is stalled", "grpo/advantages.py", "return highest <= lowest", "return highest < lowest"),
    (
        "the overlong penalty starts late",
        "grpo/advantages.py",
        "max_new_tokens - cache - lengths.float()",
        "max_new_tokens - lengths.float()",
    ),
    (
        "clip ranges swapped",
        "grpo/losses.py",
        "low, high = 1.0 - settings.epsilon_low, 1.0 + settings.epsilon_high",
        "low, high = 1.0 - settings.epsilon_high, 1.0 + settings.epsilon_low",
    ),
    (
        "k3 of the inverse ratio",
        "grpo/losses.py",
        "torch.expm1(-log_ratio) + log_ratio",
        "torch.expm1(log_ratio) - log_ratio",
    ),
    (
        "entropy is punished",
        "grpo/losses.py",
        "loss = loss - settings.entropy_weight *",
        "loss = loss + settings.entropy_weight *",
    ),
    (
        "dr_grpo divides by tokens",
        "grpo/losses.py",
        '"dr_grpo": Variant(clipped_surrogate, constant_length)',
        '"dr_grpo": Variant(clipped_surrogate, token_mean)',
    ),
    (
        "the importance cap is a floor",
        "grpo/losses.py",
        "torch.exp(difference).clamp(max=cap)",
        "torch.exp(difference).clamp(min=cap)",
    ),
    (
        "SAPO's temperatures swapped",
        "grpo/losses.py",
        "torch.where(terms.advantages > 0, positive",
        "torch.where(terms.advantages <= 0, positive",
    ),
    (
        "leave_one_out counts the completion itself",
        "grpo/estimators.py",
        "/ (count - 1).clamp_min(1)",
        "/ count",
    ),
    ("maxrl subtracts nothing", "grpo/estimators.py", "(groups - mean) / mean", "groups / mean"),
    (
        "pass_at_k of k - 1",
        "grpo/estimators.py",
        "best = [math.comb(j, k - 1) / subsets",
        "best = [math.comb(j, k - 2) / subsets",
    ),
    (
        "the KL's weight is not applied",
        "grpo/losses.py",
        "value = value + settings.beta * kl_estimate(",
        "value = value + kl_estimate(",
    ),
)

BONUS = _of(
    "tests/exploration",
    (
        "bald is credited to its own token",
        "exploration/disagreement.py",
        'reward = next_own if measure == "bald" else own[:, t]',
        'reward = next_own if measure != "bald" else own[:, t]',
        "credit",
    ),
    (
        "the staircase starts a stair down",
        "exploration/bonus.py",
        "math.floor(4 * progress) / 4",
        "math.ceil(4 * progress) / 4",
        "staircase",
    ),
    (
        "the discount is on the token itself",
        "exploration/disagreement.py",
        "torch.where(valid[:, t], reward + discount * following, following)",
        "torch.where(valid[:, t], discount * reward + following, following)",
        "credit",
    ),
    (
        "the gate pays solved completions",
        "exploration/bonus.py",
        '"incorrect": ~solved',
        '"incorrect": solved',
        "epochs",
    ),
    (
        "the RMS forgets its correction",
        "exploration/bonus.py",
        "self.weight = keep * self.weight + new",
        "self.weight = 1.0",
        "members",
    ),
    (
        "a sum in place of the mean",
        "exploration/bonus.py",
        "/ kept.sum(-1).clamp_min(1)).float()",
        ").float()",
        "epochs",
    ),
    (
        "the clip is left out",
        "exploration/bonus.py",
        "weight * size.clamp(-clip, clip) * per_row",
        "weight * size * per_row",
        "members",
    ),
)

MEMBERS = _of(
    "tests/disagreement",
    (
        "masks do not depend on the step",
        "disagreement/masks.py",
        'f"{step}/{member}/{layer}/{site}", width',
        'f"0/{member}/{layer}/{site}", width',
        "members",
    ),
    ("masks do not depend on the seed", "disagreement/masks.py", "{spec.seed}/{name}", "0/{name}", "last_k"),
    (
        "masks are not scaled",
        "disagreement/masks.py",
        "kept.astype(np.float32) / np.float32(1.0 - spec.dropout)",
        "kept.astype(np.float32)",
        "members",
    ),
    ("a layer too few", "disagreement/hooks.py", "return count - last_k", "return count - last_k + 1", "last_k"),
    ("the MLP is not masked", "disagreement/hooks.py", "enumerate(blocks)]", "enumerate(blocks[:1])]", "members"),
    (
        "bald is a sum over members",
        "disagreement/information.py",
        "divergence.mean(-1).clamp(0,",
        "divergence.sum(-1).clamp(0,",
        "members",
    ),
    (
        "a token is read one late",
        "disagreement/reading.py",
        "states = read[:, batch.rows, (batch.tokens - 1).clamp_min(0)]",
        "states = read[:, batch.rows, batch.tokens.clamp_max(read.shape[2] - 1)]",
        "members",
    ),
)

MODELS = _of(
    "tests/models",
    (
        "end tokens of generation_config ignored",
        "models/loading.py",
        'for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):',
        "for value in (tokenizer.eos_token_id,):",
        "ends",
    ),
    ("the entropy's sign", "models/logprobs.py", ".mul_(log_p).sum(1).neg_()", ".mul_(log_p).sum(1)", "dapo"),
    (
        "the gradient forgets the temperature",
        "models/logprobs.py",
        "else grad_logps / settings.temperature",
        "else grad_logps",
        "sapo",
    ),
    (
        "logits of the next token",
        "models/policy.py",
        "return hidden[:, prompt_ids.shape[1] - 1 :]",
        "return hidden[:, prompt_ids.shape[1] - 2 : -1]",
        "dapo",
    ),
    ("the adapters' scale", "models/adapters.py", "lora_alpha=cfg.alpha,", "lora_alpha=cfg.rank,", "lora"),
    ("adapters are drawn under seed 0", "models/adapters.py", "manual_seed(seed)", "manual_seed(0)", "lora"),
)

ELSEWHERE = [
    *_of(
        "tests/rollout",
        (
            "top-k keeps one more",
            "rollout/sampling.py",
            "TopKLogitsWarper(top_k=sampling.top_k)",
            "TopKLogitsWarper(top_k=sampling.top_k + 1)",
            "quantile",
        ),
        (
            "all completions of a group are one",
            "rollout/transformers_backend.py",
            "(request.keys[row.prompt], row.completion) for row",
            "(request.keys[row.prompt], 0) for row",
            "members",
        ),
        (
            "every completion is truncated",
            "rollout/transformers_backend.py",
            "leave(rows, t + 1, ~done)",
            "leave(rows, t + 1, done)",
            "members",
        ),
    ),
    *_of(
        "tests/data",
        ("every pass in the same order", "data/order.py", "[seed % 2**64, epoch]", "[seed % 2**64, 0]", "epochs"),
        ("prompts keep their first tokens", "data/prompts.py", "return ids[-limit:]", "return ids[:limit]"),
    ),
    *_of(
        "tests/rewards",
        (
            "None is 0",
            "rewards/calling.py",
            "    if entry is None:\n        return math.nan\n",
            "    if entry is None:\n        return 0.0\n",
            "rewards",
        ),
        (
            "weights are 1",
            "rewards/loading.py",
            "        entry.weight,",
            "        1.0,",
            "rewards",
        ),
    ),
    *_of(
        "tests/beds",
        (
            "countdown ignores the numbers",
            "beds/countdown.py",
            "sorted(found[0]) == sorted(numbers) and found[1] == target",
            "found[1] == target",
        ),
    ),
    *_of(
        "tests/stats",
        (
            "pass@k with replacement",
            "stats/passk.py",
            "(drawn - solved - j, 0.0) / (drawn - j)",
            "(drawn - solved, 0.0) / drawn",
        ),
        ("intervals of one tail", "stats/bootstrap.py", "tail = (1.0 - LEVEL) / 2.0", "tail = 1.0 - LEVEL"),
        ("ties count as found", "stats/ranking.py", "(below + right / 2)", "(below + right)"),
    ),
    *_of(
        "tests/scoring",
        (
            "padding counts in sums",
            "scoring/columns.py",
            '"bald_sum": _array((bald.double() * mask).sum(1))',
            '"bald_sum": _array(bald.double().sum(1))',
        ),
        (
            "the mean's denominator is the width",
            "scoring/columns.py",
            "return (values.double() * mask).sum(1) / mask.sum(1)",
            "return (values.double() * mask).mean(1)",
        ),
    ),
    *_of(
        "tests/evaluation",
        (
            "entropy a completion",
            "evaluation/result.py",
            'parts["entropy"] = self.entropy_sum.sum(1), self.length.sum(1).astype(np.float64)',
            'parts["entropy"] = _summed(self.entropy_sum)',
        ),
    ),
    *_of(
        "tests/config",
        (
            "the starter's recipe over the user's settings",
            "config/recipe.py",
            "deep_merge(bed_recipe(_model_name(tree)), tree)",
            "deep_merge(tree, bed_recipe(_model_name(tree)))",
        ),
    ),
    *_of("tests/planning", ("tied heads counted twice", "planning/shape.py", "(1 if self.tied else 2)", "2")),
    *_of(
        "tests/report",
        ("the worst measure on top", "report/intervals.py", "key=lambda row: -row.value", "key=lambda row: row.value"),
    ),
    *_of(
        "tests/launch",
        (
            "a slot too few on a host",
            "launch/hostfile.py",
            "hosts[name] = list(range(slots))",
            "hosts[name] = list(range(slots - 1))",
        ),
    ),
]

UPDATES = [
    *_of(
        "tests/training/test_minibatches.py",
        (
            "minibatches forget the groups of other ranks",
            "training/minibatches.py",
            "number = first + torch.arange(groups)",
            "number = torch.arange(groups)",
            "minibatches_two",
        ),
    ),
    *_of(
        "tests/grpo/test_covariance.py tests/grpo/test_entropy_control.py",
        ("kl_cov takes the lowest", "grpo/covariance.py", "descending=True", "descending=False", "kl_cov"),
        (
            "the adaptive entropy bonus acts above its target",
            "grpo/entropy_control.py",
            "if self.entropy is not None and self.entropy <= target else 0.0",
            "if self.entropy is not None else 0.0",
            "entropy_target",
        ),
        (
            "the largest ratio may be padding's",
            "grpo/losses.py",
            "_largest(torch.exp(terms.log_ratio), mask)",
            "torch.exp(terms.log_ratio).amax()",
            "dapo",
        ),
        (
            "the adaptive coefficient starts again after a resume",
            "training/state.py",
            'EntropyControl(**saved.get("entropy", {}))',
            "EntropyControl()",
        ),
    ),
    *_of(
        "tests/disagreement/test_acting.py",
        ("every group acts under member 0", "disagreement/acting.py", "% spec.members for", "* 0 for", "acting"),
        (
            "members act under the masks of step 0",
            "disagreement/acting.py",
            "self.spec, self.step, member,",
            "self.spec, 0, member,",
            "acting_two",
        ),
    ),
    *_of(
        "",
        (
            "the importance cap of rollout.members is left out",
            "train.py",
            "config.rollout.ahead or config.rollout.members",
            "config.rollout.ahead",
            "acting",
        ),
    ),
    *_of(
        "tests/training/test_run_log.py",
        (
            "num_tokens leaves the prompts out",
            "training/run_log.py",
            "float(state.prompt_tokens + state.tokens)",
            "float(state.tokens)",
            "dapo",
        ),
    ),
    *_of(
        "tests/exploration/test_collapse.py",
        (
            "a single evaluation is a collapse",
            "exploration/collapse.py",
            "if self._below < EVALUATIONS:",
            "if self._below < 1:",
        ),
    ),
]

FAULTS = [*LOOP, *UPDATES, *ENGINE, *AROUND, *GRPO, *BONUS, *MEMBERS, *MODELS, *ELSEWHERE]
