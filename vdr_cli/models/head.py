"""The LM head: hidden states to logits, in one place for all that read a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vdr_cli.models.cpu_linear import product_into

LEAST_BIAS = -1e30
"""Smallest bias that reaches a logit. Models mark unused vocabulary entries with -inf, and 0 · inf would make their
entropies and measures NaN; a probability of exp(-1e30) is 0 all the same."""

SLAB = 16_384
"""Rows of a low-precision weight that are converted at once where no product keeps float32."""


@dataclass(frozen=True)
class Head:
    """logits = cap(scale · (h Wᵀ + b)), cap(x) = softcap · tanh(x / softcap).

    Refers to the live parameters: gathered weights are seen without building it again.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states after the final norm to (..., V) logits in the weight's dtype, without gradient."""
        bias = None if self.bias is None else self.bias.clamp_min(LEAST_BIAS)
        return self._shaped(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, bias))

    def logits_into(self, out: Tensor, hidden: Tensor) -> Tensor:
        """(n, D) hidden states to (n, V) logits, written to `out` (float32 or float64) and returned; no gradient.

        A product of bfloat16 factors is accumulated and kept in float32: rounding logits to 8 bits of
        mantissa would move each by up to 0.4 %, far more than members differ by.
        """
        weight, hidden = self.weight, hidden.to(self.weight.dtype)
        if weight.dtype == out.dtype:
            product_into(out, hidden, weight)
        elif weight.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads():  # type: ignore[no-untyped-call]
            torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        else:
            exact = hidden.to(out.dtype)
            for start in range(0, weight.shape[0], SLAB):
                out[:, start : start + SLAB] = exact @ weight[start : start + SLAB].to(out.dtype).T
        if self.bias is not None:
            out += self.bias.to(out.dtype).clamp_min(LEAST_BIAS)
        return self._shaped(out)

    def _shaped(self, logits: Tensor) -> Tensor:
        """Scale and cap h Wᵀ + b, in place."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def used_entries(logits: Tensor) -> Tensor:
    """Bool of the same shape: False for vocabulary entries that the head's bias switches off."""
    return logits > LEAST_BIAS / 2
