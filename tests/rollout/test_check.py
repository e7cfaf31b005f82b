"""The trial before a run: models that sample what they read pass, the others are refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.disagreement.conftest import architecture, tiny_model
from vdr_cli.errors import ConfigError
from vdr_cli.rollout.check import check_sampling

__all__ = ["architecture", "tiny_model"]


@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_every_architecture_samples_what_it_reads(architecture: str, tiny_model: Callable, cuda_graphs: Any) -> None:
    """Layers of linear attention and state-space layers among them: prompts are given to several rows, rows leave."""
    if architecture == "recurrent_gemma":
        pytest.skip("its convolution reads padding: right only where the pad token's embedding is 0")
    check_sampling(tiny_model(architecture), cuda_graphs)


def planted(forward: Callable[..., Any]) -> nn.Module:
    """A model whose own code has this forward; `forward(model, ids)` returns what LlamaForCausalLM returns."""

    class Planted(LlamaForCausalLM):
        pass

    Planted.forward = forward
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=61, num_hidden_layers=2, initializer_range=0.5, **small)
    return Planted(config).eval()


def without_cache(self: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
    return LlamaForCausalLM.forward(self, input_ids, attention_mask, position_ids, use_cache=False)


def swallowing(
    self: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kw: Any
) -> Any:
    return LlamaForCausalLM.forward(self, input_ids, None, position_ids, use_cache=False)


@pytest.mark.parametrize(
    ("forward", "message"),
    [(without_cache, "cannot be sampled token by token .*unexpected keyword"), (swallowing, "ignores the key-value")],
)
def test_code_without_a_cache_is_refused(forward: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_sampling(planted(forward), "off")
    assert "\n" not in str(refused.value)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("bert", vocab_size=61, initializer_range=0.5, **small)
    with pytest.raises(ConfigError, match="BertLMHeadModel gives tokens other log-probabilities"):
        check_sampling(AutoModelForCausalLM.from_config(config).eval(), "off")


def test_the_model_is_left_as_found(tiny_model: Callable) -> None:
    model, ids = copy.deepcopy(tiny_model("qwen3_next")), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        check_sampling(model, "off")
        assert torch.equal(model(input_ids=ids).logits, before)
