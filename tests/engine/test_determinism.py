"""The modes that a GPU's backward runs in. That its sums then have one order is held by tests/gpu."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from vdr_cli.engine.determinism import in_fixed_order

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
}


@pytest.mark.parametrize(("kind", "more", "mode"), [("llama", {}, 2), ("mixtral", {"num_local_experts": 2}, 1)])
def test_torch_is_asked_for_fixed_kernels_inside_the_block_only(kind: str, more: dict, mode: int) -> None:
    """An operator without a deterministic form is no error."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](intermediate_size=16, **SMALL, **more))
    loss = model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(KeyError), in_fixed_order(model, torch.device("cuda")):
        assert torch.get_deterministic_debug_mode() == mode
        assert not torch.utils.deterministic.fill_uninitialized_memory
        loss.backward()
        raise KeyError
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory == filled
    with in_fixed_order(model, torch.device("cpu")):
        assert torch.get_deterministic_debug_mode() == 0
