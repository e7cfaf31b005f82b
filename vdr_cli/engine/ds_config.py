"""From `engine.ds_config` to the complete DeepSpeed configuration: every "auto" resolved, every conflict named.

DeepSpeed crashes on "auto" outside the Hugging Face trainer, ignores unknown top-level keys and clips
gradients at 1.0 unless told otherwise, so nothing is left to it. Pure: dictionaries in, dictionaries out.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import UnionType
from typing import Any

import vdr_cli
from vdr_cli.config import Config
from vdr_cli.errors import ConfigError
from vdr_cli.system.text import did_you_mean

DsConfig = dict[str, Any]

# Keys whose value vdr owns: what the JSON may say is "auto", or the same number.
OWNED_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

SMALLEST_BUCKET = 5_000_000
"""Elements. Of a small model h² is less than one matrix: every parameter would be reduced by itself."""

PASSED_THROUGH = {
    "zero_optimization",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
OBJECT, SWITCH, NUMBER = 'an object, such as {"...": ...}', "true or false", "a number"
KINDS: tuple[tuple[type | UnionType, str, tuple[str, ...]], ...] = (
    (dict, OBJECT, ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")),
    (dict, OBJECT, ("activation_checkpointing", "aio", "comms_logger", "data_types", "flops_profiler")),
    (dict, OBJECT, ("optimizer.params", "scheduler.params")),
    (dict | None, OBJECT, ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")),
    (int, "0, 1, 2 or 3", ("zero_optimization.stage",)),
    (bool, SWITCH, ("dump_state", "memory_breakdown", "prescale_gradients", "wall_clock_breakdown")),
    (bool, SWITCH, ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")),
    (bool, SWITCH, ("comms_logger.enabled", "flops_profiler.enabled")),
    (int | float, NUMBER, ("gradient_predivide_factor",)),
    (int | float | None, NUMBER, ("steps_per_print",)),
    (str | None, "bf16, fp16 or fp32", ("communication_data_type",)),
)
"""Types of values, their names in an error, and the keys that have them. A section stands before its keys."""

OPTIMIZER_NAMES = {"adamw": ("adamw", "adam", "auto"), "muon": ("muon", "auto")}
"""Values of optimizer.type, in lower case, that agree with train.optimizer. DeepSpeed's Adam is AdamW by default."""

KNOWN_KEYS = PASSED_THROUGH | {*OWNED_BATCH_KEYS, "bf16", "fp16", "gradient_clipping", "optimizer", "scheduler"}


def ds_config_path(name: str) -> Path:
    """The JSON behind `engine.ds_config`: a path, or the name of a file in ds_configs/.

    Raises ConfigError naming the known names when neither exists.
    """
    package = Path(vdr_cli.__file__).parent
    folders = [folder for folder in (package / "ds_configs", package.parent / "ds_configs") if folder.is_dir()]
    if not name.endswith(".json"):
        for folder in folders:
            if (folder / f"{name}.json").is_file():
                return folder / f"{name}.json"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = ", ".join(sorted({file.stem for folder in folders for file in folder.glob("*.json")}))
    raise ConfigError(f"engine.ds_config {name}: no such file and not one of {known}")


def read_ds_config(name: str) -> DsConfig:
    """The JSON as it stands.

    Raises ConfigError, which names the file and the line or key, unless it is an object with values of the right types.
    """
    path = ds_config_path(name)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"engine.ds_config {path}:{error.lineno}: {error.msg}; correct the JSON") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"engine.ds_config {path}: cannot be read as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"engine.ds_config {path}: a JSON object is needed, not {type(loaded).__name__}")
    for key in loaded:
        if key not in KNOWN_KEYS:
            hint = did_you_mean(key, KNOWN_KEYS, f"known: {', '.join(sorted(KNOWN_KEYS))}")
            raise ConfigError(f"engine.ds_config {path}: unknown key {key}; {hint}")
    for kind, words, keys in KINDS:
        for key in keys:
            section, _, last = key.rpartition(".")
            values = loaded.get(section, {}) if section else loaded
            if last in values and not isinstance(values[last], kind):
                raise ConfigError(f"engine.ds_config {path}: {key} must be {words}")
    return loaded


def resolve_ds_config(
    config: Config, world_size: int, hidden_size: int, bf16: bool, on_gpu: bool, ranks_per_host: int = 1
) -> DsConfig:
    """The complete DeepSpeed configuration of a run.

    Micro-batches are counted by the loop (ranks may hold different numbers of them), so DeepSpeed sees
    gradient_accumulation_steps 1 and is told where the boundary is.
    """
    name = config.engine.ds_config
    given = read_ds_config(name)
    _refuse_conflicts(name, given, config, world_size, bf16)
    resolved: DsConfig = {key: copy.deepcopy(value) for key, value in given.items() if key in PASSED_THROUGH}
    resolved["zero_optimization"] = _resolve_zero(
        name, resolved.get("zero_optimization", {}), hidden_size, on_gpu, ranks_per_host
    )
    resolved["train_micro_batch_size_per_gpu"] = config.train.micro_batch_size
    resolved["gradient_accumulation_steps"] = 1
    resolved["train_batch_size"] = config.train.micro_batch_size * world_size
    resolved["gradient_clipping"] = config.train.max_grad_norm
    if bf16 and zero_stage(resolved) == 0:
        raise ConfigError(
            f"engine.ds_config {name}: without ZeRO, DeepSpeed's first step in bfloat16 is not the optimizer's; give "
            "zero_optimization.stage 1, 2 or 3, or set model.dtype to float32"
        )
    if config.train.optimizer == "muon":
        _fit_muon(name, resolved)
    resolved["bf16"] = {"enabled": bf16}
    resolved.setdefault("steps_per_print", 2**31)
    resolved.setdefault("zero_allow_untested_optimizer", True)
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    return resolved


