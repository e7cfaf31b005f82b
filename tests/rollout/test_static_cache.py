"""Decoding on a cache at fixed addresses: the same tokens as on the cache that grows."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vdr_cli.rollout import static_cache
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.static_cache import Columns
from vdr_cli.rollout.transformers_backend import CudaGraphs, TransformersRollout
from vdr_cli.samples import Completions, Sampling

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)).eval()


def llama() -> PreTrainedModel:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4)).eval()


def sampled(model: PreTrainedModel, graphs: CudaGraphs, new_tokens: int, eos: list[int]) -> Completions:
    rollout = TransformersRollout(0, eos, cuda_graphs=graphs)
    return rollout.generate(model, RolloutRequest(PROMPTS, 4, Sampling(max_new_tokens=new_tokens), [1, 2, 3]))


@pytest.mark.parametrize("build", [qwen2, llama])
@pytest.mark.parametrize("block", [4, 256])
def test_tokens_equal_those_of_the_growing_cache(
    build: type[PreTrainedModel], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end early and leave the batch; with blocks of 4 columns the part that is read grows in the middle."""
    monkeypatch.setattr(static_cache, "BLOCK", block)
    model = build()
    growing, static = (sampled(model, graphs, 24, [3, 4, 6]) for graphs in ("off", "on"))
    lengths = growing.completion_mask.sum(1)
    assert len(lengths.unique()) > 3
    assert torch.equal(static.completion_ids, growing.completion_ids)
    assert torch.equal(static.completion_mask, growing.completion_mask)
    assert torch.equal(static.truncated, growing.truncated)
    torch.testing.assert_close(static.sampler_logps, growing.sampler_logps, rtol=0, atol=2e-5)


def test_attention_is_put_back() -> None:
    model = qwen2()
    sampled(model, "on", 4, [])
    assert model.config._attn_implementation == "sdpa"


def test_models_with_other_attention_keep_their_own() -> None:
    """Sliding windows and soft caps are not what the static attention computes."""
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=4)
    model = Gemma2ForCausalLM(config).eval()
    assert torch.equal(
        sampled(model, "on", 6, []).completion_ids,
        sampled(model, "off", 6, []).completion_ids,
    )


def test_columns_hide_padding_and_what_is_not_written() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    columns = Columns(mask, new_tokens=3, dtype=torch.float32)
    assert columns.capacity == static_cache.BLOCK
    columns.advance(0)
    columns.advance(1)
    read = columns.bias[:, 0, 0] == 0
    assert int(columns.index) == 3
    assert read[0, :5].tolist() == [False, True, True, True, False]
    assert read[1, :5].tolist() == [True, True, True, True, False]
    columns.select(torch.tensor([1]))
    assert columns.bias.shape[0] == 1 and bool(columns.bias[0, 0, 0, 0] == 0)
