"""DeepSpeed, imported as vdr needs it: what it reads while it is imported is settled first."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed: Any = importlib.import_module("deepspeed")


def module(name: str) -> Any:
    """One of DeepSpeed's own modules."""
    return importlib.import_module(f"deepspeed.{name}")


def leave_muon_uncompiled() -> None:
    """Import Muon without TorchInductor, which takes a second to load. Call before an engine is made.

    ZeRO's optimizers import it to ask whether theirs is one, which vdr's never is, and its decorators call
    torch.compile.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with suppress(ImportError):  # not in every version
            module("runtime.zero.muon.original_muon")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
