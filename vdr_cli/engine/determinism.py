"""Gradients on a GPU summed in a fixed order, so that a run can be repeated and resumed to the bit.

Forward passes are repeatable as they are. Some backward kernels add with atomics, in whatever order their blocks end:
attention's, and that of a prompt's keys and values, which all its completions read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vdr_cli.models.anatomy import has_experts
from vdr_cli.models.prefix import shares_prompts


def fixed_kernels() -> None:
    """Once, before a GPU multiplies matrices: workspaces and kernels whose sums have one order.

    cuDNN's attention has no deterministic backward. It is disabled for every forward, so that the gathered model and
    the policy use the same kernels.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_cudnn_sdp(False)
    warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)


@contextmanager
def in_fixed_order(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block, a backward on a GPU, sums have one order wherever torch knows one. On a CPU nothing changes.

    torch asks for fixed attention kernels in one mode only, in which an operator without a fixed kernel raises.
    Decoders of plain attention layers have none of these; recurrent layers and experts may.
    """
    if device.type != "cuda":
        yield
        return
    plain = shares_prompts(model) and not has_experts(model)
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_deterministic_debug_mode("error" if plain else "warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
