"""Log-probabilities and entropies of chosen tokens, chunk by chunk, with recomputation in backward.

(N, V) is never held: rows go through the LM head in chunks, forward keeps two numbers a row, and backward
computes each chunk's logits again. Softmax and accumulation are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of one chunk's (rows, V) buffers: enough rows for a matrix product to run at full speed, and no more."""


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
    return ChunkedLogps.apply(hidden, weight, bias, targets, temperature, scale, softcap, rows)


class ChunkedLogps(torch.autograd.Function):
    """(log p(target), entropy) with the gradient of both, derived by hand.

    With ℓ = log softmax(z/τ), p = exp ℓ, H = −Σ p ℓ and incoming gradients a (of log p_y) and e (of H):
        ∂/∂z_j = (a·(1[j=y] − p_j) − e·p_j·(ℓ_j + H)) / τ
    The weight is an attribute of the context, not a saved tensor: under ZeRO-3 its storage is released
    after forward and filled again before backward, which saved tensors take for a corruption.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        scale: float,
        softcap: float | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=work, device=hidden.device)
        entropy = torch.empty_like(logps)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, temperature, scale, softcap, work)
            log_p = torch.log_softmax(logits, dim=-1)
            logps[part] = log_p.gather(1, targets[part, None]).squeeze(1)
            entropy[part] = _negative_row_dot(torch.exp(log_p, out=logits), log_p)
        ctx.save_for_backward(hidden, targets, entropy)
        ctx.weight, ctx.bias = weight, bias
        ctx.settings = (temperature, scale, softcap, rows, work)
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, entropy = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        temperature, scale, softcap, rows, work = ctx.settings
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None
        if grad_logps is None:
            grad_logps = torch.zeros_like(entropy)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=work) if ctx.needs_input_grad[1] else None
        grad_bias = bias.new_zeros(bias.shape, dtype=work) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, temperature, scale, softcap, work)
            grad_z = _logits_gradient(
                logits,
                targets[part],
                entropy[part],
                grad_logps[part] / temperature,
                None if grad_entropy is None else grad_entropy[part] / temperature,
                None if softcap is None else temperature / softcap,
            )
            if scale != 1.0:
                grad_z.mul_(scale)
            if grad_hidden is not None:
                grad_hidden[part] = grad_z.to(weight.dtype) @ weight
            if grad_weight is not None:
                _accumulate_weight_gradient(grad_weight, grad_z, hidden[part], weight.dtype)
            if grad_bias is not None:
                grad_bias += grad_z.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    work: torch.dtype,
) -> Tensor:
    """(n, D) → (n, V) in the work dtype, divided by the temperature. Matrix product in the weight's dtype."""
    logits = _product(hidden.to(weight.dtype), weight.t(), work)
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        logits.div_(temperature)
    return logits


def _logits_gradient(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    inverse_cap: float | None,
) -> Tensor:
    """Gradient of the chunk's uncapped logits, (n, V), in place of the logits where nothing else needs them.

    logits: z/τ; the two gradients are divided by τ already; inverse_cap: τ/softcap, so that d cap = 1 − (z/softcap)².
    """
    log_p = torch.log_softmax(logits, dim=-1)  # (n, V)
    slope = None if inverse_cap is None else logits.mul_(inverse_cap).square_().neg_().add_(1.0)
    if grad_entropy is None:
        gradient = log_p.exp_().mul_(-grad_logps[:, None])
    else:
        p = torch.exp(log_p) if slope is not None else torch.exp(log_p, out=logits)
        constant = torch.addcmul(grad_logps, grad_entropy, entropy)[:, None]
        gradient = torch.addcmul(constant, log_p, grad_entropy[:, None], out=log_p).mul_(p).neg_()
    gradient.scatter_add_(1, targets[:, None], grad_logps[:, None])
    return gradient if slope is None else gradient.mul_(slope)


def _product(a: Tensor, b: Tensor, work: torch.dtype) -> Tensor:
    """a @ b in the work dtype. CUDA hands out its float32 accumulator; elsewhere half precision rounds once."""
    if a.dtype == work:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=work)
    return (a @ b).to(work)


def _accumulate_weight_gradient(total: Tensor, grad_z: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """total (V, D) += grad_zᵀ (V, n) @ hidden (n, D), summed over chunks in the work dtype."""
    if hidden.is_cuda and dtype != total.dtype:
        total.add_(torch.mm(grad_z.to(dtype).t(), hidden.to(dtype), out_dtype=total.dtype))
    else:
        total.addmm_(grad_z.t(), hidden.to(total.dtype))


def _negative_row_dot(p: Tensor, log_p: Tensor) -> Tensor:
    """−Σ_j p_j ℓ_j of each row, without a product of the size of p."""
    return -torch.bmm(p.unsqueeze(1), log_p.unsqueeze(2)).view(-1)
