"""Decoder layers as ZeRO-3's units: each is fetched whole, and its gradient is reduced once in a backward.

DeepSpeed reduces a leaf's gradients each time a backward has gone through the leaf. Where completions share their
prompts a layer is called twice in one graph, and autograd hands its parameters their gradient, the sum of both calls,
only after the second time. The first time DeepSpeed would reduce zeros: as much traffic again for nothing, and an
AssertionError when the zeros are still in the bucket as the gradient comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vdr_cli.engine.deepspeed_import import deepspeed


def fetch_whole(causal_lm: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Make leaves of these layers. Call before the DeepSpeed engine is made."""
    deepspeed.utils.set_z3_leaf_modules(causal_lm, list({type(layer) for layer in layers}))


def reduce_once(policy: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Have each layer's gradient reduced when its last call has been gone back through.

    Call after the DeepSpeed engine is made: what it left behind is cleared after its own hooks.
    """
    calls = [_Calls(layer) for layer in layers]

    def forget(*_: object) -> None:
        for each in calls:
            each.ahead = 0

    policy.register_forward_pre_hook(forget)


class _Calls:
    """A layer's calls in the graph that is being built, or those that its backward has yet to reach."""

    def __init__(self, layer: nn.Module) -> None:
        self.ahead = 0
        self.parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        layer.register_forward_pre_hook(self.called)
        layer.register_full_backward_pre_hook(self.reached)
        layer.register_full_backward_hook(self.passed)

    def called(self, *_: object) -> None:
        self.ahead += 1

    def reached(self, *_: object) -> None:
        self.ahead -= 1
        for parameter in self.parameters:
            parameter.ds_grad_is_ready = self.ahead == 0  # type: ignore[attr-defined]

    def passed(self, *_: object) -> None:
        if self.ahead:
            for parameter in self.parameters:
                parameter.grad = None  # DeepSpeed's zeros
