"""Hidden states to logits: every dtype into float32 or float64, and biases of -inf on unused vocabulary entries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.information import MEASURES, token_statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.errors import ConfigError
from vdr_cli.models import head as head_module
from vdr_cli.models.anatomy import check_head
from vdr_cli.models.head import Head, used_entries
from vdr_cli.models.independence import check_independence
from vdr_cli.models.logprobs import chunked_logps

N, D, V, UNUSED = 5, 8, 23, 3


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bias_with_unused(dtype: torch.dtype = torch.float32) -> Tensor:
    bias = numbers(V, seed=2, dtype=dtype)
    bias[-UNUSED:] = -torch.inf
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slab", [4, 16_384])
def test_logits_are_those_of_exact_products(
    dtype: torch.dtype, out_dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, to the output's dtype, whatever the factors are kept in."""
    monkeypatch.setattr(head_module, "SLAB", slab)
    head = Head(numbers(V, D, seed=1, dtype=dtype), numbers(V, seed=2, dtype=dtype), scale=0.5, softcap=3.0)
    hidden, out = numbers(N, D, dtype=dtype), torch.empty(N, V, dtype=out_dtype)
    raw = 0.5 * (hidden.double() @ head.weight.double().T + head.bias.double())
    assert head.logits_into(out, hidden) is out
    tolerance = 1e-12 if dtype == out_dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.double(), 3.0 * torch.tanh(raw / 3.0), rtol=tolerance, atol=tolerance)


def test_a_bias_of_minus_infinity_leaves_log_probabilities_and_gradients_finite() -> None:
    """Those of the vocabulary without the unused entries; 0 · inf makes a plain entropy NaN."""
    hidden, weight, bias = numbers(N, D).requires_grad_(), numbers(V, D, seed=1).requires_grad_(), bias_with_unused()
    targets = torch.arange(N)
    plain = torch.log_softmax(hidden @ weight.T + bias, -1)
    assert bool((plain.exp() * plain).sum(-1).isnan().all())

    logps, entropy = chunked_logps(hidden, weight, bias, targets, temperature=0.7)
    (logps.sum() + entropy.sum()).backward()
    used = torch.log_softmax((hidden @ weight.T + bias)[:, :-UNUSED] / 0.7, -1)
    torch.testing.assert_close(logps, used[torch.arange(N), targets])
    torch.testing.assert_close(entropy, -(used.exp() * used).sum(-1))
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (used[torch.arange(N), targets].sum() - (used.exp() * used).sum()).backward()
    for ours, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_bias_of_minus_infinity_leaves_measures_finite() -> None:
    hidden, weight, bias = numbers(4, N, D), numbers(V, D, seed=1), bias_with_unused()
    targets = torch.arange(N)
    found = token_statistics(hidden, targets, Head(weight, bias), MEASURES)
    expected = token_statistics(hidden, targets, Head(weight[:-UNUSED], bias[:-UNUSED]), MEASURES)
    for name in MEASURES:
        torch.testing.assert_close(found.get(name), expected.get(name), rtol=1e-5, atol=1e-6)


@pytest.fixture
def phi() -> PhiForCausalLM:
    """A model whose head has a bias, -inf at the last entries."""
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2, max_position_embeddings=64)).eval()
    model.lm_head.bias.data[-UNUSED:] = -torch.inf
    return model


def test_a_model_with_unused_entries_passes_the_checks_before_a_run(phi: PhiForCausalLM) -> None:
    check_head(phi)
    check_independence(phi)
    check_members(phi, EnsembleSpec(members=2, dropout=0.2))


def test_check_head_still_sees_a_difference_beside_unused_entries(phi: PhiForCausalLM) -> None:
    """Neither a factor on the used entries nor a used entry that the model switches off may hide behind the -inf."""

    def scaled(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        return 1.1 * output

    def cut(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor([5]), -torch.inf)

    for change in (scaled, cut):
        model = copy.deepcopy(phi)
        model.lm_head.register_forward_hook(change)
        with pytest.raises(ConfigError, match="not a scaled or soft-capped linear map"):
            check_head(model)


def test_used_entries() -> None:
    assert used_entries(torch.tensor([0.0, -1e4, -1e30, -torch.inf])).tolist() == [True, True, False, False]
