"""The trial before a run: models that members read right pass, the others are refused in one line."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vdr_cli.disagreement import reading
from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.errors import ConfigError

SPEC = EnsembleSpec(members=4, dropout=0.2, seed=5)


def test_every_architecture_that_is_read_right_passes(architecture: str, tiny_model: Callable) -> None:
    if architecture == "recurrent_gemma":
        pytest.skip("its convolution reads padding: right only where the pad token's embedding is 0")
    check_members(tiny_model(architecture), SPEC)
    check_members(copy.deepcopy(tiny_model(architecture)).bfloat16(), replace(SPEC, scope="last_k", last_k=1))


def test_members_with_masks_per_token_pass(tiny_model: Callable) -> None:
    check_members(tiny_model(), replace(SPEC, mask_sharing="token"))


@pytest.mark.parametrize("kind", ["bart", "pegasus", "recurrent_gemma", "inkling_text", "deepseek_v4", "rwkv"])
def test_what_members_would_read_wrong_is_refused(kind: str, tiny_model: Callable) -> None:
    """Positions that count padding; memories that are no keys and values; other shapes: nothing of it silently."""
    with pytest.raises(ConfigError, match=r"model .*ForCausalLM: members .*disagreement\.mode to none") as refused:
        check_members(tiny_model(kind), SPEC)
    assert "\n" not in str(refused.value)


def test_a_prompt_that_cannot_be_shared_is_noticed(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if recurrent layers had gone unnoticed."""
    monkeypatch.setattr(reading, "shares_prompts", lambda model: True)
    with pytest.raises(ConfigError, match=r"model Lfm2ForCausalLM: members cannot read it"):
        check_members(tiny_model("lfm2"), SPEC)


def test_the_model_is_left_as_found(tiny_model: Callable) -> None:
    model, ids = tiny_model(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        check_members(model, SPEC)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not model.training
