"""The DeepSpeed engine: the only place where ZeRO is known.

The rest of the program sees: a policy forward, `backward`, `step`, and the full weights inside `twin()`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vdr_cli.config import Config, TrainConfig
from vdr_cli.engine import collectives, library
from vdr_cli.engine.cpu import keep_to_one_thread_each
from vdr_cli.engine.determinism import fixed_kernels, in_fixed_order
from vdr_cli.engine.ds_config import DsConfig, resolve_ds_config, zero_stage
from vdr_cli.engine.gpu import peak_of
from vdr_cli.engine.layerwise import Rounds, gathering_by_itself
from vdr_cli.engine.leaves import fetch_whole, reduce_once
from vdr_cli.engine.library import deepspeed
from vdr_cli.engine.twin import Twin
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.models.adapters import Gather, with_adapters
from vdr_cli.models.anatomy import WholeLayer, decoder_layers, has_experts, input_embeddings, output_head
from vdr_cli.models.limits import MOST_OF_MEMORY, TREE_TOKENS
from vdr_cli.models.loading import load_for_training, load_model_config, resolve_dtype
from vdr_cli.models.policy import Policy, silence_dropout
from vdr_cli.models.sizes import language_part, largest
from vdr_cli.models.trees import can_read_trees


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping; inf when refused."""
    refused: bool
    """True when the gradient was not finite on any rank: the weights are as before, on all ranks."""


