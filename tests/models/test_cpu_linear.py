"""Matrix products by oneDNN are torch's, gradients included; packed weights last as long as their block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdr_cli.models import cpu_linear
from vdr_cli.models.cpu_linear import LEAST_BYTES, SLAB, Linear, packed_linears, product, product_into, with_cpu_linears


class Small(nn.Module):
    def __init__(self, width: int = 96, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 160, device=device, dtype=dtype)
        self.head = nn.Linear(160, 40, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


SHAPES = [((1,), 8, 5), ((7,), 96, 160), ((3, 11), 64, 33), ((2, 3, 4), 16, 16), ((300,), 128, 512)]


def drawn(rows: tuple[int, ...], width: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(outputs)
    return torch.randn(*rows, width), torch.randn(outputs, width), torch.randn(outputs)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "LEAST_WORK", 1)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_and_its_gradients_are_those_of_float64(shape: tuple[Any, int, int], with_bias: bool) -> None:
    x, weight, bias = drawn(*shape)
    upstream = torch.randn(*shape[0], shape[2])
    found, expected = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, expected)):
        leaves = [each.to(dtype).requires_grad_() for each in (x, weight, bias)]
        leaves = leaves if with_bias else leaves[:2]
        y = (product if dtype is torch.float32 else nn.functional.linear)(*leaves)
        results += [y, *torch.autograd.grad(y, leaves, upstream.to(dtype))]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.usefixtures("any_size")
def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    x, weight, bias = drawn((5,), 6, 7)
    frozen = product(x.requires_grad_(), weight, bias)
    (of_x,) = torch.autograd.grad(frozen.sum(), [x])
    assert torch.allclose(of_x, weight.sum(0).expand(5, 6), atol=1e-5)
    of_weight = torch.autograd.grad(product(x.detach(), weight.requires_grad_(), None).sum(), [weight])[0]
    assert torch.allclose(of_weight, x.detach().sum(0).expand(7, 6), atol=1e-5)
    with torch.no_grad():
        assert not product(x, weight, bias).requires_grad


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("outputs", [5, SLAB, SLAB + 3, 3 * SLAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_into_a_part_of_a_buffer(outputs: int, dtype: torch.dtype) -> None:
    x, weight, _ = drawn((9,), 12, outputs)
    buffer = torch.full((20, outputs), 7.0, dtype=dtype)
    product_into(buffer[:9], x.to(dtype), weight.to(dtype))
    assert torch.allclose(buffer[:9].double(), x.double() @ weight.double().T, atol=1e-5)
    assert bool((buffer[9:] == 7.0).all())


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats_and_nothing_at_all_are_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (each.to(dtype) for each in drawn((4,), 8, 6))
    assert torch.equal(product(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert product(torch.empty(0, 8), torch.empty(6, 8)).shape == (0, 6)


def test_small_products_are_torchs_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn((7,), 96, 160)
    monkeypatch.setattr(cpu_linear, "_onednn", None)
    assert torch.equal(product(x, weight, bias), nn.functional.linear(x, weight, bias))
    monkeypatch.setattr(cpu_linear, "LEAST_WORK", 2 * 7 * 96 * 160)
    with pytest.raises(TypeError):
        product(x, weight, bias)


@pytest.mark.usefixtures("any_size")
def test_a_model_keeps_its_parameters_and_its_copies_work() -> None:
    plain, x = Small(), torch.randn(3, 96)
    expected, names = plain(x), list(plain.state_dict())
    model = with_cpu_linears(plain)
    assert model is plain and list(model.state_dict()) == names
    assert all(type(each) is Linear for each in (plain.inner, plain.head))
    twin = copy.deepcopy(model)
    assert torch.allclose(model(x), expected, atol=1e-6) and torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.head.weight.zero_()
    assert not bool(twin(x).any()) and torch.allclose(model(x), expected, atol=1e-6)


def is_packed(model: nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "LEAST_BYTES", 0)


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
