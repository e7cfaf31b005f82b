"""Members made from a plain model: masks on the residual branches, installed for the length of a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.masks import SITES, EnsembleSpec, Site, member_mask, token_mask
from vdr_cli.errors import ConfigError
from vdr_cli.models import anatomy


@dataclass
class Members:
    """The members of one `ensemble` block. Row r of a batch belongs to member r // (rows / len(members))."""

    spec: EnsembleSpec
    step: int
    members: Sequence[int]
    keys: list[str] = field(default_factory=list)
    """A key for each sequence of the next pass, one per row of a member (mask_sharing: token)."""
    positions: tuple[Tensor, Tensor] | None = None
    """Positions of the next pass's tokens (rows, W) and of all visible tokens (rows, K), for one member's rows."""

    def mask(self, layer: int, site: Site, branch: Tensor) -> Tensor:
        """A mask that broadcasts against the branch seen as (members, tokens of a member, D)."""
        width = branch.shape[-1]
        if self.spec.mask_sharing == "member":
            masks = [member_mask(self.spec, self.step, m, layer, site, width)[None] for m in self.members]
        else:
            masks = [self._token_masks(m, layer, site, width) for m in self.members]
        return torch.stack(masks).to(branch.device)  # (m, 1, D) or (m, rows·W, D)

    def _token_masks(self, member: int, layer: int, site: Site, width: int) -> Tensor:
        """(rows·W, D): each row's stream, counted from its first valid token or the completion's first."""
        if self.positions is None:
            raise RuntimeError("mask_sharing token needs the keys and positions of the rows before each pass")
        positions = (self.positions[0] - self.positions[0][:, :1]).cpu()
        length = int(positions.max()) + 1
        rows = [
            token_mask(self.spec, self.step, member, layer, site, key, length, width)[own]
            for key, own in zip(self.keys, positions, strict=True)
        ]
        return torch.cat(rows)


class BranchHook(ABC):
    """Forward hook that multiplies a block's output, or the first entry of a tuple, by masks."""

    @abstractmethod
    def mask(self, branch: Tensor) -> Tensor:
        """(n, 1, D) or (n, tokens, D) float32: the masks of the branch seen as (n, tokens, D)."""

    def __call__(self, module: nn.Module, arguments: object, output: Tensor | tuple[Any, ...]) -> object:
        if isinstance(output, tuple):
            return (self.masked(output[0]), *output[1:])
        return self.masked(output)

    def masked(self, branch: Tensor) -> Tensor:
        # The product is taken in float32: 1/(1-p) rounded to bfloat16 would scale every branch by a wrong constant.
        mask = self.mask(branch)
        flat = branch.reshape(len(mask), -1, branch.shape[-1])
        return (flat * mask).to(branch.dtype).view(branch.shape)


class _MembersHook(BranchHook):
    """The masks of `Members`, made once where they are the same in every pass."""

    def __init__(self, members: Members, layer: int, site: Site) -> None:
        self.members = members
        self.layer = layer
        self.site: Site = site
        self.kept: Tensor | None = None

    def mask(self, branch: Tensor) -> Tensor:
        if self.members.spec.mask_sharing == "token":
            return self.members.mask(self.layer, self.site, branch)
        if self.kept is None or self.kept.device != branch.device:
            self.kept = self.members.mask(self.layer, self.site, branch)
        return self.kept


@contextmanager
def ensemble(
    model: nn.Module, spec: EnsembleSpec, step: int, members: Sequence[int], layer: int | None = None
) -> Iterator[Members]:
    """Inside the block a batch is read by `members`, laid out member-major: row = m_local * B + b.

    layer: the only layer whose masks act; None: all in scope.
    The model is put into eval mode, so that no dropout of its own is active, and left as it was found: hooks removed,
    training flags restored, whatever happens inside. Raises RuntimeError when a block is open on this model already,
    ConfigError when its layers or blocks are not found or last_k exceeds them.
    """
    chosen = [site for site in sites(model, spec) if layer in (None, site[0])]
    if any(isinstance(hook, BranchHook) for _, _, block in chosen for hook in block._forward_hooks.values()):
        raise RuntimeError("an ensemble block is already open on this model: its masks would be applied twice")
    active = Members(spec, step, members)
    with ExitStack() as restore:
        restore.enter_context(evaluating(model))
        for number, site, block in chosen:
            restore.enter_context(hooked(block.register_forward_hook, _MembersHook(active, number, site)))
        yield active


def sites(model: nn.Module, spec: EnsembleSpec) -> list[tuple[int, Site, nn.Module]]:
    """(layer, site, module) of every mask of the ensemble."""
    found: list[tuple[int, Site, nn.Module]] = []
    layers = anatomy.decoder_layers(model)
    for number in range(first_layer(len(layers), spec), len(layers)):
        blocks = anatomy.residual_blocks(layers[number], spec.block_names)
        # One block in some models; in others three, of which the last two are one branch and get one mask.
        found += [(number, SITES[min(index, 1)], block) for index, block in enumerate(blocks)]
    return found


def first_layer(count: int, spec: EnsembleSpec) -> int:
    """The lowest layer in which members differ. Raises ConfigError when last_k exceeds the number of layers."""
    if spec.scope == "full":
        return 0
    last_k = spec.last_k or -(-count // 4)
    if last_k > count:
        raise ConfigError(f"disagreement.last_k is {last_k}, but the model has {count} layers")
    return count - last_k


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, every module's own flag back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(register: Callable[..., torch.utils.hooks.RemovableHandle], hook: object, **how: bool) -> Iterator[None]:
    """A hook that exists inside the block only."""
    handle = register(hook, **how)
    try:
        yield
    finally:
        handle.remove()
