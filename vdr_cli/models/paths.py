"""The place of a model that a user names: a bed, a directory, a run, an adapter or a hub id. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vdr_cli.beds.registry import BEDS
from vdr_cli.config.paths import checked_path, looks_like_path
from vdr_cli.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"

MORE_THAN_A_PRODUCT = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
)
"""PEFT's settings of adapters that are not W + scale · B A with one scale, at every token."""

INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights whose adapters belong to a base model with other weights than its files hold."""


def resolve_model_path(name: str, key: str = "model") -> str:
    """The directory with the model's config.json and weights, or the hub id unchanged.

    That is a bed's directory, a local one, a run's model/, or the base model of an adapter. key: what the user
    gave the name as. Raises ConfigError when the name looks like a path and no model is there.
    """
    if name in BEDS:
        return str(BEDS[name].model_path)
    path = checked_path(name, key)
    if (adapter := adapter_directory(name)) is not None:
        return _base_of(adapter, key)
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if path.is_dir():
        raise ConfigError(
            f"{key} {name}: neither config.json nor model/config.json is in it; give a directory in Hugging Face "
            "format or a finished run"
        )
    if path.exists() or looks_like_path(name):
        raise ConfigError(
            f"{key} {name}: no such directory; give {', '.join(BEDS)}, a local directory or a hub id (owner/name)"
        )
    return name


def adapter_directory(name: str) -> Path | None:
    """The directory of the saved LoRA adapter that `name` is; None if it is a model of its own."""
    path = Path(name).expanduser()
    is_adapter = (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
    return path if is_adapter else None


def adapter_settings(directory: Path) -> dict[str, Any]:
    """PEFT's settings of the adapter in this directory. ConfigError when they cannot be read or are no LoRA's."""
    try:
        settings = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model {directory}: {ADAPTER_CONFIG} cannot be read ({error})") from error
    if not base:
        raise ConfigError(f"model {directory}: {ADAPTER_CONFIG} names no base model; set base_model_name_or_path in it")
    special = [name for name in MORE_THAN_A_PRODUCT if settings.get(name)]
    if str(settings.get("init_lora_weights")).lower().startswith(INITS_THAT_CHANGE_THE_BASE):
        special.append(f"init_lora_weights {settings['init_lora_weights']}")
    if kind != "LORA" or special:
        raise ConfigError(
            f"model {directory}: vdr cannot add this adapter ({special[0] if special else kind}) to its base model; "
            "merge it with PEFT (merge_and_unload, save_pretrained) and give the merged directory"
        )
    return settings  # type: ignore[no-any-return]


def _base_of(adapter: Path, key: str) -> str:
    """The place of the weights that the adapter is added to."""
    base = adapter_settings(adapter)["base_model_name_or_path"]
    try:
        return resolve_model_path(base, key)
    except ConfigError as error:
        raise ConfigError(f"{key} {adapter}: the adapter's base model: {error}") from None
