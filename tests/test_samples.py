"""The helpers beside the shared types."""

from __future__ import annotations

import torch

from vdr_cli.samples import Completions, last_tokens


def test_the_last_valid_tokens() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert last_tokens(mask, 1).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert torch.equal(last_tokens(mask, None), mask)


def test_token_ids_without_padding() -> None:
    """Rows of every length; a valid token may have the padding's id."""
    prompts, prompt_mask = torch.tensor([[0, 0, 5], [0, 6, 7]]), torch.tensor([[0, 1, 1], [0, 0, 0]]).bool()
    ids, mask = torch.tensor([[8, 0, 0], [9, 8, 0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    completions = Completions(prompts, prompt_mask, ids, mask, torch.zeros(2, 3), torch.zeros(2).bool())
    assert completions.prompt_token_ids() == [[0, 5], []]
    assert completions.completion_token_ids() == [[8, 0], []]
