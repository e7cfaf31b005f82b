"""Running a part of a model: what comes out, and that every module is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vdr_cli.disagreement.layer_calls import (
    mlp_at_one_column,
    run_once_for_all_members,
    run_up_to,
    starting_from,
)
from vdr_cli.disagreement.lower_states import LowerStates
from vdr_cli.models import anatomy

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


class Doubling(nn.Module):
    """A block that returns a tuple and notes the rows that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, hidden_states: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, str]:
        self.rows.append(len(hidden_states))
        return 2 * hidden_states if scale is None else 2 * hidden_states * scale, "extra"


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2"])
@torch.no_grad()
def test_a_forward_cut_in_two_is_the_whole_forward(kind: str, tiny_model: Callable) -> None:
    """Up to layer 0, then from layer 1 on, for twice the rows."""
    model = tiny_model(kind)
    trunk, layers = anatomy.backbone(model), anatomy.decoder_layers(model)
    whole, calls = trunk(input_ids=IDS)[0], []
    top = layers[-1].register_forward_hook(lambda *_: calls.append(1))
    states = run_up_to(layers, 0, lambda: trunk(input_ids=IDS))
    assert states.layer == 1 and not calls, "the layers above do not run"
    with starting_from(layers, states, 4):
        found = trunk(input_ids=IDS.repeat(2, 1))[0]
    top.remove()
    torch.testing.assert_close(found, whole.repeat(2, 1, 1))
    assert torch.equal(trunk(input_ids=IDS)[0], whole)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers)


def test_a_layer_that_never_runs_is_a_bug_with_a_name(tiny_model: Callable) -> None:
    layers = anatomy.decoder_layers(tiny_model())
    with pytest.raises(RuntimeError, match=r"Layer 1 did not run"):
        run_up_to(layers, 1, lambda: None)
    assert not layers[1]._forward_hooks


def test_extra_outputs_are_handed_on() -> None:
    layers = [Doubling()]
    hidden = torch.ones(1, 2, 3)
    with starting_from(layers, LowerStates(hidden, 2, 1), 2):
        output = layers[0](torch.zeros(2, 2, 3))
    assert torch.equal(output[0], hidden.repeat(2, 1, 1)) and output[1:] == (None, None)
    with starting_from(layers, LowerStates(hidden, None, 1), 1):
        assert torch.equal(layers[0](torch.zeros(1, 2, 3)), hidden)
    assert layers[0](hidden)[1] == "extra"


def test_an_mlp_at_one_column_gives_0_elsewhere() -> None:
    mlp, seen = nn.Linear(3, 3), []
    hidden, column = torch.randn(2, 4, 3), torch.tensor([1, 3])
    mlp.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape))
    with torch.no_grad(), mlp_at_one_column(mlp, column):
        found = mlp(hidden)
    expected = torch.zeros(2, 4, 3)
    rows = torch.arange(2)
    expected[rows, column] = mlp(hidden)[rows, column].detach()
    torch.testing.assert_close(found, expected)
    assert seen[0] == (2, 1, 3), "one column goes through it"


def test_a_block_runs_once_for_all_members() -> None:
    """Tensors of as many rows are cut, alone and in tuples; others, and the extra outputs, stay."""
    block, hidden = Doubling(), torch.arange(6.0).view(6, 1, 1)
    with run_once_for_all_members(block, 3):
        output, extra = block(hidden_states=hidden, scale=torch.full((6, 1, 1), 10.0))
        assert torch.equal(block(hidden)[0], 2 * hidden[:2].repeat(3, 1, 1))
    assert torch.equal(output, 20 * hidden[:2].repeat(3, 1, 1)) and extra == "extra"
    block(hidden)
    assert block.rows == [2, 2, 6] and "forward" not in vars(block)


def test_a_forward_set_on_the_instance_comes_back() -> None:
    block = Doubling()
    own = block.forward = lambda hidden: hidden  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), run_once_for_all_members(block, 2):
        raise ZeroDivisionError
    assert vars(block)["forward"] is own
