"""Packed weights: the same products, for as long as the block lasts, where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vdr_cli.rollout import packed
from vdr_cli.rollout.packed import LEAST_BYTES, packed_linears


class Small(nn.Module):
    def __init__(self, width: int = 96, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 160, device=device, dtype=dtype)
        self.head = nn.Linear(160, 40, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


def is_packed(model: nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)


@torch.no_grad()
@pytest.mark.usefixtures("always")
def test_products_are_the_plain_ones_and_a_row_has_the_same_bits_beside_any_others() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(300, 96)
    expected = model(x)
    with packed_linears(model):
        assert is_packed(model)
        whole = model(x)
        for rows in (1, 2, 7, 16, 64):
            assert torch.equal(model(x[:rows, None])[:, 0], whole[:rows])
    assert torch.allclose(whole, expected, atol=1e-6)
    assert torch.equal(model(x), expected)


@torch.no_grad()
@pytest.mark.usefixtures("always")
def test_changed_weights_are_packed_anew_and_an_error_leaves_the_model_as_it_was() -> None:
    model, x = Small(), torch.randn(3, 96)
    with packed_linears(model):
        model(x)
    model.inner.weight.mul_(2.0)
    expected = model(x)
    with pytest.raises(KeyboardInterrupt), packed_linears(model):
        assert torch.allclose(model(x), expected, atol=1e-6)
        raise KeyboardInterrupt
    assert not is_packed(model)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("model", [Small(dtype=torch.bfloat16), Small(device="meta"), nn.Sequential()])
def test_other_formats_and_layers_that_are_not_there_stay(model: nn.Module) -> None:
    with packed_linears(model):
        assert not is_packed(model)


def test_small_models_stay() -> None:
    with packed_linears(model := Small()):
        assert not is_packed(model)
    large = Small(width=LEAST_BYTES // 4 // 160)
    with packed_linears(large):
        assert is_packed(large)
