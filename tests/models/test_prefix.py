"""The prompt's keys and values: kept once, handed out in front of every completion's own."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vdr_cli.models.prefix import PrefixCache, RepeatedPrompts, layers_stand_alone, shares_prompts

HEADS, WIDTH, PROMPT, OWN = 2, 4, 3, 2


def filled(prompts: int) -> PrefixCache:
    cache = PrefixCache(2, RepeatedPrompts())
    for layer in range(2):
        keys = torch.randn(prompts, HEADS, PROMPT, WIDTH)
        cache.update(keys, -keys, layer)
    cache.prompts.width = PROMPT
    return cache


def test_a_completion_sees_its_prompt_and_itself() -> None:
    cache = filled(prompts=2)
    own = torch.randn(6, HEADS, OWN, WIDTH)  # three completions of each prompt
    for layer in range(2):
        prompt = cache.layers[layer].keys
        keys, values = cache.update(own, 2 * own, layer)
        assert keys.shape == (6, HEADS, PROMPT + OWN, WIDTH)
        for row in range(6):
            assert torch.equal(keys[row, :, :PROMPT], prompt[row // 3])
            assert torch.equal(keys[row, :, PROMPT:], own[row])
            assert torch.equal(values[row, :, :PROMPT], -prompt[row // 3])
            assert torch.equal(values[row, :, PROMPT:], 2 * own[row])


def test_the_prompt_stays_as_it_was_written() -> None:
    cache = filled(prompts=1)
    before = cache.layers[0].keys.clone()
    for _ in range(2):
        cache.update(torch.randn(4, HEADS, OWN, WIDTH), torch.randn(4, HEADS, OWN, WIDTH), 0)
    assert torch.equal(cache.layers[0].keys, before)
    assert cache.get_seq_length() == PROMPT


def test_keys_leave_with_their_cache() -> None:
    """Without the garbage collector, whose time nobody knows: a member's keys are as large as the batch."""
    gc.collect()
    gc.disable()
    try:
        cache = filled(prompts=1)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


def model(**config: Any) -> nn.Module:
    found = nn.Module()
    found.config = SimpleNamespace(**config)
    return found


@pytest.mark.parametrize(
    ("config", "shared"),
    [
        ({}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"layers_block_type": ["mamba", "attention"]}, False),
        ({"num_kv_shared_layers": 2}, False),
    ],
)
def test_models_that_remember_more_than_keys_read_the_prompt_themselves(config: dict[str, Any], shared: bool) -> None:
    assert shares_prompts(model(**config)) is shared
    assert layers_stand_alone(model(**config)) == ("num_kv_shared_layers" not in config)
