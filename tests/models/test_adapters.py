"""Adapters: W + (alpha / rank) · B A, A from the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vdr_cli.config.schema import LoraConfig
from vdr_cli.models.adapters import frozen_layers, merged, with_adapters
from vdr_cli.models.loading import load_causal_lm

pytest.importorskip("peft")

IDS = torch.tensor([[3, 4, 5, 6]])


def adapted(seed: int) -> Any:
    return with_adapters(load_causal_lm("starter"), LoraConfig(rank=2, alpha=6.0, targets=["q_proj"]), seed)


def first_matrices(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name]


def test_a_depends_on_the_seed_alone() -> None:
    one, again, other = (first_matrices(adapted(seed)) for seed in (3, 3, 4))
    assert one and all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))


@torch.no_grad()
def test_the_product_is_added_alpha_over_rank_times() -> None:
    model, plain = adapted(0), load_causal_lm("starter")
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # B is 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter))
    for own, layer in zip(plain.model.layers, model.get_base_model().model.layers, strict=True):
        q = layer.self_attn.q_proj
        own.self_attn.q_proj.weight.add_(3.0 * q.lora_B["default"].weight @ q.lora_A["default"].weight)
    expected = plain(input_ids=IDS).logits
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-4)
    assert torch.allclose(merged(model)(input_ids=IDS).logits, expected, atol=1e-4)


def test_experts_without_an_adapter_are_named() -> None:
    sizes = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    experts = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("qwen2_moe", **sizes, **heads, **experts)
    model = with_adapters(AutoModelForCausalLM.from_config(config), LoraConfig(rank=2), 0)
    line = frozen_layers(model)
    frozen = sum(p.numel() for name, p in model.named_parameters() if "experts." in name or "mlp.gate.weight" in name)
    assert line is not None and "mlp.experts.down_proj" in line and "self_attn" not in line
    assert f"{frozen / sum(p.numel() for p in model.parameters()):.0%}" in line
    assert frozen_layers(with_adapters(load_causal_lm("starter"), LoraConfig(rank=2), 0)) is None
