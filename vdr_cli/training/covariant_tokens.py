"""The tokens that losses clip_cov and kl_cov treat differently, chosen over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.grpo.covariance import covariances, drawn, highest
from vdr_cli.grpo.losses import LossInputs
from vdr_cli.samples import Stream, completion_key, uniform_rows
from vdr_cli.training.minibatches import own_groups


def covariant_tokens(config: Config, part: LossInputs, rows: Tensor, step: int) -> Tensor | None:
    """(b, T) bool: the tokens of one optimizer step that the loss singles out; None for other losses. Collective.

    part: this rank's rows of the step. rows: (b,) their places in this rank's share of the rollout. A token's random
    number is a function of seed, step, the row's place over all ranks and the token's own, so the choice is the same on
    any number of ranks.
    """
    cfg = config.grpo
    if not cfg.needs_covariance:
        return None
    assert part.old_logps is not None, "GrpoConfig.reads_policy_first"
    own = part.advantages[part.mask].double(), part.old_logps[part.mask].double()
    total_advantage, total_logp, count = collectives.all_reduce_sum(
        [float(own[0].sum()), float(own[1].sum()), float(part.mask.sum())]
    )
    means = total_advantage / max(count, 1.0), total_logp / max(count, 1.0)
    places = rows + own_groups(config)[0] * config.rollout.group_size
    uniforms = _uniforms(config.train.seed, step, places, part.mask)
    shares = collectives.gather_objects((covariances(*own, *means), uniforms[part.mask]))
    everybody, numbers = (torch.cat(each) for each in zip(*shares, strict=True))
    if cfg.loss == "kl_cov":
        chosen = highest(everybody, cfg.kl_cov_share)
    else:
        chosen = drawn(everybody, numbers, cfg.clip_cov_share, cfg.clip_cov_low, cfg.clip_cov_high)
    before = sum(len(each) for each, _ in shares[: collectives.rank()])
    found = torch.zeros_like(part.mask)
    found[part.mask] = chosen[before : before + len(own[0])]
    return found


def _uniforms(seed: int, step: int, places: Tensor, mask: Tensor) -> Tensor:
    """(b, T) float64 in [0, 1): a number for each token of these rows of the rollout."""
    key = completion_key(seed, Stream.CLIPPED_TOKENS, step)
    return uniform_rows([(key, place) for place in places.tolist()], mask.shape[1])
