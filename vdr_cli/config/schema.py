"""Every setting of a run, with its unit, default and reason.

The sections are frozen pydantic models: unknown keys and impossible combinations are refused here,
before any weight is loaded. Nothing in this package imports torch, so `vdr --help` stays fast.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from vdr_cli.config.paths import PathText

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]

AHEAD_CAP = 2.0
"""grpo.importance_cap with rollout.ahead, unless it is given."""


class Section(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `steps: true` as 1."""
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in wanted and ("int" in wanted or "float" in wanted):
            raise PydanticCustomError("int_type" if "int" in wanted else "float_type", "a number")
        return value


class LoraConfig(Section):
    """Low-rank adapters through PEFT (extra: lora)."""

    rank: Positive = 16
    """Rank of the low-rank update that an adapter adds to a weight."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter, as PEFT's target_modules."""


class ModelConfig(Section):
    name: PathText = "starter"
    """`starter` (embedded), a local directory in Hugging Face format, or a hub id."""
    revision: str | None = None
    """Hub branch, tag or commit; None: the default branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on an accelerator that has it, float32 on CPU (bf16 is slower there)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. It has all your permissions."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """None: train every parameter."""


class DataConfig(Section):
    name: PathText = "starter"
    """`starter` (embedded Countdown), a hub id, a JSONL/CSV/Parquet file, or a directory `datasets` can load."""
    split: str = "train"
    """Split of the training prompts."""
    subset: str | None = None
    """The hub data set's configuration (`main` of openai/gsm8k); None: its default."""
    eval_name: PathText | None = None
    """Where held-out prompts come from; None: the same as `name`."""
    eval_split: str = "test"
    """Split of the held-out prompts."""
    prompt_column: str = "prompt"
    """Column of the prompts: strings or chat messages."""
    as_chat: bool = False
    """Prompts that are strings become one user message, in the format of the model's chat template."""
    system_prompt: str | None = None
    """System message at the start of every prompt (chat prompts only)."""
    max_prompt_tokens: Positive | None = None
    """Longer prompts keep their last tokens, with a warning that counts them; None: no limit."""
    shuffle: bool = True
    """Shuffle the prompts in each epoch, from train.seed."""


class VllmConfig(Section):
    """Servers that sample when rollout.backend is vllm. They live in an environment of their own."""

    python: PathText | None = None
    """Interpreter of an environment with vLLM: vdr starts a server with it. None: the servers in `urls` are already
    running."""
    urls: Annotated[list[str], Field(min_length=1)] = ["http://127.0.0.1:8000"]
    """Addresses of the servers, which share the prompts. With `python`: the one on which vdr's server listens."""
    push: Literal["directory", "broadcast"] = "directory"
    """How new weights reach the servers: through `directory`, or by broadcast to their workers (NCCL where trainer and
    servers have GPUs of their own, else gloo), which needs no directory that both sides see."""
    directory: PathText | None = None
    """Where weights are handed over; every server must see it under this path. None: vllm/ in the run directory."""
    arguments: list[str] = []
    """More arguments for a server that vdr starts, e.g. [--max-model-len, "4096"]."""
    start_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds allowed for a server to start, and for a push of weights to finish."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds one prompt's completions may take."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Retries of a request when a server does not answer."""
    tolerance: Annotated[float, Field(gt=0)] = 0.1
    """Nats; largest mean difference between the server's and the trainer's log-probabilities after a push."""


class RolloutConfig(Section):
    backend: Literal["transformers", "vllm"] = "transformers"
    """What samples: the model in this process, or vLLM servers."""
    group_size: Positive = 8
    """G, completions per prompt."""
    max_new_tokens: Positive = 256
    """T_max, the longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of sampling and of all log-probabilities in the loss."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this much probability."""
    min_p: Fraction = 0.0
    """Sample from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divisor of the scores of tokens that occurred already; 1: off."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """A completion ends after any of these strings."""
    ahead: Literal[0, 1] = 0
    """1: vLLM servers sample each step's completions while the trainer updates the step before, under the weights from
    before that update; truncated importance sampling is then on (grpo.importance_cap, 2 unless it is given). Only with
    backend vllm. 0: from the newest weights."""
    batch_tokens: Positive = 262_144
    """Most tokens (prompts and completions at full length) decoded at once on a rank; bounds the key-value cache."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay token steps from CUDA graphs, with the transformers backend: one launch per step instead of about a
    thousand. auto: on a GPU, for models with plain attention."""
    vllm: VllmConfig = VllmConfig()
    """Servers of backend vllm."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.ahead and self.backend == "transformers":
            raise ValueError(
                "ahead is 1 but backend is transformers, which samples and updates on the same device: set backend to "
                "vllm or ahead to 0"
            )
        return self


