"""Chunked log-probabilities against the dense computation, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdr_cli.models.logprobs import ChunkedLogps, HeadSettings, chunk_rows, chunked_logps

N, D, V = 11, 6, 17


def dense_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain twin: all logits at once, autograd does the rest."""
    logits = hidden @ weight.t()
    logits = scale * (logits if bias is None else logits + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def make(dtype: torch.dtype, with_bias: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if with_bias else None
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=generator)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


SHAPES = [
    {"temperature": 1.0, "scale": 1.0, "softcap": None},
    {"temperature": 0.7, "scale": 1.0, "softcap": None},
    {"temperature": 1.3, "scale": 0.5, "softcap": 2.0},
    {"temperature": 1.0, "scale": 3.0, "softcap": 5.0},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("outputs", ["logps", "entropy", "both"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_dense(
    shape: dict[str, float], with_bias: bool, outputs: str, dtype: torch.dtype, tolerance: float
) -> None:
    coefficients = torch.randn(2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if outputs == "logps":
        coefficients[1] = 0
    if outputs == "entropy":
        coefficients[0] = 0
    results = []
    for function, kind in ((chunked_logps, dtype), (dense_logps, torch.float64)):
        hidden, weight, bias, targets = make(dtype, with_bias)
        leaves = [leaf.detach().to(kind).requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
        extra = {"chunk_tokens": 4} if function is chunked_logps else {}
        logps, entropy = function(*leaves, *([] if with_bias else [None]), targets, **shape, **extra)
        loss = (coefficients[0].to(kind) * logps + coefficients[1].to(kind) * entropy).sum()
        results.append([logps, entropy, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) <= tolerance


def test_gradcheck() -> None:
    hidden, weight, bias, targets = make(torch.float64)

    def function(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return ChunkedLogps.apply(h, w, b, targets, HeadSettings(0.8, 1.5, 3.0, 4))

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("rows", [1, 3, 11, 100])
def test_chunk_size_does_not_matter(rows: int) -> None:
    hidden, weight, bias, targets = make(torch.float64)
    logps, entropy = chunked_logps(hidden, weight, bias, targets, chunk_tokens=rows)
    expected = dense_logps(hidden, weight, bias, targets)
    torch.testing.assert_close((logps, entropy), expected, rtol=1e-12, atol=1e-12)


def test_only_the_used_output_needs_a_gradient() -> None:
    hidden, weight, bias, targets = make(torch.float64)
    logps, entropy = chunked_logps(hidden, weight, bias, targets)
    (from_logps,) = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    (from_entropy,) = torch.autograd.grad(entropy.sum(), hidden)
    dense_logp, dense_entropy = dense_logps(hidden, weight, bias, targets)
    torch.testing.assert_close(from_logps, torch.autograd.grad(dense_logp.sum(), hidden, retain_graph=True)[0])
    torch.testing.assert_close(from_entropy, torch.autograd.grad(dense_entropy.sum(), hidden)[0])


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, targets = make(torch.float32, with_bias=False)
    frozen = weight.detach()
    logps, _ = chunked_logps(hidden, frozen, None, targets)
    logps.sum().backward()
    assert frozen.grad is None
    assert hidden.grad is not None


def test_weight_storage_may_change_between_forward_and_backward() -> None:
    """As ZeRO-3 does: released after forward, filled again before backward."""
    hidden, weight, _, targets = make(torch.float32, with_bias=False)
    logps, _ = chunked_logps(hidden, weight, None, targets)
    expected = torch.autograd.grad(dense_logps(hidden, weight, None, targets)[0].sum(), weight)[0]
    values = weight.detach().clone()
    weight.data = torch.empty(0)
    weight.data = values
    logps.sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_bfloat16_is_exact_in_float32() -> None:
    """The factors are bfloat16's; product, softmax, entropy and the sum over chunks are float32."""
    hidden, weight, _, targets = make(torch.bfloat16, with_bias=False)
    logps, entropy = chunked_logps(hidden, weight, None, targets, chunk_tokens=4)
    logits = hidden.double() @ weight.double().t()
    log_p = torch.log_softmax(logits, dim=-1)
    assert logps.dtype == entropy.dtype == torch.float32
    assert relative(logps, log_p.gather(1, targets[:, None]).squeeze(1)) < 1e-6
    assert relative(entropy, -(log_p.exp() * log_p).sum(1)) < 1e-6
    (logps.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    logps, entropy = chunked_logps(hidden, weight, None, torch.tensor([1]))
    (logps.sum() + entropy.sum()).backward()
    assert logps.item() == pytest.approx(-2e4)
    assert entropy.item() == 0.0
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_chunk_rows_follow_the_byte_budget() -> None:
    assert chunk_rows(151_936, "cpu") * 151_936 * 8 <= 1 << 28
    assert chunk_rows(10**9, "cpu") == 16