def _fit_muon(name: str, resolved: DsConfig) -> None:
    """Sets what Muon needs of ZeRO-3, in place. It is clipped in engine/muon.py, and its state is in the type of
    communication."""
    zero = resolved["zero_optimization"]
    if zero_stage(resolved) != 3:
        raise ConfigError(f"engine.ds_config {name}: train.optimizer muon needs ZeRO stage 3; give zero3")
    refused = [key for key in ("offload_optimizer", "zero_quantized_gradients") if zero.get(key)]
    if zero.get("reduce_scatter"):
        refused.append("reduce_scatter")
    if refused:
        raise ConfigError(
            f"engine.ds_config {name}: zero_optimization.{refused[0]} cannot be combined with train.optimizer muon, "
            "which needs whole gradients on the device; remove it"
        )
    zero["reduce_scatter"] = False
    resolved["gradient_clipping"] = 0.0
    resolved.setdefault("communication_data_type", "fp32")


def zero_stage(ds_config: DsConfig) -> int:
    """The ZeRO stage, 0 to 3."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def micro_batches_per_rank(config: Config, world_size: int) -> int:
    """Micro-batches of the rank with most groups."""
    groups = -(-config.train.prompts_per_step // world_size)
    return -(-groups * config.rollout.group_size // config.train.micro_batch_size)


def _resolve_zero(name: str, zero: DsConfig, hidden_size: int, on_gpu: bool, ranks_per_host: int) -> DsConfig:
    """Bucket sizes as the Hugging Face trainer sets them: h², 0.9 h², 10 h (h = hidden size); buckets of collectives
    are never smaller than SMALLEST_BUCKET. ZeRO++'s second partition spans a host.
    """
    bucket = max(hidden_size**2, SMALLEST_BUCKET)
    autos = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_hpz_partition_size": ranks_per_host,
    }
    resolved = dict(zero)
    for key, value in zero.items():
        if value == "auto":
            if key not in autos:
                raise ConfigError(f'engine.ds_config {name}: zero_optimization.{key} is "auto"; give a value')
            resolved[key] = autos[key]
    if not on_gpu and (first := _needs_cuda(resolved)):
        raise ConfigError(f"engine.ds_config {name}: zero_optimization.{first} needs CUDA GPUs; give zero3")
    for key in ("offload_optimizer", "offload_param"):
        if not on_gpu:
            resolved.pop(key, None)  # the accelerator's memory is the host's already
    if resolved.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(f"engine.ds_config {name}: zero_optimization.stage is {resolved['stage']}; give 0 to 3")
    return resolved


def _needs_cuda(zero: DsConfig) -> str | None:
    """The first key whose kernels or copies DeepSpeed has for CUDA alone."""
    if (zero.get("offload_optimizer") or {}).get("super_offload"):
        return "offload_optimizer.super_offload"
    quantized = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
    return next((key for key in quantized if zero.get(key)), None)


def _refuse_conflicts(name: str, given: DsConfig, config: Config, world_size: int, bf16: bool) -> None:
    batch = config.train.prompts_per_step * config.rollout.group_size
    expected = {
        "train_batch_size": (batch, "train.prompts_per_step x rollout.group_size"),
        "train_micro_batch_size_per_gpu": (config.train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            micro_batches_per_rank(config, world_size),
            "train.prompts_per_step x rollout.group_size / (processes x train.micro_batch_size)",
        ),
        "gradient_clipping": (config.train.max_grad_norm, "train.max_grad_norm"),
    }
    for key, (value, source) in expected.items():
        if given.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"engine.ds_config {name}: {key} is {given[key]} but {source} is {value}; remove it or make them agree"
            )
    if given.get("bf16", {}).get("enabled", "auto") not in ("auto", bf16):
        raise ConfigError(
            f"engine.ds_config {name}: bf16.enabled disagrees with model.dtype; remove it, set model.dtype"
        )
    if given.get("fp16", {}).get("enabled", "auto") not in ("auto", False):
        raise ConfigError(
            f"engine.ds_config {name}: fp16 is not supported; remove it and set model.dtype to bfloat16 or float32"
        )
    optimizer = given.get("optimizer", {}).get("type", "auto")
    if str(optimizer).lower() not in OPTIMIZER_NAMES[config.train.optimizer]:
        raise ConfigError(
            f"engine.ds_config {name}: optimizer.type is {optimizer} but train.optimizer is {config.train.optimizer}; "
            "remove it or make them agree"
        )
    for section in ("optimizer", "scheduler"):
        values = given.get(section, {}).get("params", {}).values()
        if any(value != "auto" for value in values):
            raise ConfigError(
                f"engine.ds_config {name}: {section} is set by train.learning_rate, lr_schedule, warmup_steps, "
                "adam_betas, adam_epsilon and weight_decay; remove it"
            )
