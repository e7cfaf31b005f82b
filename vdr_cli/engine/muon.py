"""Muon (Keller Jordan et al. 2024) under ZeRO-3: DeepSpeed's, with the gradient clipped before it.

The matrices of the decoder layers move by the orthogonalised mean of their gradients; everything else is AdamW's.

DeepSpeed clips what Muon makes of a gradient: updates of a model with thousands of singular values would shrink to a
global norm of max_grad_norm, and AdamW's gradients with them. Here the clip acts on the gradient, as with AdamW alone.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vdr_cli.config import TrainConfig
from vdr_cli.engine import deepspeed_import
from vdr_cli.engine.optimizer import decay_groups, dimensions
from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import decoder_layers

MOMENTUM = 0.95
"""Decay rate of the mean of the gradients, which also looks one step ahead (Nesterov)."""


def build_muon(causal_lm: nn.Module, cfg: TrainConfig) -> Any:
    """The optimizer over the trainable parameters, marked as DeepSpeed wants them. ConfigError when it has none."""
    try:
        muon_with_adam = deepspeed_import.module("runtime.zero.muon.muon_optimizer").MuonWithAuxAdam
        deepspeed_import.module("runtime.zero.muon.original_muon").NS_METHODS  # noqa: B018  how older ones differ
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"train.optimizer muon needs DeepSpeed 0.19.8 or later, not {deepspeed_import.deepspeed.__version__}: "
            "pip install -U deepspeed"
        ) from error
    hidden = {id(parameter) for parameter in hidden_matrices(causal_lm)}
    assert cfg.muon_learning_rate is not None
    groups: list[dict[str, Any]] = []
    trainable = [parameter for parameter in causal_lm.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.use_muon = id(parameter) in hidden  # type: ignore[attr-defined]
    muon = [parameter for parameter in trainable if id(parameter) in hidden]
    others = [parameter for parameter in trainable if id(parameter) not in hidden]
    own = {"lr": cfg.muon_learning_rate, "momentum": MOMENTUM, "use_muon": True, "ns_method": "gram"}
    groups.append({"params": muon, "weight_decay": cfg.weight_decay, **own})
    adam = {"lr": cfg.learning_rate, "betas": cfg.adam_betas, "eps": cfg.adam_epsilon, "use_muon": False}
    for group in decay_groups(others, cfg.weight_decay):
        groups.append({**group, **adam})
    for group in groups:
        group["rate"] = group["lr"] / cfg.learning_rate
    return muon_with_adam([group for group in groups if group["params"]])


def hidden_matrices(causal_lm: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon moves: matrices of the decoder layers, and stacks of experts' matrices."""
    return [
        parameter
        for layer in decoder_layers(causal_lm)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
        and (dimensions(parameter) == 2 or (dimensions(parameter) == 3 and "experts" in name))
    ]


def clip_gradient(zero: Any, max_norm: float) -> float:
    """The norm of the step's gradient, which is then scaled to at most max_norm (0: not). Collective.

    zero: DeepSpeed's ZeRO-3 optimizer, its gradients reduced and not yet Muon's. inf where a gradient is not finite.
    """
    combine = deepspeed_import.module("runtime.utils").combine_grad_norm_groups
    norm = float(combine(zero._get_norm_groups()))
    if max_norm > 0 and math.isfinite(norm):
        factor = min(max_norm / (norm + 1e-6), 1.0)
        for partitions in zero.averaged_gradients.values():
            for partition in partitions:
                partition.mul_(factor)
    return norm


def step(ds_engine: Any, max_norm: float) -> float:
    """One step of the DeepSpeed engine; the gradient's norm before clipping. Collective.

    A gradient that is not finite never reaches Muon, whose means would take in the matrices where it is finite.
    """
    zero = ds_engine.optimizer
    norm = clip_gradient(zero, max_norm)
    zero.use_muon = math.isfinite(norm)
    try:
        ds_engine.step()
    finally:
        zero.use_muon = True
    return norm
