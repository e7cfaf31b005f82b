"""DeepSpeed's import, and two changes to it: a linear map without a gradient, and parameters that are not printed."""

from __future__ import annotations

from importlib import util

import pytest
import torch
from torch import nn

from vdr_cli.engine import deepspeed_import
from vdr_cli.errors import ConfigError

CASES = [
    pytest.param(shape, with_bias, id=f"{len(shape)}d{'_bias' * with_bias}")
    for shape in ((7, 48), (5, 3, 48))
    for with_bias in (True, False)
]


@pytest.fixture
def with_gradient(monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed's linear map, in torch's place."""
    function = deepspeed_import.module("runtime.zero.linear").zero3_linear_wrap
    monkeypatch.setattr(nn.functional, "linear", function)
    deepspeed_import.call_linear_directly_without_gradient()
    assert nn.functional.linear is not function
    return function


@pytest.mark.parametrize(("shape", "with_bias"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_deepspeeds_to_the_bit(with_gradient, shape, with_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    layer = nn.Linear(48, 33, bias=with_bias, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), with_gradient(x, layer.weight, layer.bias))


def test_no_function_is_called_without_a_gradient_and_deepspeeds_with_one(with_gradient) -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    assert not [event for event in profile.events() if event.name.startswith("LinearFunction")]
    output = layer(x)
    assert type(output.grad_fn).__name__ == "LinearFunctionForZeroStage3Backward"
    output.sum().backward()
    assert torch.equal(layer.weight.grad, x.sum(0).expand(3, 4))


def test_torchs_own_linear_map_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)
    deepspeed_import.call_linear_directly_without_gradient()
    assert nn.functional.linear is torch._C._nn.linear


def test_parameters_print_their_numbers_again_afterwards() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with deepspeed_import.parameters_unprinted():
        assert "1." not in repr(parameter)
    assert "1." in repr(parameter)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DEEPSPEED_TIMEOUT", "1h", "DEEPSPEED_TIMEOUT is '1h', not a whole number"),
        ("DS_ACCELERATOR", "cuda", "DS_ACCELERATOR is cuda, but torch finds no GPU; unset it"),
    ],
)
def test_a_variable_that_deepspeed_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = util.spec_from_file_location("imported_again", deepspeed_import.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ConfigError, match=f"^the environment variable {says}"):
        spec.loader.exec_module(util.module_from_spec(spec))
