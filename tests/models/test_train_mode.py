"""Train mode without dropout computes what eval mode does, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models.test_policy import ARCHITECTURES, DROPOUT, tiny
from vdr_cli.errors import ConfigError
from vdr_cli.models.train_mode import check_train_mode


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_known_noise_passes_and_stays(kind: str) -> None:
    model = tiny(kind, **DROPOUT.get(kind, {}))
    probabilities = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    check_train_mode(model)
    assert not any(module.training for module in model.modules())
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == probabilities
    for name, value in DROPOUT.get(kind, {}).items():
        assert getattr(model.config, name) == value


def test_noise_under_another_name_is_refused() -> None:
    class Noisy(nn.Module):
        """As code of a model's own may have it."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp, self.p = mlp, 0.5

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.mlp(x), self.p, self.training)

    torch.manual_seed(0)
    model = tiny("llama")
    model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp).eval()
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes something else in train mode"):
        check_train_mode(model)
    assert not any(module.training for module in model.modules())
