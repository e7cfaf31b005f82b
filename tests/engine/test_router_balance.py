"""The load-balancing loss through the engine: ZeRO-3 gives the update of whole parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import saved_model
from vdr_cli.errors import ConfigError


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"num_local_experts": 4, "sliding_window": None}
    return saved_model(tmp_path_factory.mktemp("experts"), "mixtral", 0.3, **shape, **more)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["prompts read once", "checkpointing"])
def test_sharded_and_whole_parameters_move_alike(build, completions, experts_path: Path, checkpointing: bool) -> None:
    def moved(stage: int) -> dict[str, Tensor]:
        engine = build(
            stage,
            0.0,
            model={"name": str(experts_path), "gradient_checkpointing": checkpointing},
            grpo={"router_aux_loss_coef": 0.1},
            train={"adam_epsilon": 1.0},
        )
        tokens = (
            completions.prompt_ids,
            completions.prompt_mask,
            completions.completion_ids,
            completions.completion_mask,
        )
        logps, _ = engine.forward(*tokens, 1.0)
        balance = engine.router_balance()
        assert balance is not None and float(balance.detach()) > 2.0
        engine.backward(balance - 0.01 * logps.sum(), last=True)
        engine.step(1.0)
        with engine.gathered_model() as model:
            return {name: p.clone() for name, p in model.named_parameters()}

    sharded, whole = moved(3), moved(1)
    for name, weight in whole.items():
        assert torch.allclose(sharded[name], weight, rtol=1e-5, atol=1e-6), name


def test_a_dense_model_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"grpo.router_aux_loss_coef: .* set it to 0"):
        build(3, grpo={"router_aux_loss_coef": 0.1})
