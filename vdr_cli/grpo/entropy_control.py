"""The adaptive weight of the entropy bonus (Skywork-OR1, He et al. 2025, arXiv 2505.22312)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class EntropyControl:
    """A coefficient that rises while the policy's entropy is below its target and falls otherwise.

    c_{k+1} = c_k + Δ where e_k < target, else c_k − Δ, clipped to [0, maximum]; c_0 = 0. The loss of rollout k + 1
    subtracts α · entropy, with α = c_{k+1} where e_k ≤ target and 0 elsewhere: it acts only below the target.
    e_k is the mean token entropy of rollout k; the paper takes that of the rollout that is trained on, read beforehand.
    """

    coefficient: float = 0.0
    entropy: float | None = None
    """Nats per token, of the newest finished rollout; None before the first."""

    def weight(self, target: float) -> float:
        """α, for the rollout that comes next."""
        return self.coefficient if self.entropy is not None and self.entropy <= target else 0.0

    def follow(self, entropy: float, target: float, delta: float, maximum: float) -> None:
        """Take in the entropy of the rollout that has just been trained on. NaN (a refused step) changes nothing."""
        if not math.isfinite(entropy):
            return
        change = delta if entropy < target else -delta
        self.coefficient = min(max(self.coefficient + change, 0.0), maximum)
        self.entropy = entropy

    def state_dict(self) -> dict[str, float | None]:
        return asdict(self)
