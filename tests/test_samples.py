"""The helpers beside the shared types."""

from __future__ import annotations

import torch

from vdr_cli.samples import last_tokens


def test_the_last_valid_tokens() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert last_tokens(mask, 1).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert torch.equal(last_tokens(mask, None), mask)
