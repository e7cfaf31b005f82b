"""A request to `vdr eval`: which models, on what, and how they are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vdr_cli.config.schema import DataConfig, DisagreementConfig, ModelConfig, RewardsConfig, RolloutConfig
from vdr_cli.errors import ConfigError
from vdr_cli.rollout.base import sampling_of
from vdr_cli.samples import Sampling


@dataclass(frozen=True)
class EvalRequest:
    """A request to `vdr eval`. The prompts are the held-out ones of `data` (eval_name, eval_split)."""

    models: tuple[str, ...]
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """dtype, revision and trust_remote_code of every model; `name` is not read."""
    samples: int = 8
    ks: tuple[int, ...] | None = None
    """pass@k for these k; None: 1 and `samples`."""
    greedy: bool = False
    prompts: int | None = None
    """The first this many prompts; None: all."""
    seed: int = 0
    entropy: bool = True
    """Measure token entropies, a quarter of the work for a small model; False: they are NaN."""
    diversity: bool = False
    """Also distinct-1, distinct-2 and self-BLEU of each prompt's completions."""
    reference: str | None = None
    """Column that holds a reference text: also ROUGE-L against it."""
    disagreement: DisagreementConfig | None = None
    """Also the ensemble's mean bald of the completions; None: not measured."""
    device: str = "auto"


def sampling_plan(request: EvalRequest) -> tuple[int, tuple[int, ...], Sampling]:
    """Completions per prompt, the list of k, and how to sample; ConfigError for what cannot be."""
    samples = 1 if request.greedy else request.samples
    if request.greedy:
        ks: tuple[int, ...] = (1,)
    else:
        ks = tuple(sorted(set(request.ks or (1, samples))))
        if samples < 1:
            raise ConfigError(f"--samples {samples}: draw at least one completion per prompt")
        if ks[0] < 1 or ks[-1] > samples:
            raise ConfigError(f"--k {','.join(map(str, ks))}: each k must lie between 1 and --samples {samples}")
    if request.prompts is not None and request.prompts < 1:
        raise ConfigError(f"--prompts {request.prompts}: evaluate on at least one prompt")
    sampling = sampling_of(request.rollout)
    return samples, ks, replace(sampling, temperature=0.0) if request.greedy else sampling
