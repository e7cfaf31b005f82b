"""A configuration that says "tied" over files that hold a head of their own.

Merged and edited models come like this. transformers reads such a head where it loads whole weights and ties it to the
embeddings where it loads shards (ZeRO-3): training would start from another model than evaluation reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vdr_cli.models.sizes import language_part

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def untied_if_files_are(config: Any, path: str, revision: str | None) -> bool:
    """Set `tie_word_embeddings` to False if the files hold a head that is not the embedding; True if it was set.

    path: a directory or a hub id whose configuration this is.
    """
    parts = [part for part in (config, language_part(config)) if getattr(part, "tie_word_embeddings", False)]
    if not parts or not _has_other_head(path, revision):
        return False
    for part in parts:
        part.tie_word_embeddings = False
    return True


def _has_other_head(path: str, revision: str | None) -> bool:
    try:
        files = _files_by_tensor(path, revision)
        head = next((name for name in files if name.endswith(HEADS)), None)
        table = next((name for name in files if name.endswith(EMBEDDINGS)), None)
        if head is None or table is None:
            return False
        return not torch.equal(_tensor(files[head], head), _tensor(files[table], table))
    except Exception:  # torn files raise anything; the loader, which comes next, says what is wrong with them
        return False


def _files_by_tensor(path: str, revision: str | None) -> dict[str, Path]:
    """The names of all tensors with the file that each is in; {} where there are no weights in a known format."""
    for name in WEIGHT_FILES:
        file = _file(path, name, revision)
        if file is None:
            continue
        if name.endswith(".json"):
            shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            named = {tensor: _file(path, shard, revision) for tensor, shard in shards.items()}
            return {tensor: shard for tensor, shard in named.items() if shard is not None}
        return dict.fromkeys(_names(file), file)
    return {}


def _file(path: str, name: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(_pickled(file))


def _tensor(file: Path, name: str) -> Tensor:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)  # type: ignore[no-any-return]
    return _pickled(file)[name]


def _pickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]
