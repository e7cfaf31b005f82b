"""Information measures of an ensemble's next-token distributions, streamed over the vocabulary projection.

p_m is the distribution of member m at one position, p̄ = mean_m p_m, y the token that was sampled there; natural
logarithms, float32 whatever the model's dtype. Nothing of size (M, B, T, V) ever exists: hidden states
of the members are projected a few positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vdr_cli.models.head import Head
from vdr_cli.samples import last_token

CACHE_BYTES = 2**20
"""Logits that a CPU thread works on at once: they and two tensors made from them stay in its core's cache."""


@dataclass(frozen=True)
class Statistics:
    """One number per token, (N,) or (B, T) float32 in nats (vote_disagree: a share); None where it was not requested.

    With positions "last" there is one number per completion, (B,).
    """

    total: Tensor | None = None
    aleatoric: Tensor | None = None
    bald: Tensor | None = None
    rmi: Tensor | None = None
    epkl: Tensor | None = None
    logp_var: Tensor | None = None
    vote_disagree: Tensor | None = None
    bald_jk: Tensor | None = None
    bald_se: Tensor | None = None
    member_logps: Tensor | None = None
    """(M, N) or (M, B, T): log p_m(y)."""

    def get(self, measure: str) -> Tensor:
        """The tensor of one measure; KeyError when it was not requested."""
        value: Tensor | None = getattr(self, measure, None)
        if value is None:
            raise KeyError(f"measure {measure!r} was not computed")
        return value


MEASURES = frozenset(field.name for field in fields(Statistics))
OF_TARGET = frozenset({"rmi", "logp_var", "member_logps"})
"""Measures of the sampled token's log-probabilities alone: no pass over p̄ is needed."""
OF_MEAN = frozenset({"total", "aleatoric", "bald", "bald_jk", "bald_se"})
"""Measures that need p̄."""


