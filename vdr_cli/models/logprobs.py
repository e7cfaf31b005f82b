"""Log-probabilities and entropies of chosen tokens, chunk by chunk, with recomputation in backward.

(N, V) is never held: rows go through the LM head in chunks, forward keeps two numbers a row, and backward
computes each chunk's logits again. Softmax and accumulation are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vdr_cli.models.cpu_linear import product
from vdr_cli.models.head import Head
from vdr_cli.models.limits import CHUNK_BYTES

ADDS_IN_FLOAT32 = "dtype_out" in torch.ops.aten.addmm.overloads()  # type: ignore[no-untyped-call]
"""True if torch adds a product of bfloat16 factors to a float32 matrix without rounding it (torch 2.8 and newer)."""


def chunk_rows(vocabulary: int, device_type: str, itemsize: int = 4) -> int:
    """Rows of a chunk so that its two (rows, V) buffers keep within CHUNK_BYTES."""
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    return max(budget // (2 * itemsize * vocabulary), 16)


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden (N, D), weight (V, D), targets (N,) → log p(target) (N,), entropy (N,).

    p = softmax(z / temperature), z = cap(scale · (h Wᵀ + b)), cap(x) = softcap · tanh(x / softcap).
    chunk_tokens: rows of a chunk; None: from CHUNK_BYTES.
    """
    itemsize = 8 if hidden.dtype == torch.float64 else 4
    rows = chunk_tokens or chunk_rows(weight.shape[0], hidden.device.type, itemsize)
    settings = HeadSettings(temperature, scale, softcap, rows)
    return ChunkedLogps.apply(hidden, weight, bias, targets, settings)


class HeadSettings(NamedTuple):
    """The map from hidden states to logits, and its portions."""

    temperature: float
    scale: float
    softcap: float | None
    rows: int


class ChunkedLogps(torch.autograd.Function):
    """(log p(target), entropy) with the gradient of both, derived by hand.

    With ℓ = log softmax(z/τ), p = exp ℓ, H = −Σ p ℓ and incoming gradients a (of log p_y) and e (of H):
        ∂/∂z_j = (a·(1[j=y] − p_j) − e·p_j·(ℓ_j + H)) / τ
    The weight is an attribute of the context, not a saved tensor: under ZeRO-3 its storage is released
    after forward and filled again before backward, which saved tensors take for a corruption.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
    ) -> tuple[Tensor, Tensor]:
        first, second = _buffers(hidden, weight, settings.rows)
        logps = torch.empty(len(hidden), dtype=first.dtype, device=hidden.device)
        entropy = torch.empty_like(logps)
        for part in _parts(len(hidden), settings.rows):
            n = len(targets[part])
            logits = _logits(hidden[part], weight, bias, settings, first[:n])
            log_p = torch.log_softmax(logits, dim=-1, out=second[:n])
            logps[part] = log_p.gather(1, targets[part, None]).squeeze(1)
            entropy[part] = torch.exp(log_p, out=logits).mul_(log_p).sum(1).neg_()
        ctx.save_for_backward(hidden, targets, entropy)
        ctx.weight, ctx.bias, ctx.settings = weight, bias, settings
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, entropy = ctx.saved_tensors
        weight, bias, settings = ctx.weight, ctx.bias, ctx.settings
        first, second = _buffers(hidden, weight, settings.rows)
        a = torch.zeros_like(entropy) if grad_logps is None else grad_logps / settings.temperature
        e = None if grad_entropy is None or not grad_entropy.any() else grad_entropy / settings.temperature
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=first.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = bias.new_zeros(bias.shape, dtype=first.dtype) if ctx.needs_input_grad[2] else None
        for part in _parts(len(hidden), settings.rows):
            n = len(targets[part])
            logits = _logits(hidden[part], weight, bias, settings, first[:n])
            entropy_terms = None if e is None else (e[part], entropy[part])
            grad_z = _logits_gradient(logits, second[:n], targets[part], a[part], entropy_terms, settings)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad_z.to(weight.dtype), weight.t())
            if grad_weight is not None:
                _accumulate_weight_gradient(grad_weight, grad_z, hidden[part], weight.dtype)
            if grad_bias is not None:
                grad_bias += grad_z.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _buffers(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Two (rows, V) buffers that all chunks use in turn: fresh ones cost a fifth of the time in page faults."""
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((2, min(rows, len(hidden)), weight.shape[0]), dtype=work)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: HeadSettings, out: Tensor) -> Tensor:
    """(n, D) → z/τ (n, V), into out. Matrix product from the weight's dtype, everything after it in out's."""
    Head(weight, bias, settings.scale, settings.softcap).logits_into(out, hidden)
    return out if settings.temperature == 1.0 else out.div_(settings.temperature)


def _logits_gradient(
    logits: Tensor,
    spare: Tensor,
    targets: Tensor,
    a: Tensor,
    entropy_terms: tuple[Tensor, Tensor] | None,
    settings: HeadSettings,
) -> Tensor:
    """Gradient of h Wᵀ + b, (n, V), in the two buffers. a and e come divided by τ; entropy_terms: (e, H)."""
    log_p = torch.log_softmax(logits, dim=-1, out=spare)
    slope = None
    if settings.softcap is not None:  # d cap = 1 − (cap/softcap)²
        slope = logits.mul_(settings.temperature / settings.softcap).square_().neg_().add_(1.0)
    if entropy_terms is None:
        gradient = log_p.exp_().mul_(-a[:, None])
    else:
        e, entropy = entropy_terms
        p = torch.exp(log_p) if slope is not None else torch.exp(log_p, out=logits)
        constant = torch.addcmul(a, e, entropy)[:, None]
        gradient = torch.addcmul(constant, log_p, e[:, None], out=log_p).mul_(p).neg_()
    gradient.scatter_add_(1, targets[:, None], a[:, None])
    if slope is not None:
        gradient.mul_(slope)
    return gradient if settings.scale == 1.0 else gradient.mul_(settings.scale)


def _accumulate_weight_gradient(total: Tensor, grad_z: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """total (V, D) += grad_zᵀ (V, n) @ hidden (n, D), summed over chunks in total's dtype."""
    if hidden.is_cuda and dtype != total.dtype and ADDS_IN_FLOAT32:
        half = grad_z.to(dtype).t(), hidden.to(dtype)
        torch.addmm(total, *half, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(grad_z.t(), hidden.to(total.dtype))
