"""LoRA adapters through PEFT (Hu et al. 2021): W + (alpha / rank) · B A, of which only A and B are trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vdr_cli.config.schema import LoraConfig
from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.models.paths import adapter_settings
from vdr_cli.system.text import first_line


def with_adapters(causal_lm: nn.Module, cfg: LoraConfig, seed: int) -> Any:
    """The model wrapped by PEFT, its own parameters frozen. B starts at 0: the policy is the base model at first.

    A is drawn from `seed` alone, the same on every rank. Adapters have the base's dtype (the optimizer keeps
    float32 masters), and may be added to a model whose weights are partitioned: theirs are not yet.
    Raises ConfigError when PEFT is missing or `targets` names no module.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("model.lora needs PEFT: pip install peft") from error
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
                f"model.lora.targets {named}: {first_line(error)}; give names of linear modules, or all-linear"
            ) from error


def frozen_layers(model: nn.Module) -> str | None:
    """A line that names the weight matrices of the decoder layers without an adapter; None where all have one.

    all-linear adapts linear modules and the experts that PEFT knows. Others, which are one tensor for all experts of a
    layer, stay as they are.
    """
    whole = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    inside = [
        (name, p)
        for layer in decoder_layers(model)
        for name, p in layer.named_parameters()
        if "lora_" not in name and ".base_layer." not in name and len(getattr(p, "ds_shape", p.shape)) > 1
    ]
    if not inside:
        return None
    share = sum(whole[id(p)] for _, p in inside) / sum(whole.values())
    return (
        f"model.lora.targets all-linear leaves {share:.0%} of the parameters frozen inside the layers, where no linear "
        f"module holds them: {', '.join(dict.fromkeys(name for name, _ in inside))}"
    )


def merged(model: Any) -> Any:
    """A plain model with the adapters in its weights, a copy; the model itself when it has none."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model


def with_its_base(model: Any) -> Any:
    """The same PEFT model; a local base is named by its absolute path, which works in any directory."""
    for settings in model.peft_config.values():
        base = settings.base_model_name_or_path
        if base and Path(base).is_dir():
            settings.base_model_name_or_path = str(Path(base).absolute())
    return model


ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX, FACTOR_A, FACTOR_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes partitioned parameters whole inside the block and keeps what was written to them."""


@torch.no_grad()
def add_adapter(model: nn.Module, directory: Path, gather: Gather | None = None) -> None:
    """Add a saved adapter to the weights of its base model: W += scale · B A, computed in float32.

    gather: for weights that are partitioned. ConfigError when a tensor of the adapter has no place in the model.
    """
    settings = adapter_settings(directory)
    rank = int(settings["r"])
    scale = float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS)
    except Exception as error:  # torn files make safetensors raise anything
        raise ConfigError(f"model {directory}: {ADAPTER_WEIGHTS} cannot be read ({error})") from error
    for name, weight in _targets(model, tensors, directory).items():
        product = scale * tensors[name + FACTOR_B].float() @ tensors[name + FACTOR_A].float()
        with gather([weight]) if gather else nullcontext():
            if weight.numel():  # where a gather leaves a rank out, it has nothing to write to
                delta = product.t() if settings.get("fan_in_fan_out") else product
                weight.add_(delta.to(weight.device, weight.dtype))


def _targets(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> dict[str, nn.Parameter]:
    """The adapter's names without their endings, and the weight that each changes."""
    names = {name.removesuffix(FACTOR_A).removesuffix(FACTOR_B) for name in tensors}
    found = {}
    for name in sorted(names):
        try:
            found[name] = model.get_submodule(name.removeprefix(PREFIX)).weight
        except AttributeError:
            raise ConfigError(
                f"model {directory}: the adapter's {name} has no place in the base model "
                f"{type(model).__name__}; give the base model that it was trained on"
            ) from None
    return found  # type: ignore[return-value]
