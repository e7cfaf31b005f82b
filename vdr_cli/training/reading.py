"""Completions read under gathered weights: log-probabilities, and what the bonus's source needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdr_cli.config import RolloutConfig
from vdr_cli.disagreement.reader import MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.exploration.counts import Visits
from vdr_cli.exploration.draws import table, uniforms
from vdr_cli.exploration.novelty import sparse_projection
from vdr_cli.exploration.sources import Source
from vdr_cli.exploration.value_heads import Heads, gradient
from vdr_cli.models.policy import end_state, mean_state
from vdr_cli.samples import Completions, Stream
from vdr_cli.training.answers import answer_keys
from vdr_cli.training.batch import RewardedGroups
from vdr_cli.training.resources import Resources
from vdr_cli.training.state import LoopState


@dataclass(frozen=True)
class PolicyLogps:
    """Log-probabilities and entropies (B, T) under the policy, where something has read them."""

    logps: Tensor | None = None
    entropies: Tensor | None = None


def needs_policy(source: Source | None, rollout: RolloutConfig, completions: Completions) -> bool:
    """True when the bonus asks for numbers of the policy that sampling has not left. Collective where it asks."""
    needs = source.needs if source else frozenset()
    if "log_probs" not in needs:
        return "entropies" in needs
    return not sampled_under_policy(rollout, completions) or "entropies" in needs


def sampled_under_policy(cfg: RolloutConfig, completions: Completions) -> bool:
    """True when the sampler's log-probabilities are the policy's own: its newest weights, no filter, no member.

    Collective.
    """
    filtered = cfg.top_k or cfg.top_p < 1.0 or cfg.min_p or cfg.repetition_penalty != 1.0
    unknown = float(completions.sampler_logps.isnan().any())
    other = filtered or cfg.ahead or cfg.members
    return collectives.all_reduce_max([unknown])[0] == 0 and not other


def read_for_bonus(
    res: Resources, state: LoopState, model: Any, batch: RewardedGroups, policy: PolicyLogps
) -> dict[str, Any]:
    """The signals that the source needs, by their names in `Signals`, and nothing else. Collective."""
    needs = res.source.needs if res.source else frozenset()
    completions, found = batch.completions, dict[str, Any]()
    if "measure" in needs:
        found["measure"] = measure_disagreement(res, state.step, model, completions)
    if "log_probs" in needs:
        found["log_probs"] = completions.sampler_logps if policy.logps is None else policy.logps
    if "entropies" in needs:
        found["entropies"] = policy.entropies
    if "uniforms" in needs:
        cfg = res.config
        found["uniforms"] = uniforms(cfg.train.seed, Stream.NOISE, batch.positions, cfg.rollout.group_size, 2)
    if "answers" in needs:
        found |= count_answers(res, state, batch)
    if "start_states" in needs:
        found |= read_novelty(res, state, model, completions)
    if "states" in needs:
        found |= read_value_heads(res, state, model, batch)
    if "batch" in needs:
        found["batch"] = batch
    return found


def count_answers(res: Resources, state: LoopState, batch: RewardedGroups) -> dict[str, Any]:
    """The completions' answers as keys, and how often each was given in the run. Collective."""
    assert res.answers is not None and isinstance(state.memory, Visits)
    with collectives.agreed(), res.timer.phase("bonus"):
        keys = answer_keys(batch, res.answers(batch))
    state.memory.take(key for part in collectives.gather_objects(keys) for key in part)
    return {"answers": keys, "visits": state.memory.of(keys)}


def read_novelty(res: Resources, state: LoopState, model: Any, completions: Completions) -> dict[str, Any]:
    """Hidden states under the starting weights, and the step's projection. Collective."""
    cfg = res.config
    assert res.reference is not None
    with res.timer.phase("bonus"), res.reference.whole(model) as start:
        states = res.engine.read_states(start, completions, cfg.train.micro_batch_size, mean_state)
    shape = states.shape[1], cfg.bonus.novelty.dim
    drawn = table(cfg.train.seed, Stream.PROJECTION, state.step, shape)
    return {"start_states": states, "projection": sparse_projection(drawn)}


def read_value_heads(res: Resources, state: LoopState, model: Any, batch: RewardedGroups) -> dict[str, Any]:
    """Hidden states under the policy, and the heads before they learn from this step. Collective."""
    cfg, own, heads = res.config, res.config.bonus.value_heads, state.memory
    assert isinstance(heads, Heads)
    with res.timer.phase("bonus"):
        states = res.end_states.of(batch.completions) if res.end_states else None
        if states is None:
            states = res.engine.read_states(model, batch.completions, cfg.train.micro_batch_size, end_state)
        if heads.weights is None:
            heads.start(table(cfg.train.seed, Stream.HEADS, 0, (own.heads, states.shape[1] + 1)))
        assert heads.weights is not None
        drawn = uniforms(cfg.train.seed, Stream.BOOTSTRAP, batch.positions, cfg.rollout.group_size, own.heads)
        parts = collectives.gather_objects((states, batch.task_reward, drawn < own.share))
        everybody = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        heads.take(collectives.broadcast_object(gradient(everybody[0], everybody[1], everybody[2], heads.weights)))
    return {"states": states, "weights": heads.weights}


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
    # Ranks that read rows together would wait for a failed one inside its forward: its end ends the run.
    agreed = collectives.agreed() if res.engine.sequence is None else nullcontext()
    with res.timer.phase("disagreement"), agreed:
        statistics = res.ensemble.measure(model, request)
    return statistics.get(cfg.measure).cpu()


def read_logps(res: Resources, model: Any, completions: Completions) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) of the completions under a gathered model, as `Engine.read_logps` says."""
    cfg = res.config
    return res.engine.read_logps(model, completions, cfg.train.micro_batch_size, cfg.rollout.temperature)
