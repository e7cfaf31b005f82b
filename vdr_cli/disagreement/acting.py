"""Acting under members: each prompt's completions are sampled from one member instead of the policy.

Thompson sampling with dropout members as samples of the weights (Dwaracherla et al. 2024, arXiv 2402.00396). The masks
are those with which the ensemble of the same step reads (`masks.member_mask`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import BranchHook, evaluating, hooked, sites
from vdr_cli.disagreement.masks import EnsembleSpec, Site, member_mask
from vdr_cli.samples import Stream, completion_key


class Actors:
    """The members of one `acting` block, and which of them reads each row of the next pass (a `samples.Actors`)."""

    def __init__(self, spec: EnsembleSpec, step: int, members: Sequence[int], device: torch.device) -> None:
        """members: one for each prompt of the call."""
        self.spec, self.step = spec, step
        self.different = sorted(set(members))
        of_prompt = [self.different.index(member) for member in members]
        self.of_prompt = torch.tensor(of_prompt, dtype=torch.int64, device=device)  # (N,)
        self.of_row = self.of_prompt  # (R,)

    def rows_continue(self, prompts: Tensor) -> None:
        self.of_row = self.of_prompt[prompts.to(self.of_prompt.device)]

    def masks(self, layer: int, site: Site, width: int) -> Tensor:
        """(K, 1, D) float32, of the K different members."""
        found = [member_mask(self.spec, self.step, member, layer, site, width)[None] for member in self.different]
        return torch.stack(found).to(self.of_prompt.device)


class _RowHook(BranchHook):
    """Each row's mask is that of its prompt's member: a member acts as it reads."""

    def __init__(self, actors: Actors, layer: int, site: Site) -> None:
        self.actors, self.layer = actors, layer
        self.site: Site = site
        self.kept: Tensor | None = None

    def mask(self, branch: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.actors.masks(self.layer, self.site, branch.shape[-1])
        return self.kept[self.actors.of_row]


@contextmanager
def acting(model: nn.Module, spec: EnsembleSpec, step: int, members: Sequence[int]) -> Iterator[Actors]:
    """Inside the block each row of a pass is read by the member of its prompt; before each pass `rows_continue` says
    which prompts they are. members: one for each prompt of the call.

    The model is left as it was found, whatever happens inside. Raises ConfigError as `hooks.ensemble` does.
    """
    actors = Actors(spec, step, members, next(model.parameters()).device)
    with ExitStack() as restore:
        restore.enter_context(evaluating(model))
        for number, site, block in sites(model, spec):
            restore.enter_context(hooked(block.register_forward_hook, _RowHook(actors, number, site)))
        yield actors


def acting_members(spec: EnsembleSpec, positions: Sequence[int]) -> list[int]:
    """The member under which each prompt is sampled, by its position in the stream of training prompts."""
    return [completion_key(spec.seed, Stream.ACTING_MEMBER, position) % spec.members for position in positions]


def by_position(
    spec: EnsembleSpec, step: int, positions: Sequence[int]
) -> Callable[[nn.Module], AbstractContextManager[Actors]]:
    """Opens `acting` for prompts at these positions, under the members of this step."""
    return partial(acting, spec=spec, step=step, members=acting_members(spec, positions))
