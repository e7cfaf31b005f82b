"""The load-balancing loss of a mixture of experts, against a float64 loop over tokens and layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from vdr_cli.errors import ConfigError
from vdr_cli.grpo.losses import LossInputs, LossSettings, PolicyOutputs, Totals, policy_loss, token_weights
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.models.policy import Policy

EXPERTS, TOP_K, LAYERS = 4, 2, 2
SHAPE = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "sliding_window": None},
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 12, "head_dim": 8},
}


def tiny(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **settings)).double()
    model.config._experts_implementation = "eager"  # the fast ones know no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def batch() -> dict[str, Tensor]:
    """Two prompts of different lengths, two completions each."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 41, (2, 4), generator=generator).repeat_interleave(2, dim=0)
    prompt_mask = torch.ones_like(prompts, dtype=torch.bool)
    prompt_mask[2:, :1] = False
    lengths = torch.tensor([5, 2, 1, 3])
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 41, (4, 5), generator=generator),
        "completion_mask": torch.arange(5)[None] < lengths[:, None],
    }


def looped(model: Any, tokens: dict[str, Tensor], prompts_once: bool) -> Tensor:
    """The loss by its definition: rows alone and without padding, one token and layer at a time."""
    routed: list[Tensor] = []
    routers = [
        [m for m in layer.modules() if type(m).__name__.endswith("TopKRouter")] for layer in decoder_layers(model)
    ]
    gates = [found[0] for found in routers]
    hooks = [gate.register_forward_hook(lambda m, a, out: routed.append(out[0].reshape(-1, EXPERTS))) for gate in gates]
    counts, probabilities, rows = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS).double(), 0
    for row in range(4):
        prompt = tokens["prompt_ids"][row][tokens["prompt_mask"][row]]
        read = tokens["completion_ids"][row][:-1][tokens["completion_mask"][row][:-1]]  # of the widest row not the last
        routed.clear()
        model.model(input_ids=torch.cat([prompt, read])[None])
        for logits in routed:
            for number, token in enumerate(logits):
                if prompts_once and row % 2 and number < len(prompt):
                    continue
                p = torch.exp(token) / torch.exp(token).sum()
                probabilities = probabilities + p
                for expert in sorted(range(EXPERTS), key=lambda e: -float(p[e].detach()))[:TOP_K]:
                    counts[expert] += 1
                rows += 1
    for hook in hooks:
        hook.remove()
    return EXPERTS * sum(counts[e] / rows * probabilities[e] / rows for e in range(EXPERTS))  # type: ignore[return-value]


@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared prompts"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_a_loop(kind: str, share: bool) -> None:
    model = tiny(kind, **KINDS[kind])
    tokens = batch()
    expected = looped(model, tokens, prompts_once=share)
    expected.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = Policy(model, share_prompts=share, watch_routers=True)
    policy(**tokens, temperature=0.7)
    balance = policy.router_balance()
    assert balance is not None and float(balance.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    balance.backward()
    assert any(float(value.abs().max()) > 1e-4 for value in gradient.values())
    for name, p in model.named_parameters():
        if name in gradient:
            assert p.grad is not None and torch.allclose(p.grad, gradient[name], rtol=1e-4, atol=1e-7), name


def test_even_routing_gives_the_number_of_experts_per_token() -> None:
    model = tiny("mixtral", **KINDS["mixtral"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
    policy = Policy(model, watch_routers=True)
    policy(**batch(), temperature=1.0)
    assert float(policy.router_balance()) == pytest.approx(TOP_K)  # type: ignore[arg-type]


def test_the_loss_weighs_a_micro_batch_by_its_tokens() -> None:
    mask = torch.arange(5)[None] < torch.tensor([[4], [2]])
    totals = Totals(completions=4, tokens=24)
    weights = token_weights("dapo", mask, totals, 5)
    balance = torch.tensor(2.5, requires_grad=True)
    policy = PolicyOutputs(torch.zeros(2, 5), router_balance=balance)
    inputs = LossInputs(torch.zeros(2), mask, weights=weights, entropy_weights=weights)
    output = policy_loss(policy, inputs, LossSettings(router_aux_loss_coef=0.1))
    assert float(output.loss.detach()) == pytest.approx(0.1 * 2.5 * 6 / 24)
    output.loss.backward()
    assert float(balance.grad) == pytest.approx(0.1 * 6 / 24)  # type: ignore[arg-type]
    top, bottom = output.metrics["aux_loss"]
    assert float(top / bottom) == pytest.approx(2.5)


def test_a_model_without_routers_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^grpo.router_aux_loss_coef: Qwen2ForCausalLM has no routers .* set it to 0$"
    ):
        Policy(tiny("qwen2"), watch_routers=True)
