"""Matrix products in float32 on a CPU by oneDNN, where torch's own go through another library.

Measured on two cores of an AMD EPYC: 1.1 to 1.6 times as fast for the layers of a small model, 1.8 times for the
product with a vocabulary, and twice as fast for the few rows of a decode step on weights laid out for it. On GPUs and
in other formats the products are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

LEAST_WORK = 2**27
"""Operations of a product below which it is torch's: oneDNN compiles a kernel, 0.8 ms and 0.1 MB, for every new number
of rows, and in training there is always another."""

SLAB = 2048
"""Columns of a wide product made at once where it goes into a given buffer: they are still in the cache when copied."""

PACKED_ROWS = 16
"""Rows the weights of a decode step are laid out for; products of other numbers of rows work as well."""

LEAST_BYTES = 32 << 20
"""Smaller models stay in the processor's caches, where there is nothing to gain from another layout."""

MOST_OF_MEMORY = 0.5
"""Share of the free memory that the packed copy may take."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D) and (V, D) to (..., V): x Wᵀ + b, with gradient."""
    if not _suits(x, weight):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Product.apply(x, weight, bias)  # type: ignore[no-any-return]
    return _onednn(x, weight, bias)


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out (n, V) = x (n, D) Wᵀ, without gradient and without a second buffer of that size."""
    if not _suits(x, weight):
        torch.mm(x, weight.t(), out=out)
        return
    for start in range(0, len(weight), SLAB):
        out[:, start : start + SLAB] = _onednn(x, weight[start : start + SLAB], None)


def _suits(x: Tensor, weight: Tensor) -> bool:
    on_cpu = x.device.type == weight.device.type == "cpu"
    is_large = 2 * x.numel() * len(weight) >= LEAST_WORK
    return HAS_ONEDNN and is_large and on_cpu and x.dtype == weight.dtype == torch.float32


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """The weight is an attribute of the context: ZeRO-3 releases its storage and fills it again before backward,
    which saved tensors take for a corruption. Its own gradient sums over many rows, where torch's product is as fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (N, V)
        return (
            _onednn(grad, ctx.weight.t(), None) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """torch's linear map with our product."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


PLAIN = (nn.Linear, Linear)
"""Linear maps with no forward of their own; a subclass may compute something else."""


def with_cpu_linears(model: nn.Module) -> nn.Module:
    """The same model, its linear maps working with `product`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's linear maps work on a copy of their weights laid out for few rows, where that pays.

    A decode step takes as long as reading the weights does: packed ones are read at nearly the memory's speed. A row
    has the same bits whatever the number of rows beside it.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and type(module) in PLAIN]
    if not _pays([linear.weight for linear in linears]):
        yield
        return
    for linear in linears:
        linear.forward = _on_packed(linear)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _pays(weights: Sequence[Tensor]) -> bool:
    """Not on a GPU, in other formats, or where a model's layers are whole one at a time only."""
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    fits = LEAST_BYTES <= size <= MOST_OF_MEMORY * psutil.virtual_memory().available
    return plain and fits and HAS_ONEDNN


def _on_packed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
    bias = linear.bias
    return lambda x: _onednn(x, packed, bias)
