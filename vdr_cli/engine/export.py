"""The trained model in save_pretrained format, loadable by AutoModelForCausalLM and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdr_cli.engine import collectives
from vdr_cli.engine.engine import Engine
from vdr_cli.errors import MachineError
from vdr_cli.models.adapters import merged
from vdr_cli.system.files import replacing


def export_model(engine: Engine, tokenizer: Any, folder: Path) -> None:
    """Write `folder` (adapters merged). Collective; rank 0 writes; complete or absent.

    Raises MachineError on every rank when it cannot be written.
    """
    with engine.for_writing() as model, collectives.agreed():
        if collectives.is_main():
            _write(model, tokenizer, folder)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    try:
        with replacing(folder) as partial:
            merged(model).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError as fault:
        raise MachineError(f"model could not be written to {folder}: {fault}") from fault
