"""The matrix products of a decode step on packed weights.

A step multiplies a few rows with every weight, so it takes as long as reading the weights does. In float32 on a CPU
torch's products of few rows read them at half the speed of the memory; oneDNN's read weights that were laid out for
them once at nearly all of it, and give a row the same bits whatever the number of rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

ROWS = 16
"""Rows the weights are laid out for; products of other numbers of rows work as well."""

LEAST_BYTES = 32 << 20
"""Smaller models stay in the processor's caches, where there is nothing to gain."""

MOST_OF_MEMORY = 0.5
"""Share of the free memory that the packed copy may take."""


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's linear maps work on a packed copy of their weights, where that pays."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not _pays([linear.weight for linear in linears]):
        yield
        return
    for linear in linears:
        linear.forward = _product(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _pays(weights: list[nn.Parameter]) -> bool:
    """Not on a GPU, in other formats, or where a model's layers are whole one at a time only."""
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    fits = LEAST_BYTES <= size <= MOST_OF_MEMORY * psutil.virtual_memory().available
    return plain and fits and torch.backends.mkldnn.is_available()


def _product(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
    bias = linear.bias

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]

    return forward
