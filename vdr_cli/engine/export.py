"""The trained model in save_pretrained format, loadable by AutoModelForCausalLM and vLLM, and a LoRA run's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vdr_cli.engine import collectives
from vdr_cli.engine.engine import Engine
from vdr_cli.errors import MachineError
from vdr_cli.models.adapters import merged, with_its_base
from vdr_cli.system.files import replacing
from vdr_cli.system.text import reason


def export_model(engine: Engine, tokenizer: Any, folder: Path, adapter: Path | None = None) -> None:
    """Write `folder` (adapters merged) and, with LoRA, `adapter`. Collective; rank 0 writes; complete or absent.

    Raises MachineError on every rank when they cannot be written.
    """
    with engine.for_writing() as model, collectives.agreed():
        if collectives.is_main():
            _write(merged(model), folder, tokenizer)
            if adapter is not None:
                _write(with_its_base(model), adapter, tokenizer, save_embedding_layers=False)


def _write(model: Any, folder: Path, tokenizer: Any, **how: Any) -> None:
    try:
        with replacing(folder) as partial:
            model.save_pretrained(partial, **how)
            tokenizer.save_pretrained(partial)
    except (OSError, RuntimeError, ValueError, SafetensorError) as fault:  # ValueError: of transformers, for one
        raise MachineError(f"model could not be written to {folder}: {reason(fault)}") from fault
