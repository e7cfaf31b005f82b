"""From the settings to an engine: the policy loaded, sharded, and wrapped by DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vdr_cli.config import Config
from vdr_cli.engine import collectives, deepspeed_import, muon
from vdr_cli.engine.deepspeed_import import deepspeed
from vdr_cli.engine.ds_config import DsConfig, resolve_ds_config, zero_stage
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.gathered import GatheredModel
from vdr_cli.engine.leaves import fetch_whole, reduce_once
from vdr_cli.engine.optimizer import build_optimizer
from vdr_cli.engine.partition import gather_to_read, gather_to_write, sharded_loading
from vdr_cli.engine.sequence import SequenceGroup, SequencePolicy
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.models.adapters import with_adapters
from vdr_cli.models.anatomy import decoder_layers, output_head
from vdr_cli.models.limits import MOST_OF_MEMORY, PACKED_TOKENS, TREE_TOKENS
from vdr_cli.models.loading import load_for_training, load_model_config, resolve_dtype
from vdr_cli.models.packed_rows import can_read_packed
from vdr_cli.models.policy import Policy
from vdr_cli.models.prompt_tree import can_read_trees
from vdr_cli.models.sizes import language_part, largest
from vdr_cli.models.train_mode import silence_dropout
from vdr_cli.system.text import reason


def build_engine(config: Config, device: torch.device, universal: bool = False) -> Engine:
    """Load the policy (each rank only its shard under ZeRO-3) and wrap it. Call after start_distributed. Collective.

    universal: a checkpoint of another number of processes will be loaded.
    Raises ConfigError for settings that DeepSpeed or the model does not allow, MachineError when memory is short.
    """
    dtype = resolve_dtype(config.model.dtype)
    ds_config = resolve_ds_config(
        config,
        collectives.world_size(),
        _hidden_size(config),
        bf16=dtype is torch.bfloat16,
        on_gpu=device.type == "cuda",
        ranks_per_host=collectives.ranks_per_host(),
    )
    _check_zero_section(config.engine.ds_config, ds_config["zero_optimization"])
    _check_by_deepspeed(config.engine.ds_config, ds_config)
    if universal and config.train.optimizer == "muon":
        raise ConfigError(
            "train.optimizer muon: DeepSpeed cannot convert Muon's state to another number of processes; resume with "
            "as many as the checkpoint was written by"
        )
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
    with sharded_loading(ds_config):
        causal_lm = load_for_training(config.model, dtype, gather_to_write(ds_config))
    if config.model.lora is not None:
        causal_lm = with_adapters(causal_lm, config.model.lora, config.train.seed)
    if zero_stage(ds_config) < 3:
        causal_lm.to(device)
    gathered = GatheredModel(causal_lm, device, gather_to_read(ds_config))
    _prepare_for_training(config, causal_lm)
    policy, sequence = _policy(config, causal_lm)
    ds_engine = _initialize(config, ds_config, policy, device)
    by_layers = _by_layers(config, ds_config, causal_lm, device)
    muon_clip = config.train.max_grad_norm if config.train.optimizer == "muon" else None
    return Engine(ds_engine, causal_lm, gathered, ds_config, by_layers, muon_clip, sequence)


def _policy(config: Config, causal_lm: Any) -> tuple[Policy, SequenceGroup | None]:
    """The module that DeepSpeed wraps, and the ranks that share its forward; None: each has its own."""
    ways = {"as_trees": _as_trees(config, causal_lm), "packed": reads_packed(config, causal_lm)}
    if config.engine.sequence_parallel == 1:
        return Policy(causal_lm, **ways, watch_routers=config.grpo.router_aux_loss_coef > 0), None
    group = SequenceGroup(config.engine.sequence_parallel)
    return SequencePolicy(causal_lm, group, **ways), group


def _prepare_for_training(config: Config, causal_lm: Any) -> None:
    silence_dropout(causal_lm)
    if config.model.lora is not None:
        # The first layer must hand a gradient to its input: without one ZeRO-3 reduces a leaf layer's gradients when
        # those of its output arrive, before they exist.
        causal_lm.enable_input_require_grads()
    if config.model.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _initialize(config: Config, ds_config: DsConfig, policy: Policy, device: torch.device) -> Any:
    """DeepSpeed's engine around the policy, its decoder layers fetched whole under ZeRO-3."""
    layers = decoder_layers(policy.causal_lm)
    if zero_stage(ds_config) == 3:
        deepspeed.zero.register_external_parameter(policy.head_logps, output_head(policy.causal_lm).weight)
        fetch_whole(policy.causal_lm, layers)
    deepspeed_import.leave_muon_uncompiled()
    try:
        with deepspeed_import.parameters_unprinted():
            ds_engine, *_ = deepspeed.initialize(
                model=policy, optimizer=_optimizer(config, policy, device), config=ds_config
            )
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise MachineError(
            f"model {config.model.name} with its optimizer does not fit: use more processes, engine.ds_config "
            "zero3_offload, or model.lora"
        ) from error
    deepspeed_import.call_linear_directly_without_gradient()
    ds_engine.train()
    if zero_stage(ds_config) == 3 and policy.calls_layers_twice:
        reduce_once(policy, layers)
    return ds_engine