class RewardFunction(Section):
    name: str
    """A built-in, `module:function`, or `file.py:function`."""
    weight: float = 1.0
    """Weight of this function's reward in the sum."""


class RewardsConfig(Section):
    functions: list[RewardFunction] = []
    """Reward functions; each gets every column of the data by name. Empty: the starter uses `countdown`; other data
    must name a function."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds one call of one function may take before the run stops and names it."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes of each rank in which functions that are not async are called, so that what they compute in Python does
    not hold up sampling; each imports the functions for itself. 0: on a thread of the rank."""
    solved_at: float = 1.0
    """A completion whose weighted task reward reaches this counts as solved in pass@k."""


class DisagreementConfig(Section):
    """The bonus (docs/disagreement.md). `mode: none` is the one switch that turns it off."""

    mode: Literal["none", "per_token", "end_of_sequence"] = "end_of_sequence"
    """Where members are compared: nowhere, at every token, or where the last token is predicted."""
    measure: Literal["bald", "rmi"] = "bald"
    """bald: mutual information of the next token and the weights; rmi: its share for the sampled token."""
    members: Annotated[int, Field(ge=2)] = 8
    """M, the number of dropout members."""
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Dropout probability p of the members' masks."""
    scope: Literal["full", "last_k"] | None = None
    """Layers that members differ in: all, or the top last_k (the others are read once for all members). None: last_k
    with mode end_of_sequence, where it ranks completions no worse at a third of the cost; otherwise full."""
    last_k: Positive | None = None
    """Layers that members differ in, with scope last_k; None: a quarter of the model's, rounded up."""
    mask_sharing: Literal["member", "token"] = "member"
    """member: one mask for every position and completion (one sample of the weights); token: independent ones."""
    blocks: dict[str, str] | None = None
    """Names of the attention and MLP blocks inside a decoder layer, e.g. {attention: attn, mlp: ffn}, for
    architectures where they are not found; None: found automatically."""
    credit: Literal["sequence", "token"] = "sequence"
    """per_token only. sequence: the masked mean is the completion's bonus; token: each token is credited with what
    follows it."""
    discount: Fraction = 1.0
    """γ of the sum of what follows (credit: token)."""
    last_n: Positive | None = None
    """per_token only: restrict to the last n valid tokens; None: all."""
    gate: Literal["all", "incorrect", "zero_variance"] = "all"
    """Which completions get a bonus: all, those not solved, those of groups whose task rewards are all equal."""
    shape: Literal["additive", "reward", "multiplicative", "quality"] = "additive"
    """How the bonus enters the advantage; formulas in docs/disagreement.md."""
    weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the bonus at the first step: λ (additive, reward) or β (multiplicative, quality)."""
    clip: Annotated[float, Field(gt=0)] = 3.0
    """c: bound on |standardised disagreement|."""
    schedule: Literal["constant", "linear", "cosine", "staircase"] = "constant"
    """How the weight falls from `weight` to 0; constant: it does not."""
    schedule_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which the weight is 0 (not with constant)."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.effective_scope == "full" and self.last_k is not None:
            raise ValueError("last_k is set but scope is full: set scope to last_k or remove last_k")
        if self.mode != "per_token" and (self.credit == "token" or self.last_n is not None):
            raise ValueError(f"credit token and last_n need mode per_token, not {self.mode}")
        if self.credit == "token" and self.shape != "additive":
            raise ValueError(f"credit token needs shape additive, not {self.shape}")
        return self

    @property
    def effective_scope(self) -> Literal["full", "last_k"]:
        """`scope`, or what None means with this mode."""
        by_mode: Literal["full", "last_k"] = "last_k" if self.mode == "end_of_sequence" else "full"
        return self.scope or by_mode

    @property
    def member_settings(self) -> dict[str, Any]:
        """The numbers and names that make the members, by the fields of `disagreement.masks.EnsembleSpec`."""
        names = ("members", "dropout", "last_k", "mask_sharing")
        blocks = tuple(sorted(self.blocks.items())) if self.blocks else None
        return {name: getattr(self, name) for name in names} | {"scope": self.effective_scope, "blocks": blocks}


class GrpoConfig(Section):
    loss: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo"] = "dapo"
    """Token loss and what it is averaged over; formulas in docs/losses.md."""

    @field_validator("loss", mode="before")
    @classmethod
    def _bnpo_is_dapo(cls, value: Any) -> Any:
        if value == "bnpo":
            raise ValueError(
                "bnpo is TRL's mean over a micro-batch's tokens; set dapo, the mean over the whole step's tokens"
            )
        return value

    epsilon_low: Annotated[float, Field(ge=0)] = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: Annotated[float, Field(ge=0)] = 0.28
    """The ratio is clipped above at 1 + epsilon_high (clip-higher, DAPO)."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Two-sided clip: caps the unclipped ratio at delta; None: off."""
    sapo_temperature_positive: Annotated[float, Field(gt=0)] = 1.0
    """Loss sapo: temperature of the gate where the advantage is positive."""
    sapo_temperature_negative: Annotated[float, Field(gt=0)] = 1.05
    """Loss sapo: temperature of the gate where the advantage is negative."""
    advantage: Literal["group", "leave_one_out", "maxrl", "pass_at_k"] = "group"
    """How a group's rewards become advantages: deviation from the mean, scaled by scale_rewards (GRPO); deviation from
    the mean of the others (RLOO); deviation over the mean (MaxRL); or what a completion adds to the best of pass_k."""
    pass_k: Annotated[int, Field(ge=2)] = 4
    """k of advantage pass_at_k; at most rollout.group_size."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the group's standard deviation, the batch's (the whole step's), or none."""
    multi_reward: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """Several reward functions: advantages of the weighted sum, or the weighted sum of advantages (GDPO)."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference model; 0: no reference is loaded."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of the KL: log-ratio, half its square, or the unbiased non-negative one."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL acts: added to the loss, or subtracted from the reward."""
    sync_reference_every: Positive | None = None
    """Steps after which the reference becomes the policy; None: never."""
    entropy_weight: float = 0.0
    """Entropy bonus: this times the mean token entropy is subtracted from the loss."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the step's tokens, those of highest entropy, that enter the loss (0.2 in Wang et al. 2025)."""
    num_iterations: Positive = 1
    """μ, updates from one rollout."""
    mask_truncated: bool = False
    """Completions that hit max_new_tokens give no gradient."""
    overlong_cache: Annotated[int, Field(ge=0)] = 0
    """Soft overlong penalty (DAPO): 0 to -1 over the last overlong_cache tokens; 0: off."""
    resample_groups: Annotated[int, Field(ge=0)] = 0
    """Maximum extra rollouts per step to replace groups whose task rewards are all equal (DAPO's dynamic sampling); 0:
    off."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Truncated importance sampling: cap of policy over sampler probability; None: off (2 with rollout.ahead)."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.delta is not None and self.delta <= 1.0 + self.epsilon_high:
            raise ValueError(f"delta {self.delta} must be above 1 + epsilon_high {1.0 + self.epsilon_high:g}")
        if self.delta is not None and self.loss in ("cispo", "sapo"):
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
    """Optimizer steps, counted from the start of the run (a resumed run ends at the same one)."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the prompts' order, the samples and the members."""
    output: PathText | None = None
    """Run directory. None: a new one, runs/<date>-<time>-<4 hex digits>."""
    prompts_per_step: Positive = 8
    """Groups per step over all ranks; times rollout.group_size, the completions per step."""
    micro_batch_size: Positive = 8
    """Completions in one forward and backward pass of a rank; changes memory, never the result."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's learning rate after the warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from learning_rate to 0 at train.steps; constant: it does not."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises to its value."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of the means of the gradient and of its square."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε, added to the denominator; where gradients are far below it, updates are proportional to them."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay of matrices; norms and biases do not decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global norm the gradient is clipped to; 0: not clipped."""
    max_refused_steps: Positive = 5
    """Steps in a row with a non-finite loss or gradient before the run stops and saves the batch."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0: only one, at the end."""
    keep_last: Positive = 2
    """Number of complete checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint with the best held-out pass@1 (needs eval_every)."""
    save_model: bool = True
    """Write model/ (save_pretrained format) at the end."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations; 0: none. When set, also before the first step and after the last."""
    eval_prompts: Positive = 64
    """Held-out prompts of one evaluation."""
    eval_samples: Positive = 8
    """Completions per prompt in an evaluation."""


