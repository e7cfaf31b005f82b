"""Sequence parallelism: what it refuses, in one process. tests/integration has its numbers on two and four."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vdr_cli.checks import check_processes
from vdr_cli.config import Config
from vdr_cli.engine.sequence import check_heads
from vdr_cli.errors import ConfigError

SHAPE = {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}


def tiny(kind: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (
            "qwen2",
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            "the 3 key and value heads of Qwen2ForCausalLM",
        ),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3}, "the 3 attention heads of LlamaForCausalLM"),
        (
            "mistral",
            {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8},
            "MistralForCausalLM cannot",
        ),
        ("bloom", {"n_head": 4}, "BloomForCausalLM cannot be replaced"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(kind: str, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^engine.sequence_parallel 2.*{line}"):
        check_heads(tiny(kind, **settings), 2)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_models_whose_heads_divide_are_not(kind: str) -> None:
    check_heads(tiny(kind, num_attention_heads=4, num_key_value_heads=2), 2)


def test_processes_must_be_a_multiple() -> None:
    config = Config(model={"name": "x"}, engine={"sequence_parallel": 2}, train={"prompts_per_step": 8})
    check_processes(config, 4)
    with pytest.raises(ConfigError, match=r"engine.sequence_parallel 2 does not divide 3 processes; start a mul"):
        check_processes(config, 3)
    with pytest.raises(ValueError, match=r"engine.sequence_parallel 2 does not divide 3 processes; start a mul"):
        Config(model={"name": "x"}, engine={"sequence_parallel": 2}, launch={"num_processes": 3})
    over_hosts = {"num_processes": 1, "hostfile": "hosts"}
    assert Config(model={"name": "x"}, engine={"sequence_parallel": 2}, launch=over_hosts).refused_processes(2) is None


def test_the_balance_of_experts_needs_whole_rows() -> None:
    with pytest.raises(ValueError, match=r"grpo.router_aux_loss_coef needs whole rows"):
        Config(model={"name": "x"}, engine={"sequence_parallel": 2}, grpo={"router_aux_loss_coef": 0.1})