def _optimizer(config: Config, policy: Policy, device: torch.device) -> torch.optim.Optimizer:
    if config.train.optimizer == "muon":
        return muon.build_muon(policy.causal_lm, config.train)
    return build_optimizer(policy, config.train, device)


def _as_trees(config: Config, causal_lm: nn.Module) -> bool:
    """True when the update reads a prompt and its completions as one row: they are short, and the model allows it.

    The same on all ranks and in all steps: ZeRO-3's gathers must match.
    """
    group_tokens = config.rollout.group_size * config.rollout.completion_tokens
    short = group_tokens <= TREE_TOKENS and config.grpo.router_aux_loss_coef == 0
    return short and can_read_trees(causal_lm)


def reads_packed(config: Config, causal_lm: nn.Module) -> bool:
    """True when the update reads rows without padding inside: completions can be long, and the model allows it.

    The same on all ranks and in all steps, as `_as_trees`.
    """
    long = config.rollout.completion_tokens >= PACKED_TOKENS and config.grpo.router_aux_loss_coef == 0
    return long and can_read_packed(causal_lm)


def _by_layers(config: Config, ds_config: DsConfig, causal_lm: nn.Module, device: torch.device) -> bool:
    """True when weights are gathered one layer at a time: as set, or because a full copy does not fit on some rank.

    Raises ConfigError when it does not fit and this process should sample.
    """
    setting = config.engine.gather
    if zero_stage(ds_config) < 3 or setting == "whole" or (setting == "auto" and device.type != "cuda"):
        return False
    if setting == "layer":
        return True
    needed = sum(p.ds_numel * p.element_size() for p in causal_lm.parameters())  # type: ignore[attr-defined]
    free = torch.cuda.mem_get_info(device)[0]
    if not collectives.all_reduce_max([float(needed > MOST_OF_MEMORY * free)])[0]:
        return False
    if config.rollout.backend != "vllm":
        raise ConfigError(
            f"model {config.model.name}: a full copy of the weights ({needed / 2**30:.1f} GiB) does not fit on every "
            "GPU, so the model cannot sample here: set rollout.backend to vllm, or use GPUs with more memory"
        )
    return True


def _check_zero_section(name: str, zero: DsConfig) -> None:
    """Check against DeepSpeed's own schema, before a weight is loaded."""
    try:
        deepspeed_import.module("runtime.zero.config").DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        raise ConfigError(f"engine.ds_config {name}: zero_optimization.{_told(error)}; correct it") from error


def _check_by_deepspeed(name: str, ds_config: DsConfig) -> None:
    """Build DeepSpeed's own configuration, before a weight is loaded: later its errors would look like the model's."""
    runtime = deepspeed_import.module("runtime.config")
    try:
        runtime.DeepSpeedConfig(ds_config)
    except Exception as error:  # a value of a wrong type makes it raise anything
        told = _told(error) if isinstance(error, ValidationError) else reason(error)
        raise ConfigError(f"engine.ds_config {name}: {told}; correct it") from error
    _check_data_types(name, ds_config, runtime.DtypeEnum)


DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype")


def _check_data_types(name: str, ds_config: DsConfig, known: Any) -> None:
    """Check types that DeepSpeed reads when it makes the engine. known: its enumeration of types and their names."""
    model = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    given = ds_config.get("data_types", {})
    for key in given.keys() - set(DATA_TYPES):
        raise ConfigError(f"engine.ds_config {name}: data_types.{key} is not a setting; give {', '.join(DATA_TYPES)}")
    for key in DATA_TYPES:
        value = given.get(key)
        if value is None:
            continue
        try:
            dtype = known(value).value
        except ValueError:
            dtype = None
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):  # it would take int8, which holds no gradient
            raise ConfigError(f"engine.ds_config {name}: data_types.{key} is {value!r}; give bf16, fp16 or fp32")
        accumulates_alone = key == "grad_accum_dtype" and zero_stage(ds_config) == 0
        if dtype is not model and (accumulates_alone or key == "param_dtype"):
            where = "without ZeRO, " * accumulates_alone
            raise ConfigError(
                f"engine.ds_config {name}: {where}data_types.{key} is {value} but model.dtype is "
                f"{str(model).removeprefix('torch.')}; remove it or make them agree"
            )
        zero = ds_config["zero_optimization"]
        mixed = key == "grad_accum_dtype" and (model, dtype) == (torch.bfloat16, torch.float32)
        if mixed and zero_stage(ds_config) == 1 and not zero.get("compute_grad_norm", True):
            raise ConfigError(
                f"engine.ds_config {name}: zero_optimization.compute_grad_norm is false, which stage 1 does not allow "
                f"with model.dtype bfloat16 and data_types.grad_accum_dtype {value}; remove one of the two"
            )


def _told(error: ValidationError) -> str:
    """The first of the errors: `key: message`."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _hidden_size(config: Config) -> int:
    loaded = load_model_config(config.model.name, config.model.revision, config.model.trust_remote_code)
    size = largest(loaded, "hidden_size") or largest(language_part(loaded), "hidden_size")
    if size is None:
        raise ConfigError(f"model {config.model.name}: its config has no hidden_size; use a causal language model")
    return size
