"""From rewards to updates: advantages and loss, optimizer, evaluations and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vdr_cli.config.paths import PathText
from vdr_cli.config.sections.base import BelowOne, Positive, Section


class GrpoConfig(Section):
    loss: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "clip_cov", "kl_cov"] = "dapo"
    """The loss per token and how it is averaged; docs/losses.md has the formulas."""

    @field_validator("loss", mode="before")
    @classmethod
    def _bnpo_is_dapo(cls, value: Any) -> Any:
        if value == "bnpo":
            raise ValueError(
                "bnpo is TRL's mean over a micro-batch's tokens; set dapo, the mean over the whole step's tokens"
            )
        return value

    epsilon_low: Annotated[float, Field(ge=0)] = 0.2
    """Lower clip: the ratio is clipped at 1 - epsilon_low."""
    epsilon_high: Annotated[float, Field(ge=0)] = 0.28
    """Upper clip: the ratio is clipped at 1 + epsilon_high (DAPO's clip-higher)."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Two-sided clip: caps the unclipped ratio at delta. None: off."""
    sapo_temperature_positive: Annotated[float, Field(gt=0)] = 1.0
    """Loss sapo: temperature of the gate where the advantage is positive."""
    sapo_temperature_negative: Annotated[float, Field(gt=0)] = 1.05
    """Loss sapo: temperature of the gate where the advantage is negative."""
    clip_cov_share: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Loss clip_cov: share of an optimizer step's tokens whose gradient is dropped; at least one token."""
    clip_cov_low: float = 1.0
    """Loss clip_cov: lower bound on the covariance of advantage and log-probability among the tokens that may be
    dropped."""
    clip_cov_high: float = 5.0
    """Loss clip_cov: upper bound on that covariance."""
    kl_cov_share: Annotated[float, Field(gt=0, le=1)] = 2e-3
    """Loss kl_cov: share of an optimizer step's tokens that get the KL penalty, those with the highest covariance; at
    least one token. The authors use 0.002 for a 7B model and 0.0002 for a 32B one."""
    kl_cov_weight: Annotated[float, Field(ge=0)] = 1.0
    """Loss kl_cov: weight of |log ratio| on those tokens."""
    advantage: Literal["group", "leave_one_out", "maxrl", "pass_at_k"] = "group"
    """Estimator of a group's advantages. group: deviation from the group mean, scaled by scale_rewards (GRPO).
    leave_one_out: deviation from the mean of the others (RLOO). maxrl: deviation divided by the mean (MaxRL).
    pass_at_k: the gain that a completion adds to the best of pass_k completions."""
    pass_k: Annotated[int, Field(ge=2)] = 4
    """k for advantage pass_at_k; at most rollout.group_size."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of the advantages: the standard deviation of the group, that of the batch (the whole step), or
    nothing."""
    multi_reward: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """With several reward functions: compute advantages from the weighted sum of rewards (sum_then_normalise), or sum
    the weighted advantages of each function (normalise_then_sum, GDPO)."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference model; 0: no reference model is loaded."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of the KL. k1: the log-ratio; k2: half its square; k3: the unbiased, non-negative
    estimator."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Place of the KL: added to the loss, or subtracted from the reward."""
    sync_reference_every: Positive | None = None
    """Steps between copies of the policy into the reference model. None: the reference never changes."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus: the mean token entropy times this is subtracted from the loss."""
    entropy_target: Annotated[float, Field(gt=0)] | None = None
    """Adaptive entropy bonus: it acts while the entropy is below this, in nats per token (Skywork-OR1 uses 0.2). None:
    off."""
    entropy_delta: Annotated[float, Field(gt=0)] = 1e-4
    """Adaptive entropy bonus: its weight rises by this after a rollout below the target, and falls by this
    otherwise."""
    entropy_max: Annotated[float, Field(gt=0)] = 5e-3
    """Adaptive entropy bonus: its maximum weight."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Mixtures of experts: weight of the load-balancing loss, which is computed per micro-batch; 0: off."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the step's tokens that enter the loss, those with the highest entropy (0.2 in Wang et al. 2025)."""
    num_iterations: Positive = 1
    """μ, the number of passes (epochs) over one rollout's completions; each pass takes `minibatches` optimizer
    steps."""
    minibatches: Positive = 1
    """Number of disjoint parts into which a rollout is split, each of whole groups and with an optimizer step of its
    own. It must divide train.prompts_per_step."""
    mask_truncated: bool = False
    """Exclude completions that hit max_new_tokens from the gradient."""
    overlong_cache: Annotated[int, Field(ge=0)] = 0
    """Soft overlong penalty (DAPO): falls from 0 to -1 over the last overlong_cache tokens; 0: off."""
    resample_groups: Annotated[int, Field(ge=0)] = 0
    """Maximum extra rollouts per step to replace groups whose task rewards are all equal (DAPO's dynamic sampling); 0:
    off."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Truncated importance sampling: cap on the ratio of policy to sampler probability. None: off, except 2 with
    rollout.ahead or rollout.members."""

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps from one rollout."""
        return self.num_iterations * self.minibatches

    @property
    def reads_policy_first(self) -> bool:
        """True when the completions are read under the policy before the first update of their rollout.

        One minibatch needs no such reading: its first pass is under that policy.
        """
        kl_in_reward = self.beta != 0.0 and self.kl_in == "reward"
        return self.minibatches > 1 or self.top_entropy_quantile < 1.0 or kl_in_reward or self.needs_covariance

    @property
    def needs_covariance(self) -> bool:
        """True when the loss singles out tokens by the covariance of their advantage and log-probability."""
        return self.loss in ("clip_cov", "kl_cov")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.delta is not None and self.delta <= 1.0 + self.epsilon_high:
            raise ValueError(f"delta {self.delta} must be above 1 + epsilon_high {1.0 + self.epsilon_high:g}")
        if self.loss == "kl_cov" and self.updates_per_rollout == 1:
            raise ValueError(
                "loss kl_cov has no effect with one update per rollout, whose ratio is 1: raise minibatches or "
                "num_iterations"
            )
        if self.entropy_target is not None and self.entropy_weight != 0.0:
            raise ValueError("entropy_target adapts the weight that entropy_weight fixes; remove one of them")
        if self.clip_cov_low >= self.clip_cov_high:
            raise ValueError(f"clip_cov_low {self.clip_cov_low:g} is not below clip_cov_high {self.clip_cov_high:g}")
        if self.delta is not None and self.loss in ("cispo", "sapo", "kl_cov"):
            raise ValueError(f"delta bounds a clipped ratio, which loss {self.loss} does not have; remove delta")
        if self.advantage != "group":
            for key, default in (("scale_rewards", "group"), ("multi_reward", "sum_then_normalise")):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} has no meaning with advantage {self.advantage}; remove {key}")
        if self.advantage == "maxrl" and (self.overlong_cache or (self.beta and self.kl_in == "reward")):
            raise ValueError(
                "advantage maxrl divides by the mean reward, which overlong_cache and a KL in the reward make "
                "negative; remove them"
            )
        if self.multi_reward == "normalise_then_sum" and self.scale_rewards != "group":
            raise ValueError(
                f"scale_rewards {self.scale_rewards} has no meaning with multi_reward normalise_then_sum, which scales "
                "by the group, then by the step; remove scale_rewards"
            )
        return self


class TrainConfig(Section):
    steps: Positive = 500
    """Optimizer steps, counted from the start of the run; a resumed run ends at the same step."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Time limit: the run ends after this many seconds of training steps, summed over all resumes; evaluations,
    checkpoints and start-up do not count. Schedules still follow steps. None: no limit."""
    max_sampled_tokens: Positive | None = None
    """Token limit: the run ends after sampling this many completion tokens over all ranks. Schedules still follow
    steps. None: no limit."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed for the order of the prompts, the samples and the members."""
    output: PathText | None = None
    """Run directory. None: a new one, runs/<date>-<time>-<4 hex digits>."""
    prompts_per_step: Positive = 8
    """Prompts (groups) per step over all ranks; a step has rollout.group_size times as many completions."""
    micro_batch_size: Positive = 8
    """Completions per forward and backward pass on a rank; affects memory and speed, not the result
    (but for grpo.router_aux_loss_coef)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon (ZeRO-3 only) updates the matrices of the decoder layers by their orthogonalised mean gradient (momentum
    0.95, Nesterov), and embeddings, LM head, norms and biases with AdamW."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's learning rate after the warm-up."""
    muon_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Muon's learning rate after the warm-up, on the same schedule; required with optimizer muon. A matrix of n rows
    moves by about this times sqrt(n) in Frobenius norm."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate from learning_rate to 0 at train.steps; constant: none."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to learning_rate."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Adam's β1 and β2: decay rates of the running means of the gradient and of its square."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε, added to the denominator; updates become proportional to gradients that are far below it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of matrices; norms and biases do not decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global norm to which the gradient is clipped; 0: no clipping."""
    max_refused_steps: Positive = 5
    """Consecutive steps with a non-finite loss or gradient before the run stops and saves the batch."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0: only one, at the end."""
    keep_last: Positive = 2
    """Number of complete checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint with the best held-out pass@1, regardless of eval_k (needs eval_every)."""
    save_model: bool = True
    """Write model/ (save_pretrained format) at the end."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations; 0: none. If set, the run also evaluates before the first step and after the
    last."""
    eval_prompts: Positive = 64
    """Held-out prompts per evaluation."""
    eval_samples: Positive = 8
    """Completions per prompt in an evaluation."""
    eval_k: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Values of k for which an evaluation computes pass@k, such as 1,8,64; none may exceed eval_samples. pass@1 is
    always computed. None: 1 and eval_samples."""

    @field_validator("eval_k", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """`64` and `1,8,64`, as typed."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        return [value] if isinstance(value, int) else value

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.optimizer == "muon" and self.muon_learning_rate is None:
            raise ValueError(
                "optimizer muon needs muon_learning_rate; 0.2 x sqrt(hidden size) x learning_rate moves matrices about "
                "as far as AdamW does"
            )
        if self.optimizer == "adamw" and self.muon_learning_rate is not None:
            raise ValueError("muon_learning_rate has no meaning with optimizer adamw; remove it, or set optimizer muon")
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.eval_k is not None and max(self.eval_k) > self.eval_samples:
            raise ValueError(
                f"eval_k {','.join(map(str, self.eval_k))} needs eval_samples of at least {max(self.eval_k)}, not "
                f"{self.eval_samples}: pass@k is computed from k or more completions"
            )
        return self
