"""The decode cache: groups with unequal numbers of rows, rows that leave, and what is put back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import cache_arguments
from vdr_cli.rollout import cache as decode_cache
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.cache import DecodeCache, ExpandedLayer, Grouping, SharedPromptLayer, without_holes
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling, pad_prompts

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def tiny() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=8))
@example([0, 0, 1, 1, 2, 2])  # in order
@example([1, 0])  # out of order, and each in the other's place
@example([2, 1, 0])
@example([1, 1])  # prompts without a row
def test_rows_go_to_their_prompt_and_back(owner: list[int]) -> None:
    grouping = Grouping(torch.tensor(owner), prompts=3)
    x = torch.randn(len(owner), 2, 4, 8)
    grouped = grouping.by_prompt(x)
    assert torch.equal(grouping.by_row(grouped), x)
    slots = grouped.view(3, 2, grouping.size, 4, 8).transpose(1, 2)  # (N, c, heads, q, E)
    for row, prompt in enumerate(owner):
        assert any(torch.equal(slot, x[row]) for slot in slots[prompt])


def test_without_holes_keeps_the_others_and_moves_only_into_holes() -> None:
    done = torch.tensor([False, True, False, True, False, False])
    order = without_holes(done)
    assert sorted(order.tolist()) == [0, 2, 4, 5]
    assert order[0] == 0 and order[2] == 2
    assert without_holes(torch.tensor([False, False])).tolist() == [0, 1]


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
def test_decoding_equals_a_full_forward_while_rows_leave(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not share:
        monkeypatch.setattr(decode_cache, "_can_share", lambda model, cache: False)
    model = tiny()
    ids, mask = pad_prompts(PROMPTS, 0)
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    inner = DynamicCache(config=model.config)
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, **cache_arguments(model, inner))
    cache = DecodeCache(model, inner, owner, mask, new_tokens=4)
    assert isinstance(inner.layers[0], SharedPromptLayer if share else ExpandedLayer)
    tokens = torch.randint(3, 40, (9, 4))
    rows = torch.arange(9)
    leave = {1: [False, True, False, False, True, True, False, False, False], 2: [True] + [False] * 5}
    for t in range(4):
        if t in leave:
            keep = without_holes(torch.tensor(leave[t]))
            cache.select(keep)
            rows = rows[keep]
        seen = torch.nn.functional.pad(mask[owner[rows]], (0, t + 1), value=True)
        with cache.attention():
            logits = model(
                input_ids=tokens[rows, t : t + 1],
                position_ids=positions[owner[rows], -1:] + 1 + t,
                attention_mask=None if share else seen.long(),
                **cache_arguments(model, inner),
            ).logits[:, -1]
        assert inner.get_seq_length() == 5 + t + 1
        for row, got in zip(rows.tolist(), logits, strict=True):
            whole = torch.tensor([PROMPTS[owner[row]] + tokens[row, : t + 1].tolist()])
            assert torch.allclose(got, model(input_ids=whole).logits[0, -1], atol=1e-5)


def test_shared_and_expanded_prompts_give_the_same_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = tiny(), Sampling(max_new_tokens=20, temperature=1.0)
    rollout = TransformersRollout(0, [1, 2, 3])
    shared = rollout.generate(model, RolloutRequest(PROMPTS, 8, sampling, [1, 2, 3]))
    monkeypatch.setattr(decode_cache, "_can_share", lambda model, cache: False)
    expanded = rollout.generate(model, RolloutRequest(PROMPTS, 8, sampling, [1, 2, 3]))
    assert torch.equal(shared.completion_ids, expanded.completion_ids)
    assert torch.allclose(shared.sampler_logps, expanded.sampler_logps, atol=1e-5)
    assert shared.completion_mask.sum(1).unique().numel() > 3  # rows did leave at different times


def test_a_caches_memory_is_free_when_a_batch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector, which comes after dozens of batches."""
    layers: list[weakref.ref[SharedPromptLayer]] = []
    made = SharedPromptLayer.__init__
    monkeypatch.setattr(
        SharedPromptLayer, "__init__", lambda self, *given: (layers.append(weakref.ref(self)), made(self, *given))[1]
    )
    gc.disable()
    try:
        TransformersRollout(0, []).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(max_new_tokens=3), [1, 2, 3]))
        assert len(layers) == 2 and [layer() for layer in layers] == [None, None]
    finally:
        gc.enable()


def test_the_models_own_attention_is_put_back() -> None:
    model = tiny()
    before = model.config._attn_implementation
    TransformersRollout(0, [1]).generate(model, RolloutRequest(PROMPTS, 2, Sampling(3), [1, 2, 3]))
    assert model.config._attn_implementation == before
    ids, mask = pad_prompts(PROMPTS, 0)
    inner = DynamicCache(config=model.config)
    model(input_ids=ids, **cache_arguments(model, inner))
    cache = DecodeCache(model, inner, torch.tensor([0, 1, 2]), mask, 2)
    with pytest.raises(KeyboardInterrupt), cache.attention():
        assert model.config._attn_implementation != before
        raise KeyboardInterrupt
    assert model.config._attn_implementation == before


SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "layer_types": ["full_attention", "full_attention"],
}
SINKS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "needs"),
    [
        (Gemma2Config(**SMALL), "Gemma2Attention needs softcap"),
        (GptOssConfig(**SMALL, **SINKS), "GptOssAttention needs s_aux"),
    ],
    ids=["gemma2", "gpt_oss"],
)
def test_what_shared_prompts_do_not_compute_is_never_left_out(config: PreTrainedConfig, needs: str) -> None:
    """As they come such models run eagerly and share no prompt; were one to run under sdpa, it is refused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    greedy = TransformersRollout(0, [1]).generate(
        model, RolloutRequest(PROMPTS, 1, Sampling(2, temperature=0.0), [1, 2, 3])
    )
    whole = torch.tensor([PROMPTS[0] + greedy.completion_ids[0, :1].tolist()])
    assert model(input_ids=whole).logits[0, -1].argmax() == greedy.completion_ids[0, 1]
    ids, mask = pad_prompts(PROMPTS[:1], 0)
    inner = DynamicCache(config=config)
    model(input_ids=ids, **cache_arguments(model, inner))
    model.config._attn_implementation = "sdpa"
    cache = DecodeCache(model, inner, torch.tensor([0, 0]), mask, 2)
    refused = f"{needs}, which sampling here does not have; set rollout.backend to vllm"
    with cache.attention(), pytest.raises(ConfigError, match=refused):
        model(input_ids=torch.tensor([[7], [8]]), **cache_arguments(model, inner))
