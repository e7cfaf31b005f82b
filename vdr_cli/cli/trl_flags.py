"""Flags of TRL and its kin, and what they are called here."""

from __future__ import annotations

import re

NAMES = {
    "num_generations": "--group-size",
    "max_completion_length": "--max-new-tokens",
    "max_steps": "--steps",
    "output_dir": "--output",
    "model_name_or_path": "--model",
    "dataset_name": "--data",
    "dataset_path": "--data",
    "dataset_config": "--set data.subset=...",
    "dataset_train_split": "--set data.split=...",
    "reward_funcs": "--reward",
    "reward_weights": "--reward NAME=WEIGHT",
    "per_device_train_batch_size": "--set train.micro_batch_size=...",
    "generation_batch_size": "--set train.prompts_per_step=... (times --group-size)",
    "gradient_accumulation_steps": "--set train.prompts_per_step=... (and train.micro_batch_size)",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--set train.lr_schedule=...",
    "warmup_steps": "--set train.warmup_steps=...",
    "weight_decay": "--set train.weight_decay=...",
    "max_grad_norm": "--set train.max_grad_norm=...",
    "gradient_checkpointing": "--set model.gradient_checkpointing=true",
    "bf16": "--set model.dtype=bfloat16",
    "torch_dtype": "--set model.dtype=...",
    "dtype": "--set model.dtype=...",
    "trust_remote_code": "--set model.trust_remote_code=true",
    "beta": "--set grpo.beta=...",
    "epsilon": "--set grpo.epsilon_low=...",
    "epsilon_high": "--set grpo.epsilon_high=...",
    "loss_type": "--set grpo.loss=...",
    "scale_rewards": "--set grpo.scale_rewards=...",
    "steps_per_generation": "--set grpo.minibatches=...",
    "num_iterations": "--set grpo.num_iterations=...",
    "top_p": "--set rollout.top_p=...",
    "top_k": "--set rollout.top_k=...",
    "use_vllm": "--set rollout.backend=vllm",
    "vllm_server_base_url": "--set rollout.vllm.urls=[...]",
    "use_peft": "--set model.lora.rank=16",
    "lora_r": "--set model.lora.rank=...",
    "lora_alpha": "--set model.lora.alpha=...",
    "save_steps": "--set train.checkpoint_every=...",
    "eval_steps": "--set train.eval_every=...",
    "resume_from_checkpoint": "--resume",
    "deepspeed": "--ds-config",
    "nproc_per_node": "--num-processes",
    "num_gpus": "--num-processes",
}
"""docs/migration.md has the whole table; a test holds the settings named here to those that exist."""

UNKNOWN = re.compile(r"No such option:? '?--(?P<name>[\w-]+)")
NO_SETTING = re.compile(r"(?P<said>.*\b(?P<name>\w+) is not a setting); did you mean .*")


def with_hint(message: str) -> str:
    """An error about an unknown flag or setting, completed by what other tools' flag of that name is called here."""
    if found := UNKNOWN.search(message):
        said = f"No such option: --{found['name']}"
    elif found := NO_SETTING.fullmatch(message):
        said = found["said"]
    else:
        return message
    ours = NAMES.get(found["name"].replace("-", "_"))
    return message if ours is None else f"{said}; did you mean {ours}?"
