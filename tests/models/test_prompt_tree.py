"""A prompt and its completions in one row, against each completion read with its prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.disagreement.conftest import tiny_model
from tests.models.test_policy import ARCHITECTURES, batch, groups, tiny
from vdr_cli.models.policy import Policy
from vdr_cli.models.prompt_tree import can_read_trees, layout_of, pack
from vdr_cli.models.train_mode import silence_dropout

TREELESS = {"gemma2", "falcon"}
"""Windows; attention that transformers does not exchange."""

__all__ = ["tiny_model"]


def results(model: nn.Module, data: dict[str, Tensor], as_trees: bool) -> list[Tensor]:
    """Log-probabilities, entropies and the gradient of a combination of both."""
    coefficients = torch.randn(2, *data["completion_ids"].shape, generator=torch.Generator().manual_seed(2))
    model.train().zero_grad()
    logps, entropy = Policy(model, share_prompts=False, as_trees=as_trees)(**data, temperature=0.7)
    (coefficients[0] * logps + coefficients[1] * entropy).sum().backward()
    return [logps, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(plain: list[Tensor], trees: list[Tensor]) -> None:
    assert len(plain) == len(trees)
    largest = max(tensor.norm() for tensor in plain[2:])
    for one, other in zip(plain, trees, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() + 1e-7 * largest


@pytest.mark.parametrize(
    ("kind", "attention"), [*((kind, None) for kind in ARCHITECTURES), ("qwen2", "eager"), ("mixtral", "eager")]
)
def test_trees_change_nothing(kind: str, attention: str | None) -> None:
    """Unequal groups, padded prompts, an empty completion."""
    model = tiny(kind, attn_implementation=attention)
    silence_dropout(model)
    assert can_read_trees(model) == (kind not in TREELESS)
    if kind not in TREELESS:
        assert_same(results(model, groups(), False), results(model, groups(), True))


def test_trees_change_nothing_with_gradient_checkpointing() -> None:
    model = tiny("qwen2")
    plain = results(model, groups(), False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(plain, results(model, groups(), True))


def test_trees_of_one_completion_and_of_completions_of_one_token() -> None:
    model = tiny("qwen2")
    for data in (batch([5, 3, 7], [4, 6, 1]), batch([5, 3, 7], [1, 1, 1])):
        assert_same(results(model, data, False), results(model, data, True))


@pytest.mark.parametrize("kind", ["qwen2", "gpt_oss", "recurrent_gemma", "lfm2", "bloom", "cohere2"])
def test_models_that_take_no_mask_as_it_is(kind: str, tiny_model: Callable) -> None:
    """Windows (of the qwen2 here too), memories that are no keys and values, positions that are in the mask."""
    assert not can_read_trees(tiny_model(kind))


def test_each_layer_is_called_once_whatever_the_batch() -> None:
    model = tiny("qwen2")
    data = groups()
    data["completion_mask"][:] = False
    calls = []
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    Policy(model, as_trees=True)(**data, temperature=1.0)[0].sum().backward()
    assert len(calls) == len(model.model.layers)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_a_token_sees_its_prompt_and_its_own_completion() -> None:
    """Last tokens are not read; what is read lies behind the prompt without gaps."""
    mask = torch.tensor([[True, True], [True, True], [False, True]])
    ids = torch.tensor([[7, 8], [7, 8], [0, 9]])
    completions = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]])
    places = layout_of(ids, mask, torch.arange(3) < torch.tensor([2, 3, 1])[:, None])
    assert places.owner.tolist() == [0, 0, 1]
    assert places.columns.tolist() == [[1, 2, 1], [1, 3, 4], [1, 1, 1]]
    trees = pack(ids, mask, completions, places, torch.float32)
    assert trees.ids.tolist() == [[7, 8, 1, 3, 4], [0, 9, 0, 0, 0]]
    assert trees.positions[0].tolist() == [0, 1, 2, 2, 3]
    seen = (trees.mask[:, 0] == 0).long()
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert seen[1, 1].tolist() == [0, 1, 0, 0, 0]
    assert seen[1].diagonal().all()
