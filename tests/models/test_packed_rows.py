"""Rows without padding inside: every token in its place, and causality alone as good as the mask."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vdr_cli.models.packed_rows import packed_rows
from vdr_cli.models.policy import completion_hidden

PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13], [0, 0, 0, 14]])
COMPLETIONS = torch.tensor([[20, 21, 22], [23, 0, 0], [0, 0, 0], [24, 25, 0]])
TOKENS = PROMPTS, PROMPTS > 0, COMPLETIONS, COMPLETIONS > 0


def test_tokens_follow_each_other() -> None:
    rows = packed_rows(*TOKENS, multiple=2)
    assert rows.ids.tolist() == [[5, 6, 20, 21], [7, 8, 9, 10], [11, 12, 13, 0], [14, 24, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3]] * 4
    assert rows.columns.tolist() == [[1, 2, 3], [3, 3, 3], [2, 2, 2], [0, 1, 0]]


def test_the_width_is_a_multiple_and_no_position_is_beyond_the_longest_row() -> None:
    rows = packed_rows(*TOKENS, multiple=3)
    assert rows.ids.shape == (4, 6) and rows.ids[0].tolist() == [5, 6, 20, 21, 0, 0]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_hidden_states_are_those_of_masked_rows(kind: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = shape | {"num_key_value_heads": 1} if kind == "qwen2" else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=41, **small)).double().eval()
    rows = packed_rows(*TOKENS, multiple=4)
    alone = model.get_decoder()(input_ids=rows.ids, position_ids=rows.positions)[0]
    expected = completion_hidden(model, *TOKENS)
    for b, t in (COMPLETIONS > 0).nonzero().tolist():
        torch.testing.assert_close(alone[b, rows.columns[b, t]], expected[b, t], rtol=1e-9, atol=1e-12)
