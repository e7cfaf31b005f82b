"""Hidden states of sampling are those of a forward of the whole sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vdr_cli.models.policy import completion_states, end_state
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling
from vdr_cli.training import end_states
from vdr_cli.training.end_states import EndStateKeeper
from vdr_cli.training.watched_rollout import WatchedRollout

G = 6
REQUEST = RolloutRequest([[5, 6, 7], [8, 9], [5, 5, 5, 5]], G, Sampling(8), [1, 2, 3])


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("batch_tokens", [4096, 60, 1])
@torch.no_grad()
def test_they_are_those_of_the_whole_sequence(model: Qwen2ForCausalLM, batch_tokens: int) -> None:
    """One decode batch, some, and one for every completion; completions of one token among them."""
    keeper = EndStateKeeper()
    ends = range(2, 12)
    sampler = TransformersRollout(pad_id=0, eos_ids=ends, batch_tokens=batch_tokens)
    on = WatchedRollout(sampler, keeper).start(model, REQUEST)()
    lengths = on.completion_mask.sum(1)
    assert 1 in lengths and 8 in lengths and len(lengths.unique()) > 3
    found = keeper.of(on)
    tokens = on.prompt_ids, on.prompt_mask, on.completion_ids, on.completion_mask
    expected = end_state(completion_states(model, *tokens, False), on.completion_mask)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert keeper.of(on) is None, "once"
    assert not model.model._forward_hooks


def test_other_completions_are_read(model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = EndStateKeeper()
    rollout = WatchedRollout(TransformersRollout(pad_id=0, eos_ids=[2]), keeper)
    on = rollout.start(model, REQUEST)()
    assert keeper.of(replace(on)) is None
    monkeypatch.setattr(end_states, "MOST_BYTES", 10)
    on = rollout.start(model, REQUEST)()
    assert keeper.of(on) is None