class Engine:
    """One rank's view of the model being trained."""

    def __init__(
        self, ds_engine: Any, causal_lm: nn.Module, twin: Twin, ds_config: DsConfig, by_layers: bool = False
    ) -> None:
        """by_layers: the twin is never whole, see `twin`."""
        self.ds_engine = ds_engine
        self.causal_lm = causal_lm
        self.ds_config = ds_config
        self.stage = zero_stage(ds_config)
        self.device: torch.device = ds_engine.device
        self.has_frozen = not all(parameter.requires_grad for parameter in causal_lm.parameters())
        self.by_layers = by_layers
        self._twin = twin
        self._decays = [group["weight_decay"] for group in ds_engine.optimizer.param_groups]
        self._rounds: Rounds | None = None

    @contextmanager
    def twin(self) -> Iterator[Any]:
        """The full, hook-free model in eval mode. Collective on entry only (ZeRO-3: one gather of all parameters).

        By layers: a model that gathers its decoder layers in every forward, for which all ranks come together.
        """
        with self.lent(self._twin) as (model, rounds), torch.no_grad():
            before, self._rounds = self._rounds, rounds
            try:
                yield model
            finally:
                self._rounds = before

    @contextmanager
    def lent(self, twin: Twin) -> Iterator[tuple[Any, Rounds | None]]:
        """A twin of this model, or of one that is sharded like it, as `twin()` gives it."""
        if not self.by_layers:
            with twin.borrowed(gather if self.stage == 3 else None) as model:
                yield model, None
            return
        collectives.settle()
        with twin.by_layers(gather) as (model, lend), gathering_by_itself(model, lend) as rounds:
            yield model, rounds

    def one_by_one(self) -> AbstractContextManager[WholeLayer]:
        """By layers, inside `twin()`: its layers for whoever goes through them once, in order. Collective."""
        assert self._rounds is not None
        return self._rounds.one_by_one()

    def for_writing(self, twin: Twin | None = None) -> AbstractContextManager[Any]:
        """The full model where it is written to a file, on rank 0; by layers in the host's memory. Collective."""
        chosen = twin or self._twin
        if not self.by_layers:
            return chosen.borrowed(gather if self.stage == 3 else None)
        collectives.settle()
        return chosen.on_host(gather, wanted=collectives.is_main())

    @property
    def share_prompts(self) -> bool:
        """How the policy reads prompts; whoever reads them in the same way gets its numbers to the last bit."""
        return bool(self.ds_engine.module.share_prompts)

    @property
    def as_trees(self) -> bool:
        """Likewise: whether a prompt and its completions are one row to the policy."""
        return bool(self.ds_engine.module.as_trees)

    @property
    def num_matrix_parameters(self) -> float:
        """Parameters that every token is multiplied with: all but the embeddings, unless they are the head too."""
        sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in self.causal_lm.parameters()}
        table = input_embeddings(self.causal_lm).weight
        tied = output_head(self.causal_lm).weight is table
        return float(sum(sizes.values()) - (0 if tied else sizes[id(table)]))

    def peak_flops(self) -> float | None:
        """Of this rank's device in bfloat16; None on a CPU, in float32, for GPUs not known and models of experts."""
        dtype = next(self.causal_lm.parameters()).dtype
        if self.device.type != "cuda" or dtype is not torch.bfloat16 or has_experts(self.causal_lm):
            return None
        return peak_of(torch.cuda.get_device_name(self.device))

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) of the completions under the policy, with gradient."""
        return self.ds_engine(prompt_ids, prompt_mask, completion_ids, completion_mask, temperature)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the step's loss; `last` closes the step's accumulation.

        DeepSpeed averages gradients over ranks; the loss is a sum over ranks, hence the factor. A loss that is not
        finite can have a finite gradient, so it is made NaN: `step` then refuses on every rank.
        """
        self.ds_engine.set_gradient_accumulation_boundary(last)
        finite = torch.where(loss.isfinite(), 1.0, torch.nan).to(loss.device)
        with in_fixed_order(self.causal_lm, self.device):
            self.ds_engine.backward(loss * finite * collectives.world_size(), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """One optimizer update. Refused on all ranks alike when the gradient is not finite."""
        for group, decay in zip(self.ds_engine.optimizer.param_groups, self._decays, strict=True):
            group["lr"] = learning_rate
            group["weight_decay"] = decay  # a universal checkpoint gives all groups the first one's
        if not hasattr(self.ds_engine.optimizer, "overflow"):
            return self._plain_step()
        skipped = self.ds_engine.skipped_steps
        self.ds_engine.step()
        refused = self.ds_engine.skipped_steps > skipped
        norm = self.ds_engine.get_global_grad_norm()
        return StepResult(math.inf if refused or norm is None else float(norm), refused)

    def _plain_step(self) -> StepResult:
        """ZeRO stage 0 in float32, where DeepSpeed refuses nothing. Every rank holds the same reduced gradient."""
        gradients = [parameter.grad for parameter in self.causal_lm.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self.ds_engine.step()
            return StepResult(norm, refused=False)
        self.ds_engine.zero_grad()
        return StepResult(math.inf, refused=True)


def gather(parameters: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
    """All of these parameters whole on every rank, in one coalesced all-gather; released on exit.

    writer: the rank whose changes inside the block everybody keeps; None: changes are lost.
    """
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)  # type: ignore[no-any-return]


def start_distributed() -> torch.device:
    """Join the process group and choose this rank's device. The launcher's environment must be set."""
    if not torch.cuda.is_available():
        # Compiling DeepSpeed's shared-memory collective takes a minute and a compiler; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _meet()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        fixed_kernels()
        return device
    keep_to_one_thread_each()
    return torch.device("cpu")


def _meet() -> None:
    """Join the process group. MachineError when rank 0 cannot listen, or cannot be reached."""
    try:
        deepspeed.init_distributed(verbose=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        if os.environ.get("RANK") == "0":
            raise MachineError(f"rank 0 cannot listen on {place}: {reason}; give another --master-port") from error
        raise MachineError(f"rank 0 cannot be reached at {place}: {reason}; give --master-addr") from error


def build_engine(config: Config, device: torch.device, universal: bool = False) -> Engine:
    """Load the policy (each rank only its shard under ZeRO-3) and wrap it. Call after start_distributed.

    universal: a checkpoint of another number of processes will be loaded.
    """
    dtype = resolve_dtype(config.model.dtype)
    ds_config = resolve_ds_config(
        config,
        collectives.world_size(),
        _hidden_size(config),
        bf16=dtype is torch.bfloat16,
        on_gpu=device.type == "cuda",
    )
    _check_zero_section(config.engine.ds_config, ds_config["zero_optimization"])
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
    with sharded_loading(ds_config):
        causal_lm = load_for_training(config.model, dtype, gatherer(ds_config))
    if config.model.lora is not None:
        causal_lm = with_adapters(causal_lm, config.model.lora, config.train.seed)
    if zero_stage(ds_config) < 3:
        causal_lm.to(device)
    twin = Twin(causal_lm, device)
    silence_dropout(causal_lm)
    if config.model.lora is not None:
        # The first layer must hand a gradient to its input: without one ZeRO-3 reduces a leaf layer's gradients when
        # those of its output arrive, before they exist.
        causal_lm.enable_input_require_grads()
    if config.model.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(causal_lm, as_trees=_as_trees(config, causal_lm))
    if zero_stage(ds_config) == 3:
        deepspeed.zero.register_external_parameter(policy.head_logps, output_head(causal_lm).weight)
        if config.engine.leaf_layers:
            fetch_whole(causal_lm, decoder_layers(causal_lm))
    library.leave_muon_uncompiled()
    try:
        ds_engine, *_ = deepspeed.initialize(
            model=policy, optimizer=_optimizer(policy, config.train, device), config=ds_config
        )
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise MachineError(
            f"model {config.model.name} with its optimizer does not fit: use more processes, engine.ds_config "
            "zero3_offload, or model.lora"
        ) from error
    ds_engine.train()
    if zero_stage(ds_config) == 3 and config.engine.leaf_layers and policy.share_prompts and not policy.as_trees:
        reduce_once(policy, decoder_layers(causal_lm))
    return Engine(ds_engine, causal_lm, twin, ds_config, _by_layers(config, ds_config, causal_lm, device))


def _as_trees(config: Config, causal_lm: nn.Module) -> bool:
    """Whether the update reads a prompt and its completions as one row: they are short, and the model takes that.

    The same on all ranks and in all steps: ZeRO-3's gathers must match.
    """
    group_tokens = config.rollout.group_size * config.rollout.max_new_tokens
    return group_tokens <= TREE_TOKENS and can_read_trees(causal_lm)


def _by_layers(config: Config, ds_config: DsConfig, causal_lm: nn.Module, device: torch.device) -> bool:
    """Whether rollout and ensemble get one layer at a time: asked for, or a full copy does not fit on some rank."""
    asked = config.engine.copy_of_weights
    if zero_stage(ds_config) < 3 or asked == "whole" or (asked == "auto" and device.type != "cuda"):
        return False
    if asked == "auto":
        needed = sum(p.ds_numel * p.element_size() for p in causal_lm.parameters())  # type: ignore[attr-defined]
        free = torch.cuda.mem_get_info(device)[0]
        if not collectives.all_reduce_max([float(needed > MOST_OF_MEMORY * free)])[0]:
            return False
    if config.rollout.backend == "vllm":
        raise ConfigError(
            "engine.copy_of_weights: vLLM is handed a full copy of the weights, which is not made layer by layer; use "
            "rollout.backend transformers, or whole on devices with more memory"
        )
    return True


def learning_rate_at(step: int, cfg: TrainConfig) -> float:
    """Learning rate of step (from 0): linear warm-up over warmup_steps, then constant, linear or cosine to 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return cfg.learning_rate * factor[cfg.lr_schedule]


def _optimizer(policy: nn.Module, cfg: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        _decay_groups(policy, cfg.weight_decay),
        lr=cfg.learning_rate,
        betas=cfg.adam_betas,
        eps=cfg.adam_epsilon,
        fused=device.type == "cuda",
    )


def _decay_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases (one dimension) do not: a norm's weight has no reason to be near 0."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if weight_decay == 0.0:
        return [{"params": trainable, "weight_decay": 0.0}]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def sharded_loading(ds_config: DsConfig) -> AbstractContextManager[Any]:
    """While open, from_pretrained gives each rank its shard (ZeRO-3)."""
    return _ZeroInit(ds_config) if zero_stage(ds_config) == 3 else nullcontext()


def gatherer(ds_config: DsConfig) -> Gather | None:
    """What makes a partitioned parameter whole for every rank to change alike; None where weights are whole."""
    return (lambda parameters: gather(parameters, writer=0)) if zero_stage(ds_config) == 3 else None


class _ZeroInit:
    """Transformers looks up a weakly referenced HfDeepSpeedConfig; this keeps it alive while loading, not longer."""

    def __init__(self, ds_config: DsConfig) -> None:
        self._ds_config = ds_config

    def __enter__(self) -> None:
        from transformers.integrations import HfDeepSpeedConfig

        self._kept_alive = HfDeepSpeedConfig(self._ds_config)

    def __exit__(self, *_: object) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        del self._kept_alive


def _check_zero_section(name: str, zero: DsConfig) -> None:
    """DeepSpeed's own schema, before a weight is loaded."""
    try:
        library.module("runtime.zero.config").DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"engine.ds_config {name}: zero_optimization.{key}: {first['msg']}; mend it") from error


def _hidden_size(config: Config) -> int:
    loaded = load_model_config(config.model.name, config.model.revision, config.model.trust_remote_code)
    size = largest(loaded, "hidden_size") or largest(language_part(loaded), "hidden_size")
    if size is None:
        raise ConfigError(f"model {config.model.name}: its config has no hidden_size; use a causal language model")
    return size
