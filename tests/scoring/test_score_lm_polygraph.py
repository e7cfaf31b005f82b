"""Our measures against the ensemble formulas of lm-polygraph 0.7 (utils/ensemble_utils), derived again here.

With p̄ the mean distribution of the members it computes, per token,
    total = H(p̄), data = mean_m H(p_m), MI = total − data, K = −Σ_v p̄ mean_m log p_m, EPKL = K − data, RMI = K − total,
and for a sequence, from the members' log-probabilities S_m of it, RMI = log mean_m e^{S_m} − mean_m S_m.
Equal: total, data, MI, and the sequence's RMI (ours is divided by its tokens). Not defined alike, the relations held
below: its EPKL averages all M² pairs, the M that are zero included; its token RMI is ours in expectation over y ~ p̄.
"""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from vdr_cli.disagreement.information import from_logits, rmi_seq

M, N, V = 5, 7, 23


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(N, M, V, generator=torch.Generator().manual_seed(0)) * 2


def polygraph(logits: torch.Tensor) -> dict[str, np.ndarray]:
    logs = torch.log_softmax(logits.double(), -1).numpy()  # (N, M, V)
    mean = np.exp(logs).mean(1)
    total, data = entropy(mean, axis=-1), entropy(np.exp(logs), axis=-1).mean(1)
    cross = -(mean * logs.mean(1)).sum(-1)
    return {"total": total, "data": data, "mi": total - data, "epkl": cross - data, "rmi": cross - total}


def test_what_is_defined_alike_is_equal(logits: torch.Tensor) -> None:
    theirs = polygraph(logits)
    ours = from_logits(logits, torch.zeros(N, dtype=torch.int64), {"total", "aleatoric", "bald"})
    assert ours["total"].numpy() == pytest.approx(theirs["total"], rel=1e-5)
    assert ours["aleatoric"].numpy() == pytest.approx(theirs["data"], rel=1e-5)
    assert ours["bald"].numpy() == pytest.approx(theirs["mi"], rel=1e-5)


def test_pairs_of_a_member_with_itself_are_left_out(logits: torch.Tensor) -> None:
    ours = from_logits(logits, torch.zeros(N, dtype=torch.int64), {"epkl"})["epkl"].numpy()
    assert polygraph(logits)["epkl"] == pytest.approx(ours * (M - 1) / M, rel=1e-5)


def test_rmi_is_that_of_the_sampled_token(logits: torch.Tensor) -> None:
    every = [from_logits(logits, torch.full((N,), token), {"rmi"})["rmi"].double().numpy() for token in range(V)]
    mean = torch.softmax(logits.double(), -1).mean(1).numpy()
    assert polygraph(logits)["rmi"] == pytest.approx((mean * np.stack(every, 1)).sum(1), rel=1e-4)


def test_sequences(logits: torch.Tensor) -> None:
    member_logps = torch.log_softmax(logits, -1)[:, :, 3].T[:, None, :]  # (M, 1, N): a sequence of N tokens
    sums = member_logps.double().sum(-1)[:, 0].numpy()
    theirs = np.log(np.exp(sums).mean()) - sums.mean()
    ours = rmi_seq(member_logps, torch.ones(1, N, dtype=torch.bool))
    assert float(ours[0]) * N == pytest.approx(theirs, rel=1e-5)


def test_prediction_rejection_ratio() -> None:
    """Its area is that of the normalised quality; between chance and the oracle the normalisation cancels."""
    from vdr_cli.stats.ranking import Ranked, prr

    generator = np.random.default_rng(0)
    uncertainty, quality = generator.normal(size=60), generator.uniform(2, 5, size=60)
    scaled = (quality - quality.min()) / (quality.max() - quality.min())

    def area(estimate: np.ndarray) -> float:
        return float(np.mean(np.cumsum(scaled[np.argsort(estimate)]) / np.arange(1, 61)))

    theirs = (area(uncertainty) - scaled.mean()) / (area(-quality) - scaled.mean())
    assert float(prr(Ranked.of(uncertainty, -quality))) == pytest.approx(theirs)
