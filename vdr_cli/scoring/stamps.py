"""Sizes and times of the files that scores depend on: other contents under the same names are another request."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from vdr_cli.config import RewardsConfig
from vdr_cli.models.paths import adapter_directory, resolve_model_path
from vdr_cli.rewards.loading import MODEL, check_name, model_path

READ = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
"""Endings of the files of weights, tokenizers, chat templates and remote code."""


def weights_stamp(model: str, key: str = "model") -> str | None:
    """Local files of a model, and of the adapter that is added to it; None when all of it comes from a hub.

    key: what the user gave the name as. Raises ConfigError when a path holds no model.
    """
    folders = [Path(resolve_model_path(model, key)), adapter_directory(model)]
    found = [_files_stamp(folder) for folder in folders if folder is not None and folder.is_dir()]
    return " ".join(found) if found else None


def reward_stamps(rewards: RewardsConfig | None) -> dict[str, str]:
    """Name to stamp of the reward functions and reward models that are files here. Raises ConfigError."""
    if rewards is None:
        return {}
    stamps = {entry.name: _reward_stamp(entry.name) for entry in rewards.functions}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def _reward_stamp(name: str) -> str | None:
    """The stamp of one reward; None for a built-in function and for a model from a hub."""
    model = model_path(name)
    if model is not None:
        return weights_stamp(model, f"rewards.functions {MODEL}")
    place, _ = check_name(name)
    file = Path(place) if place.endswith(".py") else _module_file(place)
    return None if file is None or not file.is_file() else _file_stamp(file)


def _module_file(name: str) -> Path | None:
    """The file of a module, found without importing it or its packages; None when there is none."""
    places: list[str] | None = [*sys.path, str(Path.cwd())]
    spec = None
    parts = name.split(".") if name else []
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), places)
        if spec is None:
            return None
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if places is None and count < len(parts):
            return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _files_stamp(folder: Path) -> str:
    return " ".join(_file_stamp(path) for path in sorted(folder.iterdir()) if path.suffix in READ)


def _file_stamp(path: Path) -> str:
    return f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}"
