"""Faults of the training loop, train.py and training/, and of options of its updates."""

from __future__ import annotations

from fault_rows import in_files

LOOP = in_files(
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

UPDATES = [
    *in_files(
        "tests/training/test_minibatches.py",
        (
            "minibatches forget the groups of other ranks",
            "training/minibatches.py",
            "number = first + torch.arange(groups)",
            "number = torch.arange(groups)",
            "minibatches_two",
        ),
    ),
    *in_files(
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
    *in_files(
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
    *in_files(
        "",
        (
            "the importance cap of rollout.members is left out",
            "train.py",
            "config.rollout.ahead or config.rollout.members",
            "config.rollout.ahead",
            "acting",
        ),
    ),
    *in_files(
        "tests/training/test_run_log.py",
        (
            "num_tokens leaves the prompts out",
            "training/run_log.py",
            "float(state.prompt_tokens + state.tokens)",
            "float(state.tokens)",
            "dapo",
        ),
    ),
    *in_files(
        "tests/exploration/test_collapse.py",
        (
            "a single evaluation is a collapse",
            "exploration/collapse.py",
            "if self._below < EVALUATIONS:",
            "if self._below < 1:",
        ),
    ),
]

AROUND = in_files(
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
