"""LoRA adapters through PEFT (Hu et al. 2021): W + (alpha / rank) · B A, of which only A and B are trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from vdr_cli.config.schema import LoraConfig
from vdr_cli.errors import ConfigError


def with_adapters(causal_lm: nn.Module, cfg: LoraConfig, seed: int) -> Any:
    """The model wrapped by PEFT, its own parameters frozen. B starts at 0: the policy is the base model at first.

    A is drawn from `seed` alone, the same on every rank. Adapters have the base's dtype (the optimizer keeps
    float32 masters), and may be added to a model whose weights are partitioned: theirs are not yet.
    Raises ConfigError when PEFT is missing or `targets` names no module.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("model.lora needs PEFT, which is an extra: pip install 'vdr-cli[lora]'") from error
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # annotated int, only ever divided by the rank
        target_modules=cfg.targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return peft.get_peft_model(causal_lm, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            named = cfg.targets if isinstance(cfg.targets, str) else ", ".join(cfg.targets)
            raise ConfigError(
                f"model.lora.targets {named}: {str(error).splitlines()[0]}; give names of linear modules, or all-linear"
            ) from error


def merged(model: Any) -> Any:
    """A plain model with the adapters in its weights, a copy; the model itself when it has none."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
