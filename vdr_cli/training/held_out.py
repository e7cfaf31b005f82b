"""Held-out evaluations of the policy during a run."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vdr_cli.engine import collectives
from vdr_cli.evaluation.evaluate import Evaluation, evaluate_model
from vdr_cli.samples import Completions
from vdr_cli.training import audit_record
from vdr_cli.training.resources import Resources
from vdr_cli.training.run_log import RunLog
from vdr_cli.training.state import LoopState


def evaluate(res: Resources, state: LoopState, log: RunLog) -> dict[str, float]:
    """eval/pass@1, eval/pass@K for each of eval_k, eval/reward ... of the policy on held-out prompts.

    The best pass@1 so far is remembered, with its step. Samples are saved for `vdr audit` where that is due.
    Empty without held-out prompts. Collective. Raises DataError when a reward function fails.
    """
    cfg = res.config
    if res.held_out is None:
        return {}
    if state.pending is not None:  # servers that sample for the next step must not get newer weights meanwhile
        with collectives.agreed():
            state.pending.wait()
    evaluation = Evaluation(
        res.rewards,
        cfg.train.eval_samples,
        sorted({1, *(cfg.train.eval_k or [cfg.train.eval_samples])}),
        cfg.train.seed,
        res.sampling,
        cfg.rewards.solved_at,
        cfg.rewards.timeout,
    )
    with res.timer.phase("evaluation"), res.engine.gathered_model() as model, res.reward_models.ready():
        result = evaluate_model(
            model,
            res.tokenizer,
            res.rollout,
            [res.held_out[index] for index in range(min(cfg.train.eval_prompts, len(res.held_out)))],
            evaluation,
            environments=res.environments,
            entropy_sums=partial(_entropy_sums, res, model) if res.engine.by_layers else None,
        )
        res.rollout.rest()
    audit_record.save_evaluation(res, state, log, result)
    metrics = {f"eval/{name}": value for name, value in result.metrics().items()}
    state.remember_best(metrics["eval/pass@1"])
    return metrics


def _entropy_sums(res: Resources, model: Any, completions: Completions | None) -> NDArray[np.float64]:
    """(B,) sum of each completion's token entropies in nats, read layer by layer. Collective.

    None: this rank has no completions and only takes part.
    """
    cfg = res.config
    nothing = torch.zeros((0, 1))
    if completions is None:
        ids, flags = nothing.long(), nothing.bool()
        completions = Completions(ids, flags, ids, flags, nothing, flags[:, 0])
    _, entropy = res.engine.read_logps(model, completions, cfg.train.micro_batch_size, cfg.rollout.temperature)
    sums: NDArray[np.float64] = (entropy.double() * completions.policy_mask).sum(1).numpy()
    return sums
