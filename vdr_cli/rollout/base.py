"""The protocol of a sampling backend: prompts to completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from vdr_cli.samples import Completions, Finished, Sampling, Watcher


class Rollout(Protocol):
    """A sampling backend. The loop does not know which one."""

    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Bring whatever samples to the model's weights; `begin` does so too.

        prompts, sampling: what will be sampled, for checks. A collective where weights are gathered layer by layer.
        """
        ...

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        finished: Finished | None = None,
        watcher: Watcher | None = None,
    ) -> Completions:
        """Draw n completions of each prompt.

        model: the gathered one. prompts: token ids. keys: one 64-bit number a prompt;
        completion g of a prompt is drawn from a generator seeded by (key, g), so it depends on neither
        batch size, order nor rank. finished: told of every prompt once, while others are still sampled, perhaps
        from another thread. watcher: told what `model` reads; a server reads elsewhere and tells nothing. Returns
        B = len(prompts) * n rows, prompt-major.
        """
        ...

    def begin(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        finished: Finished | None = None,
        watcher: Watcher | None = None,
    ) -> Callable[[], Completions]:
        """`generate`, as far as it needs the model; what is returned waits for the rest.

        A server samples meanwhile, under the weights of now; the model in this process is done before it returns.
        """
        ...


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
