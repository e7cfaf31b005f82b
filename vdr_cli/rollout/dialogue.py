"""Turns of the rows of one decode batch.

A reply is not prefilled: its tokens take the places of sampled ones in the next decode steps. Every token goes through
the model once, in the row's own key-value cache, while the other rows go on sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_cli.samples import Conversation, Turn

SAMPLED = -1
"""Entry of `Dialogue.said` where the policy samples."""


class Dialogue:
    """An environment's words to each row, and the beginning of each row's turn."""

    def __init__(self, conversation: Conversation, at: Tensor, T: int, turn_tokens: int, device: torch.device) -> None:
        """at: (R,) row of the call that each row of the batch is. T: most tokens of a completion."""
        self.conversation, self.at, self.T, self.turn_tokens = conversation, at.tolist(), T, turn_tokens
        self.said = torch.full((len(at), T), SAMPLED, dtype=torch.int64, device=device)
        self.begun = torch.zeros(len(at), dtype=torch.int64, device=device)
        self.truncated = torch.zeros(len(at), dtype=torch.bool, device=device)
        """Rows whose episode a limit ended."""

    def instead(self, rows: Tensor, t: int, token: Tensor, logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(r,) tokens and log-probabilities of column t, the environment's in their places; (r,) True where sampled.

        The log-probability of an environment's token is 0.
        """
        said = self.said[rows, t]
        sampled = said == SAMPLED
        return torch.where(sampled, token, said), logp.masked_fill(~sampled, 0.0), sampled

    def after(self, rows: Tensor, t: int, tokens: Tensor, speaking: Tensor, ended: Tensor) -> Tensor:
        """Ask for replies to the turns that end with column t. (r,) True where the episode is over.

        tokens: (R, T). speaking: (r,) True where the row has just sampled. ended: (r,) True where that token can end a
        turn.
        """
        cut = (t + 1 - self.begun[rows] >= self.turn_tokens) | (t + 1 == self.T)
        over = torch.zeros_like(ended)
        finished = (speaking & (ended | cut)).nonzero()[:, 0].tolist()
        if not finished:
            return over
        turns = [self._turn(int(rows[index]), t, tokens, bool(ended[index])) for index in finished]
        for index, turn, reply in zip(finished, turns, self.conversation.replies(turns), strict=True):
            row = rows[index]
            if reply.ids is None or not turn.ended:
                over[index] = True
                self.truncated[row] = reply.truncated or not turn.ended
                continue
            end = t + 1 + len(reply.ids)
            self.said[row, t + 1 : end] = torch.tensor(reply.ids, dtype=torch.int64, device=self.said.device)
            self.begun[row] = end
        return over

    def _turn(self, row: int, t: int, tokens: Tensor, ended: bool) -> Turn:
        return Turn(self.at[row], tokens[row, int(self.begun[row]) : t + 1].tolist(), ended, self.T - t - 1)
