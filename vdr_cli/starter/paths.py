"""Where the embedded default lies in the installed package. No torch import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vdr_cli.starter import countdown

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """The pretrained model and its tokenizer, in Hugging Face format."""
    return _HERE / "model"


def recipe_path() -> Path:
    """The settings that suit the starter, as config sections."""
    return _HERE / "recipe.yaml"


def recipe() -> dict[str, Any]:
    """The recipe's sections; they replace schema defaults when model.name is `starter`."""
    loaded: dict[str, Any] = yaml.safe_load(recipe_path().read_text(encoding="utf-8"))
    return loaded


def rows(split: str) -> list[dict[str, Any]]:
    """The embedded dataset's rows of `train` or `test`: prompt, numbers, target. KeyError on another split."""
    return countdown.rows(split)