class EngineConfig(Section):
    ds_config: PathText = "zero3"
    """DeepSpeed configuration: zero1, zero2, zero3, zero3_offload, or a path to a JSON file."""
    gather: Literal["auto", "whole", "layer"] = "auto"
    """How weights are gathered under ZeRO-3 to be read. whole: a full copy on every device during rollout and
    disagreement. layer: one decoder layer at a time, for models whose full copy does not fit; vLLM samples, and is sent
    the weights layer by layer. auto: layer on GPUs where a full copy would take most of the memory, else whole."""


class LaunchConfig(Section):
    """How the ranks are started. Never part of what a run computes."""

    num_processes: Positive | None = None
    """Processes on this machine. None: one, or every slot of the hostfile."""
    hostfile: PathText | None = None
    """File with one line per host, such as `node1 slots=8`. None: this machine."""
    include: str | None = None
    """Hosts and slots to use, in DeepSpeed's syntax: host1@host2:0,2."""
    exclude: str | None = None
    """Hosts and slots to leave out, in the same syntax."""
    master_addr: str | None = None
    """Address where rank 0 listens. None: the first host."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port where rank 0 listens. None: a free one on this machine, 29500 with a hostfile."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the hosts' sshd. None: as ssh is configured."""
    launcher: Literal["pdsh", "openmpi", "slurm"] = "pdsh"
    """How processes are started on the hosts."""
    no_ssh: bool = False
    """Do not use ssh: you start vdr once on every host, with node_rank."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """This host's position in the hostfile, from 0 (with no_ssh)."""
    env: dict[str, str] = {}
    """Environment variables that every rank gets; integers are converted to strings."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """Times a run is restarted from its newest checkpoint after a fault."""
    drop_lost_hosts: bool = False
    """Restart without hosts that do not answer, with fewer processes."""
    fault_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds within which every process ends after a fault is noticed."""
    check_hosts: bool = True
    """With a hostfile: every host reachable, same versions, before anything starts."""

    @field_validator("env", mode="before")
    @classmethod
    def _whole_numbers_as_text(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            return env
        return {name: str(value) if type(value) is int else value for name, value in env.items()}


class ObserveConfig(Section):
    live: Literal["auto", "on", "off"] = "auto"
    """Live view. auto: on a terminal; elsewhere one line per step."""
    completions_every: Annotated[int, Field(ge=0)] = 10
    """Steps between files completions/step_*.parquet; 0: none."""
    audit_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between audit/step_*.parquet, from which `vdr audit` recomputes a step; the first step is always included.
    None: the first step alone, which needs no checkpoint and costs at most a few MB; 0: none."""
    tensorboard: bool = True
    """Write events for TensorBoard."""
    wandb: bool = False
    """Log to Weights & Biases (extra: wandb)."""
    report: bool = True
    """Write report.html at the end."""


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    disagreement: DisagreementConfig = DisagreementConfig()
    grpo: GrpoConfig = GrpoConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The numbers and names of the loss, by the fields of `grpo.losses.LossSettings`.

        Completions of older weights are corrected (`importance_cap`) even if nothing is set.
        """
        kept = "loss epsilon_low epsilon_high delta sapo_temperature_positive sapo_temperature_negative"
        names = f"{kept} beta kl kl_in entropy_weight importance_cap".split()
        found = {name: getattr(self.grpo, name) for name in names}
        if self.rollout.ahead and found["importance_cap"] is None:
            found["importance_cap"] = AHEAD_CAP
        return found

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size is {self.rollout.group_size}: a group is compared with itself, give at least 2"
            )
        if self.grpo.advantage == "pass_at_k" and self.grpo.pass_k > self.rollout.group_size:
            raise ValueError(
                f"grpo.pass_k {self.grpo.pass_k} is above rollout.group_size {self.rollout.group_size}: the best of k "
                "needs k completions"
            )
        if self.grpo.sync_reference_every and self.grpo.beta == 0:
            raise ValueError("grpo.sync_reference_every is set but grpo.beta is 0: there is no reference to update")
        if self.grpo.sync_reference_every and self.model.lora is not None:
            raise ValueError(
                "grpo.sync_reference_every needs a reference of its own; with model.lora it is the base model"
            )
        if self.train.steps % self.grpo.num_iterations:
            raise ValueError(
                f"train.steps {self.train.steps} is not a multiple of grpo.num_iterations {self.grpo.num_iterations}: "
                "every rollout gives num_iterations optimizer steps"
            )
        if self.train.keep_best and self.train.eval_every == 0:
            raise ValueError("train.keep_best needs train.eval_every: nothing measures which checkpoint is best")
        if self.train.warmup_steps >= self.train.steps and self.train.warmup_steps > 0:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} is not below train.steps {self.train.steps}"
            )
        if self.engine.gather == "layer" and self.rollout.backend != "vllm":
            raise ValueError(
                "engine.gather is layer, so no process has a full copy of the weights to sample with: set "
                "rollout.backend to vllm, or engine.gather to whole"
            )
        if self.engine.gather == "layer" and self.model.lora is not None and self.rollout.vllm.push == "broadcast":
            raise ValueError(
                "engine.gather is layer, and adapters are merged in the host's memory only: set rollout.vllm.push to "
                "directory"
            )
        processes = self.launch.num_processes or 1
        if self.train.prompts_per_step < processes:
            raise ValueError(
                f"train.prompts_per_step {self.train.prompts_per_step} is below {processes} processes: "
                f"a group lives on one rank, so some would have none; give at least {processes}"
            )
        return self
