"""A trial before a run, on a few tokens: members can read the model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.errors import ConfigError, VdrError
from vdr_cli.models import anatomy
from vdr_cli.samples import Completions

WIDTHS = (7, 3)
"""Tokens of the prompt and of the completions in the trial; one prompt is shorter."""


@torch.no_grad()
def check_members(model: nn.Module, spec: EnsembleSpec) -> None:
    """Raise ConfigError unless members that drop nothing read completions as the model itself reads plain sequences.

    It finds positions that count padding, layers that remember more of a prompt than keys and values, hidden
    states of another shape than (rows, tokens, D), branches that are not where their names say.
    """
    nothing = replace(spec, members=2, dropout=1e-12, scope="full", last_k=None)
    name = type(anatomy.unwrapped(model)).__name__
    way_out = "this architecture is not supported there: set disagreement.mode to none"
    batch = _trial(anatomy.output_head(model).weight)
    try:
        request = MeasureRequest(batch, 2, measures={"member_logps"})
        found = EnsembleReader(nothing).measure(model, request).member_logps
        expected = torch.stack([_plain(model, batch, row) for row in range(len(batch))])
    except VdrError:
        raise
    except Exception as error:  # whatever an unknown architecture trips over
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"model {name}: members cannot read it ({reason or type(error).__name__}); {way_out}"
        ) from error
    assert found is not None
    tolerance = 1e-3 if anatomy.output_head(model).weight.dtype == torch.float32 else 5e-2
    off = (found - expected).abs().mean(-1).amax()  # of the worst row: a wrong position puts all its tokens off
    if off > tolerance * expected.abs().mean():
        raise ConfigError(
            f"model {name}: members that drop nothing do not read a padded prompt as the model reads it alone "
            f"(log-probabilities differ by {float(off):.2g}); {way_out}"
        )


def _trial(like: Tensor) -> Completions:
    """Two groups of two completions, one prompt shorter than the other."""
    device, vocabulary = like.device, like.shape[0]
    ids = 1 + torch.arange(4 * sum(WIDTHS), device=device).view(4, -1) * 5 % (vocabulary - 1)
    prompts, answers = ids[[0, 0, 1, 1], : WIDTHS[0]], ids[:, WIDTHS[0] :]
    valid = torch.ones_like(prompts, dtype=torch.bool)
    valid[2:, : WIDTHS[0] // 2] = False
    rows = torch.zeros(4, dtype=torch.bool, device=device)
    whole = torch.ones_like(answers, dtype=torch.bool)
    return Completions(prompts, valid, answers, whole, torch.zeros(answers.shape, device=device), rows)


def _plain(model: nn.Module, batch: Completions, row: int) -> Tensor:
    """(T,) log-probabilities of one completion, read alone and without padding."""
    prompt, answer = batch.prompt_ids[row][batch.prompt_mask[row]], batch.completion_ids[row]
    logits = anatomy.unwrapped(model)(input_ids=torch.cat([prompt, answer])[None])[0][0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(-1, answer[:, None]).squeeze(-1)
