"""The protocol of a sampling backend: prompts to completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from vdr_cli.samples import Completions, Finished, Sampling, Watcher


class Rollout(Protocol):
    """A sampling backend. The loop does not know which one."""

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

        model: full hook-free weights (the twin). prompts: token ids. keys: one 64-bit number a prompt;
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
