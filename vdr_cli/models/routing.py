"""Load balance of a mixture of experts: what its routers did in a forward, as transformers' auxiliary loss."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import backbone, text_config, unwrapped


class Routers:
    """The router logits of a model's forwards, kept until `take_balance`.

    Raises ConfigError when the model has no routers, or does not return their logits.
    """

    def __init__(self, causal_lm: nn.Module) -> None:
        model: Any = unwrapped(causal_lm)
        # Mixtral's and those written after it; DeepSeek's sigmoid routers balance themselves and have none.
        self._loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if self._loss is None or not hasattr(text_config(model), "output_router_logits"):
            raise ConfigError(
                f"grpo.router_aux_loss_coef: {type(model).__name__} has no routers with a load-balancing loss; "
                "set it to 0"
            )
        self._experts, self._top_k = int(model.num_experts), int(model.num_experts_per_tok)
        self._calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
        trunk = backbone(causal_lm)
        trunk.register_forward_pre_hook(_with_router_logits, with_kwargs=True)
        trunk.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, trunk: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        ids = kwargs["input_ids"]
        read = kwargs["attention_mask"][:, -ids.shape[1] :]  # without the columns of a cache
        self._calls.append((outputs.router_logits, read.flatten()))

    def take_balance(self) -> Tensor:
        """() E · Σ_e f_e P_e over the tokens of the forwards since the last call, with gradient through P; float32.

        f_e: share of the tokens that go to expert e, P_e: its mean probability, both over all layers (Switch
        Transformers, Fedus et al. 2021, eq. 4-6). Padding does not count. Its optimum is the number of experts per
        token.
        """
        calls, self._calls = self._calls, []
        layers = zip(*(logits for logits, _ in calls), strict=True)
        together = tuple(torch.cat([part.flatten(0, -2) for part in parts]) for parts in layers)
        mask = torch.cat([mask for _, mask in calls])[None]
        return self._loss(together, self._experts, self._top_k, mask)  # type: ignore[no-any-return,misc]


def _with_router_logits(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"output_router_logits": True}