def token_statistics(
    hidden: Tensor, targets: Tensor, head: Head, measures: Collection[str], budget: int = 2**26
) -> Statistics:
    """The measures at N positions from the members' hidden states.

    hidden: (M, N, D) after the final norm; targets: (N,) sampled tokens; budget: bytes of float32 logits at once.
    Chunks change memory and time, never a number: each position is computed on its own.
    """
    unknown = sorted(set(measures) - MEASURES)
    if unknown:
        raise ValueError(f"unknown measure {unknown[0]!r}; known: {', '.join(sorted(MEASURES))}")
    members, count, width = hidden.shape
    vocabulary = head.weight.shape[0]
    copies = 4 if hidden.is_cuda else 1  # probabilities, ratios and their logarithms; small blocks of them on a CPU
    step = max(1, min(count, budget // (4 * members * vocabulary * copies)))
    logits = torch.empty(step * members, vocabulary, dtype=torch.float32, device=hidden.device)
    results: dict[str, list[Tensor]] = {name: [] for name in measures}
    for start in range(0, count, step):
        block = hidden[:, start : start + step].transpose(0, 1).reshape(-1, width)  # (n·M, D), position-major
        chunk = head.logits_into(logits[: len(block)], block).view(-1, members, vocabulary)
        for name, values in _chunk_statistics(chunk, targets[start : start + step], measures).items():
            results[name].append(values)
    joined = {name: torch.cat(parts) if parts else hidden.new_zeros(0) for name, parts in results.items()}
    if "member_logps" in joined:
        joined["member_logps"] = joined["member_logps"].view(-1, members).T
    return Statistics(**joined)


def _chunk_statistics(logits: Tensor, targets: Tensor, measures: Collection[str]) -> dict[str, Tensor]:
    """Measures of a (n, M, V) chunk, in blocks that stay in a CPU's cache between the passes over them."""
    per_position = 4 * logits[0].numel()
    size = len(logits) if logits.is_cuda else max(1, CACHE_BYTES * torch.get_num_threads() // per_position)
    blocks = [
        from_logits(logits[start : start + size], targets[start : start + size], measures)
        for start in range(0, len(logits), size)
    ]
    return {name: torch.cat([block[name] for block in blocks]) for name in measures}


def from_logits(logits: Tensor, targets: Tensor, measures: Collection[str]) -> dict[str, Tensor]:
    """The measures from (n, M, V) float32 logits and (n,) sampled tokens; member_logps comes as (n, M)."""
    wanted = set(measures)
    results: dict[str, Tensor] = {}
    if wanted & OF_TARGET:
        at_target = logits.gather(-1, targets.view(-1, 1, 1).expand(-1, logits.shape[1], 1)).squeeze(-1)
        member_logps = at_target - logits.logsumexp(-1)  # (n, M)
        results |= {"member_logps": member_logps, "rmi": rmi(member_logps), "logp_var": logp_var(member_logps)}
    if "epkl" in wanted:
        results["epkl"] = epkl(logits)
    if "vote_disagree" in wanted:
        results["vote_disagree"] = vote_disagree(logits)
    if wanted & OF_MEAN:
        results |= _mean_statistics(torch.softmax(logits, -1), wanted)
    return {name: results[name] for name in wanted}


def _mean_statistics(probabilities: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """total, aleatoric, bald and its jackknife from (n, M, V) probabilities.

    bald = H(p̄) - mean_m H(p_m) = mean_m KL(p_m ‖ p̄) (Houlsby et al. 2011; Lin 1991), computed as the
    latter: the difference of two entropies near log V has an absolute error of 1e-6 in float32, the mean
    of p log(p/p̄) vanishes term by term where members agree.
    """
    members = probabilities.shape[1]
    mean = probabilities.mean(1, keepdim=True)  # (n, 1, V)
    ratio = probabilities / mean.clamp_min(torch.finfo(torch.float32).tiny)  # p_m / p̄, in [0, M]
    results: dict[str, Tensor] = {}
    if wanted & {"total", "aleatoric"}:
        results["total"] = -_sum_plogq(mean, mean).squeeze(1)
    if wanted & {"bald", "aleatoric", "bald_jk", "bald_se"}:
        divergence = _sum_plogq(probabilities, ratio)  # (n, M): KL(p_m ‖ p̄)
        results["bald"] = divergence.mean(-1).clamp(0, math.log(members))
        if wanted & {"bald_jk", "bald_se"}:
            results |= _jackknife(divergence, mean, ratio)
    if "aleatoric" in wanted:
        results["aleatoric"] = (results["total"] - results["bald"]).clamp_min(0)
    return results


def _sum_plogq(p: Tensor, q: Tensor) -> Tensor:
    """Σ_v p log q over the last dimension, with 0 log 0 = 0.

    torch.xlogy does the same at ten times the cost of log on a CPU; probabilities that underflow to 0 are rare
    enough to be looked for afterwards.
    """
    sums = q.log().mul_(p).sum(-1)
    if bool(sums.isnan().any()):
        return torch.xlogy(p, q).sum(-1)
    return sums


def _jackknife(divergence: Tensor, mean: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    """Jackknifed bald, M·bald - (M-1)·mean_j bald_{-j}, and its standard error (Quenouille 1956; Efron 1982).

    Leaving out member j: bald_{-j} = mean_{i≠j} KL(p_i ‖ p̄) - KL(p̄_{-j} ‖ p̄), with
    p̄_{-j}/p̄ = (M - p_j/p̄)/(M - 1). SE² = (M-1)/M Σ_j (bald_{-j} - mean)².
    """
    members = divergence.shape[1]
    others = (divergence.sum(1, keepdim=True) - divergence) / (members - 1)  # (n, M)
    left_out = ((members - ratio) / (members - 1)).clamp_min_(0)
    without = (others - _sum_plogq(left_out * mean, left_out)).clamp_min(0)
    spread = (without - without.mean(1, keepdim=True)).square().sum(1)
    return {
        "bald_jk": (members * divergence.mean(1) - (members - 1) * without.mean(1)).clamp_min(0),
        "bald_se": (spread * (members - 1) / members).sqrt(),
    }


def rmi(member_logps: Tensor) -> Tensor:
    """log p̄(y) - mean_m log p_m(y) from (..., M) log-probabilities of the sampled token; >= 0 by Jensen.

    The pointwise counterpart of bald that credits the token itself ("reverse mutual information",
    Malinin & Gales 2021, arXiv 2002.07650, before the expectation over y).
    """
    centred = member_logps.double() - member_logps.double().mean(-1, keepdim=True)
    return (centred.logsumexp(-1) - math.log(member_logps.shape[-1])).clamp_min(0).float()


def logp_var(member_logps: Tensor) -> Tensor:
    """Var_m log p_m(y), ddof 1, from (..., M)."""
    return member_logps.double().var(-1).float()


def epkl(logits: Tensor) -> Tensor:
    """Expected pairwise divergence 1/(M(M-1)) Σ_{i≠j} KL(p_i ‖ p_j) of (n, M, V) logits (Malinin & Gales 2021).

    The M² pairs collapse: Σ_{i,j} KL(p_i ‖ p_j) = M Σ_i Σ_v p_i (log p_i - mean_j log p_j).
    """
    logps = torch.log_softmax(logits, -1)
    probabilities = logps.exp()
    logps -= logps.mean(1, keepdim=True)
    return ((probabilities.mul_(logps)).sum((1, 2)) / (logits.shape[1] - 1)).clamp_min(0)


def vote_disagree(logits: Tensor) -> Tensor:
    """1 - the share of members whose likeliest token is the one most members vote for (variation ratio, Freeman 1965).

    0 when all agree, 1 - 1/M when no two do.
    """
    votes = logits.argmax(-1)  # (n, M)
    agreeing = (votes.unsqueeze(1) == votes.unsqueeze(2)).sum(-1).amax(-1)
    return 1.0 - agreeing.float() / votes.shape[1]


def sequence_logps(member_logps: Tensor, mask: Tensor) -> Tensor:
    """S_m = Σ_t log p_{m,t}(y_t): (M, B, T) and (B, T) to (M, B) float64."""
    return (member_logps.double() * mask).sum(-1)


def ig_seq(member_logps: Tensor, mask: Tensor) -> Tensor:
    """Information that the whole completion gives about the member: log M - H(w), w = softmax_m S_m; (B,) nats.

    Its expectation over completions drawn from the mixture is the exact mutual information between completion
    and member, H(w) being the entropy of the posterior over members under a uniform prior.
    """
    weights = torch.log_softmax(sequence_logps(member_logps, mask), 0)
    entropy = -torch.xlogy(weights.exp(), weights.exp()).sum(0)
    return (math.log(len(member_logps)) - entropy).clamp_min(0).float()


def rmi_seq(member_logps: Tensor, mask: Tensor) -> Tensor:
    """(log mean_m e^{S_m} - mean_m S_m) / number of valid tokens: the sequence's rmi per token, (B,) nats."""
    scores = sequence_logps(member_logps, mask)
    gap = torch.logsumexp(scores - scores.mean(0), 0) - math.log(len(scores))
    return (gap.clamp_min(0) / mask.sum(-1).clamp_min(1)).float()


def at_last(statistic: Tensor, mask: Tensor) -> Tensor:
    """The value at each row's last valid token, 0 for a row without any: (B, T) to (B,). bald_eos is at_last(bald)."""
    return statistic.gather(-1, last_token(mask)[:, None]).squeeze(-1) * mask.any(-1)
