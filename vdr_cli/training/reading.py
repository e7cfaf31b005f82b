"""How completions are read under whole weights: log-probabilities, and the members' disagreement."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.layer_major import measure_by_layers
from vdr_cli.disagreement.members import measure
from vdr_cli.disagreement.recorder import StemRecorder, recorder_of
from vdr_cli.disagreement.stems import StemKeeper
from vdr_cli.engine import collectives
from vdr_cli.models.policy import completion_logps
from vdr_cli.samples import Completions, Prompt, to_device
from vdr_cli.training.batch import RewardedGroups
from vdr_cli.training.resources import Resources


@dataclass(frozen=True)
class Measured:
    """The disagreement on a rank's B completions."""

    values: Tensor
    """(B, T) per token, or (B,) at the end of the sequence; nats, float32, on the CPU."""
    by_token: Tensor | None
    """(b, T) per token of the first b rows, for people to look at."""


def stem_recorder(res: Resources, model: Any, prompts: list[Prompt]) -> StemRecorder | None:
    """Keeps what the members' lower layers give while these prompts are sampled from this model."""
    if res.ensemble is None or res.engine.by_layers:
        return None
    cfg = res.config.rollout
    widest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    return recorder_of(model, res.ensemble, len(prompts) * (widest + cfg.group_size * cfg.max_new_tokens))


def stem_keeper(res: Resources, model: Any, batch: RewardedGroups) -> StemKeeper | None:
    """Holds what the members' lower layers give in a pass made anyway: sampling, or for log-probabilities."""
    if res.ensemble is None or res.engine.by_layers:
        return None
    return StemKeeper(model, res.ensemble, batch.completions, res.config.rollout.group_size, batch.recorder)


def measure_disagreement(
    res: Resources, step: int, model: Any, completions: Completions, stems: StemKeeper | None, shown: bool
) -> Measured | None:
    """The measure of every completion under the members of this step; None without disagreement. Collective.

    shown: also read a group token by token for people to look at, where the mode does not do so anyway. It changes no
    number of the run. Raises MachineError on every rank when one rank's memory cannot hold one member and completion.
    """
    if res.ensemble is None:
        return None
    if res.config.disagreement.mode != "end_of_sequence":
        values = _read_members(res, step, model, completions, "all", stems)
        return Measured(values, values)
    values = _read_members(res, step, model, completions, "last", stems)
    if not shown:
        return Measured(values, None)
    first_group = completions.rows(slice(0, res.config.rollout.group_size))
    return Measured(values, _read_members(res, step, model, first_group, "all", stems))


def _read_members(
    res: Resources, step: int, model: Any, completions: Completions, positions: str, stems: StemKeeper | None
) -> Tensor:
    """The measure under the step's members: (B, T), or (B,) with positions "last". Collective."""
    cfg = res.config.disagreement
    request: dict[str, Any] = {
        "completions": to_device(completions, res.engine.device),
        "group_size": res.config.rollout.group_size,
        "spec": res.ensemble,
        "step": step,
        "positions": positions,
        "measures": frozenset({cfg.measure}),
        "last_n": cfg.last_n,
    }
    statistics: Statistics
    with res.timer.phase("disagreement"), collectives.agreed():
        if not res.engine.by_layers:
            statistics = measure(model, **request, stems=stems)
        else:
            with res.engine.one_by_one() as lend:
                statistics = measure_by_layers(model, lend, **request)
    return statistics.get(cfg.measure).cpu()


def read_logps(
    res: Resources, model: Any, completions: Completions, stems: StemKeeper | None = None
) -> tuple[Tensor, Tensor]:
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
        with stems.keeping(rows, part.prompt_ids.shape[1]) if stems else nullcontext():
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
