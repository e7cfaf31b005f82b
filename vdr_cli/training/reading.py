"""How completions are read under whole weights: log-probabilities, and the members' disagreement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdr_cli.disagreement.reader import MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.models.policy import completion_logps
from vdr_cli.samples import Completions, to_device
from vdr_cli.training.resources import Resources


def measure_disagreement(res: Resources, step: int, model: Any, completions: Completions) -> Tensor | None:
    """The measure of every completion under the members of this step; None without disagreement. Collective.

    (B, T) per token, or (B,) at the end of the sequence; nats, float32, on the CPU. Raises MachineError on every rank
    when one rank's memory cannot hold one member and completion.
    """
    if res.ensemble is None:
        return None
    cfg = res.config.disagreement
    request = MeasureRequest(
        completions,
        res.config.rollout.group_size,
        step,
        positions="last" if cfg.mode == "end_of_sequence" else "all",
        measures=(cfg.measure,),
        last_n=cfg.last_n,
        shown_rows=res.config.rollout.group_size if res.shows_tokens(step) else 0,
    )
    with res.timer.phase("disagreement"), collectives.agreed():
        statistics = res.ensemble.measure(model, request)
    return statistics.get(cfg.measure).cpu()


def read_logps(res: Resources, model: Any, completions: Completions) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) of the completions under a whole model, float32, on the CPU.

    In the update's own micro-batches, read in its own way: an unchanged policy gives the same numbers to the last bit.
    """
    logps = torch.zeros(completions.completion_ids.shape)
    entropy = torch.zeros_like(logps)
    size = res.config.train.micro_batch_size
    for start in range(0, len(completions), size):
        rows = slice(start, start + size)
        part = to_device(completions.rows(rows).trimmed(), res.engine.device)
        T = part.completion_ids.shape[1]
        logps[rows, :T], entropy[rows, :T] = completion_logps(
            model,
            part.prompt_ids,
            part.prompt_mask,
            part.completion_ids,
            part.completion_mask,
            res.config.rollout.temperature,
            share_prompts=res.engine.share_prompts,
            as_trees=res.engine.as_trees,
        )
    return logps, entropy
