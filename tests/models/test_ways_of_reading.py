"""Every architecture that a way of reading lets in, against each completion read with its prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.disagreement.conftest import architecture, ragged, tiny_model
from vdr_cli.models.packed_rows import can_read_packed
from vdr_cli.models.policy import Policy
from vdr_cli.models.prompt_tree import can_read_trees

__all__ = ["architecture", "ragged", "tiny_model"]


@pytest.mark.parametrize(("way", "lets_in"), [("as_trees", can_read_trees), ("packed", can_read_packed)])
def test_every_model_that_is_let_in_is_read_right(
    way: str, lets_in: Callable[[nn.Module], bool], architecture: str, tiny_model: Callable, ragged: Callable
) -> None:
    model = tiny_model(architecture)
    if not lets_in(model):
        pytest.skip(f"not read {way.replace('_', ' ')}")
    c = ragged(groups=3)

    def read(**how: Any) -> Any:
        policy = Policy(model, share_prompts=False, **how)
        return policy(c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask, 1.0)

    with torch.no_grad():
        torch.testing.assert_close(read(**{way: True}), read(), rtol=1e-4, atol=1e-5)
