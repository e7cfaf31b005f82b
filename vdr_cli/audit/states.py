"""Bonus sources that read hidden states, in float64, from docs/exploration.md: novelty and value_heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vdr_cli.audit import streams
from vdr_cli.audit.files import Record
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.audit.model import alike
from vdr_cli.audit.weights import Models
from vdr_cli.config import Config

Array = NDArray[np.float64]

PROJECTION, HEADS = 4, 5
"""Numbers of the streams of novelty's projections and of the heads at the start."""
MEMORY = "bonus.pt"
"""File of a checkpoint that holds the heads."""


def audit(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """The number of each completion, where the bonus reads hidden states."""
    name = cfg.bonus_source
    if name not in SOURCES:
        return []
    found = SOURCES[name](record, cfg, models)
    if isinstance(found, str):
        return [judge.skipped(f"{name} of completions", found)]
    return [judge.compare(f"{name} of completions", record.numbers("reduced"), found, "measure")]


def _novelty(record: Record, cfg: Config, models: Models) -> Array | str:
    """h' (λI + Σ h h')^-1 h in each group, h the projected mean state of the completion's tokens less the mean."""
    with models.reference(record.step) as start:
        if start is None:
            return "the starting weights are not on file"
        states = _states(start, record, _mean_of_policy)
    D, d, G = states.shape[1], cfg.bonus.novelty.dim, cfg.rollout.group_size
    p = 1.0 / math.sqrt(D)
    uniforms = np.stack([streams.completion_uniforms(cfg.train.seed, record.step, i, d, PROJECTION) for i in range(D)])
    projection = (np.where(uniforms < p / 2, 1.0, 0.0) - ((uniforms >= p / 2) & (uniforms < p))) / math.sqrt(p * d)
    found = np.zeros(len(states))
    for start_row in range(0, len(states), G):
        rows = slice(start_row, start_row + G)
        h = states[rows] @ projection
        h = h - h.mean(0)
        inverse = np.linalg.inv(h.T @ h + cfg.bonus.novelty.ridge * np.eye(d))
        found[rows] = [row @ inverse @ row for row in h]
    return found


def _value_heads(record: Record, cfg: Config, models: Models) -> Array | str:
    """The standard deviation of the heads' predictions, from the state that predicts each completion's last token."""
    policy = models.at(record.step)
    if policy is None:
        return f"no checkpoint after step {record.step}: train.checkpoint_every, keep_last"
    states = _states(policy, record, lambda hidden, mask: hidden[:, -2])  # the policy has the last word
    width, K = states.shape[1] + 1, cfg.bonus.value_heads.heads
    if record.step == 0:
        uniforms = [streams.completion_uniforms(cfg.train.seed, 0, head, width, HEADS) for head in range(K)]
        weights = (np.stack(uniforms) - 0.5) * math.sqrt(12.0 / width)
    else:
        path = models.run.checkpoint(record.step)
        if path is None or not (path / MEMORY).is_file():
            return f"the heads after step {record.step} are not on file"
        weights = torch.load(path / MEMORY, weights_only=True)["weights"].numpy()
    scaled = states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-12)
    predicted = np.concatenate([scaled, np.ones((len(states), 1))], 1) @ weights.T
    return np.asarray(predicted.std(1, ddof=1))


def _mean_of_policy(hidden: Any, mask: Any) -> Any:
    """(n, D): the mean over the tokens that the policy sampled."""
    own = hidden[:, -mask.shape[1] :] * mask[..., None]
    return own.sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def _states(model: Any, record: Record, pick: Callable[[Any, Any], Any]) -> Array:
    """(B, D) from each row's last hidden states. pick: from (n, P + T, D) and the policy's tokens (n, T) to (n, D)."""
    prompts: Sequence[Any] = record.columns["prompt_ids"]
    completions: Sequence[Any] = record.columns["completion_ids"]
    found: dict[int, Array] = {}
    for rows in alike(prompts, completions):
        ids = torch.tensor([[*prompts[row], *completions[row]] for row in rows])
        mask = torch.from_numpy(record.policy[rows, : len(completions[rows[0]])])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        found |= dict(zip(rows, pick(hidden, mask).double().numpy(), strict=True))
    return np.stack([found[row] for row in range(len(record))])


SOURCES: dict[str, Callable[[Record, Config, Models], Array | str]] = {"novelty": _novelty, "value_heads": _value_heads}
