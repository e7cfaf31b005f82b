"""Completions read under gathered weights: log-probabilities, and what the bonus's source needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vdr_cli.disagreement.reader import MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.samples import Completions
from vdr_cli.training.resources import Resources


@dataclass(frozen=True)
class Readings:
    """What was read for the bonus's source; None where it does not ask."""

    measure: Tensor | None = None
    """(B, T) or (B,) of the dropout members, nats."""


def read_for_bonus(res: Resources, step: int, model: Any, completions: Completions) -> Readings:
    """Everything that the source needs of models, and nothing else. Collective."""
    needs = res.source.needs if res.source else frozenset()
    measure = measure_disagreement(res, step, model, completions) if "measure" in needs else None
    return Readings(measure)


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
    """Log-probabilities and entropies (B, T) of the completions under a gathered model, as `Engine.read_logps` says."""
    cfg = res.config
    return res.engine.read_logps(model, completions, cfg.train.micro_batch_size, cfg.rollout.temperature)
