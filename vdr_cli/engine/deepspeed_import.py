"""DeepSpeed, imported as vdr needs it: what it reads while it is imported is settled first."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError
from vdr_cli.system.variables import check_for_deepspeed

check_for_deepspeed(os.environ)
if not torch.cuda.is_available():
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        raise ConfigError("the environment variable DS_ACCELERATOR is cuda, but torch finds no GPU; unset it")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed: Any = importlib.import_module("deepspeed")


def module(name: str) -> Any:
    """One of DeepSpeed's own modules."""
    return importlib.import_module(f"deepspeed.{name}")


def leave_muon_uncompiled() -> None:
    """Import Muon without TorchInductor, which takes a second to load. Call before an engine is made.

    ZeRO's optimizers import it to ask whether theirs is one, and its decorators call torch.compile. A run with
    train.optimizer muon takes its steps uncompiled too.
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


@contextmanager
def parameters_unprinted() -> Iterator[None]:
    """Inside the block a parameter's repr is its address.

    ZeRO-3's start formats every parameter into a debug message that nobody sees, some 5 ms each.
    """
    before = nn.Parameter.__repr__
    nn.Parameter.__repr__ = object.__repr__  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Parameter.__repr__ = before  # type: ignore[assignment, method-assign]


def call_linear_directly_without_gradient() -> None:
    """Skip the torch.autograd.Function that ZeRO-3 puts in place of torch's linear map, unless a gradient is asked for.

    The Function binds its arguments in Python, some 50 us a call: more than a small product takes. The product is the
    same to the bit, so what is sampled has the log-probabilities that are trained on.
    """
    with_gradient = module("runtime.zero.linear").zero3_linear_wrap
    if nn.functional.linear is not with_gradient:
        return

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return with_gradient(input, weight, bias)  # type: ignore[no-any-return]
        if bias is not None and input.dim() == 2:
            return torch.addmm(bias, input, weight.t())
        output = input.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    nn.functional.linear = linear  # type: ignore[assignment]
