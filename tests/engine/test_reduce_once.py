"""A layer's gradient is reduced after backward has gone through its last call. Without DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdr_cli.engine.leaves import reduce_once


class Policy(nn.Module):
    """A layer that is called `calls` times in one graph."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 3), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = torch.tanh(self.layer(x))
        return x.sum()


def ready(policy: Policy) -> list[bool]:
    """The layer's mark at each backward of its calls, in order."""
    said: list[bool] = []
    reduce_once(policy, [policy.layer])
    policy.layer.register_full_backward_pre_hook(
        lambda *_: said.append(policy.layer.weight.ds_grad_is_ready)  # type: ignore[union-attr,arg-type]
    )
    return said


def test_only_the_last_call_is_ready() -> None:
    for calls in (1, 2, 3):
        policy = Policy(calls)
        said = ready(policy)
        policy(torch.ones(2, 3, requires_grad=True)).backward()
        assert said == [False] * (calls - 1) + [True]


def test_the_gradient_is_that_of_all_calls() -> None:
    torch.manual_seed(0)
    watched, plain = Policy(2), Policy(2)
    plain.load_state_dict(watched.state_dict())
    reduce_once(watched, [watched.layer])
    for policy in (watched, plain):
        policy(torch.ones(2, 3, requires_grad=True)).backward()
    torch.testing.assert_close(watched.layer.weight.grad, plain.layer.weight.grad)


def test_a_forward_without_a_backward_is_forgotten() -> None:
    policy = Policy(2)
    said = ready(policy)
    policy(torch.ones(2, 3))  # log-probabilities that no loss needs
    policy(torch.ones(2, 3, requires_grad=True)).backward()
    assert said == [False, True]


def test_frozen_layers_are_left_alone() -> None:
    policy = Policy(1)
    policy.layer.requires_grad_(False)
    reduce_once(policy, [policy.layer])
    policy(torch.ones(2, 3, requires_grad=True)).backward()
    assert not hasattr(policy.layer.weight, "ds_grad_is_ready")
