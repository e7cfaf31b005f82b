"""The protocol of a sampling backend: prompts to completions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vdr_cli.config import RolloutConfig
from vdr_cli.samples import Actors, Completions, Conversation, Finished, Sampling, Watcher


def sampling_of(cfg: RolloutConfig) -> Sampling:
    """The sampling parameters that these settings give."""
    return Sampling(
        max_new_tokens=cfg.completion_tokens,
        turn_tokens=cfg.max_new_tokens if cfg.takes_turns else None,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        stop=tuple(cfg.stop),
    )


@dataclass(frozen=True)
class RolloutRequest:
    """A request for n completions of each of N prompts: B = N * n rows, prompt by prompt."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    n: int
    """Completions per prompt."""
    sampling: Sampling
    keys: Sequence[int]
    """A 64-bit number per prompt. Completion g of a prompt is drawn from a generator seeded by (key, g), so it depends
    on neither batch size, order nor rank."""
    finished: Finished | None = None
    """Called once for every prompt, while others are still sampled, perhaps from another thread."""
    watcher: Watcher | None = None
    """Sees what the model in this process reads; a server reads elsewhere and calls nothing."""
    conversation: Conversation | None = None
    """Answers the policy's turns; None: a completion is one turn."""
    acting: Callable[[nn.Module], AbstractContextManager[Actors]] | None = None
    """Opens the block in which each prompt's completions are sampled from a model of their own; None: from the model as
    it is. Only with a model in this process."""


class Rollout(Protocol):
    """A sampling backend. The loop does not know which one."""

    @abstractmethod
    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Bring whatever samples to the model's weights; `start` does so too.

        prompts, sampling: what will be sampled, for checks. A collective where weights are gathered layer by layer.
        """
        ...

    @abstractmethod
    def start(self, model: nn.Module, request: RolloutRequest) -> Callable[[], Completions]:
        """Sample, as far as that needs the model; what is returned waits for the rest.

        model: full hook-free weights. A server samples meanwhile, under the weights of this moment; the model in this
        process has sampled everything when this returns. Raises ConfigError for a model or request that the backend
        cannot serve, DataError for a prompt without tokens, MachineError for a server that fails.
        """
        ...

    def rest(self) -> None:
        """No rank samples before the next `start` or `refresh`: memory that only sampling needs may be freed.

        To be called on every rank, when all of them have their completions.
        """
        return

    def generate(self, model: nn.Module, request: RolloutRequest) -> Completions:
        """`start`, and wait: the completions in the order of the request."""
        return self.start(model, request)()


class LayeredWeights(Protocol):
    """The weights of a model of which no full copy is ever made on a device.

    Methods are collectives: every rank calls them in the same order, and rank 0 uses the results.
    """

    @property
    def version(self) -> int:
        """Grows when the weights change. No collective."""
        ...

    def layers(self, model: Any) -> Iterator[dict[str, Tensor]]:
        """Tensors of one decoder layer after another, by their names in the model; each valid until the next."""
        ...

    def on_host(self, main: bool) -> AbstractContextManager[Any]:
        """The full model in the host's memory where `main`, an empty one elsewhere."""
        ...

    def agreed(self) -> AbstractContextManager[None]:
        """A block whose exception on any rank is raised on all."""
        ...

    def read_logps(self, model: Any, completions: Completions, temperature: float) -> Tensor:
        """Log-probabilities (B, T) of this rank's completions, of which there may be none; float32, on the CPU."""
        ...
