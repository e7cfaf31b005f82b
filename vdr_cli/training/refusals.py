"""Updates that were refused because their gradient was not finite."""

from __future__ import annotations

import torch

from vdr_cli.engine import collectives
from vdr_cli.errors import DataError
from vdr_cli.system.files import replacing
from vdr_cli.system.text import reason
from vdr_cli.training.batch import Advantages, RewardedGroups, Updates
from vdr_cli.training.resources import Resources
from vdr_cli.training.run_log import RunLog
from vdr_cli.training.state import LoopState


def stop_if_refused_too_often(
    res: Resources, state: LoopState, log: RunLog, batch: RewardedGroups, advantages: Advantages, updates: Updates
) -> None:
    """Report refused updates. After max_refused_steps consecutive ones save this rank's batch and raise DataError.

    Refusals are the same on every rank, so the error is raised on all.
    """
    longest = state.count_refusals(updates.refused)
    if any(updates.refused):
        log.note(f"step {state.step}: the gradient was not finite; the update was refused on all ranks")
    if longest < res.config.train.max_refused_steps:
        return
    path = res.directory / f"refused_batch_rank{collectives.rank()}.pt"
    kept = f"the last batch is in {path}: look at its rewards and log-probabilities"
    try:
        with replacing(path) as partial:
            torch.save({"batch": batch, "advantages": advantages}, partial)
    except (OSError, RuntimeError) as fault:  # torch.save reports a full disk as RuntimeError
        kept = f"the last batch could not be saved ({reason(fault)}): look at completions/"
    raise DataError(
        f"{longest} steps in a row had a loss or gradient that is not finite; {kept}, lower train.learning_rate"
    )
