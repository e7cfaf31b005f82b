"""Dropout masks from a counter-based generator: any process regenerates any of them without communication."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vdr_cli.errors import ConfigError

Site = Literal["attention", "mlp"]
SITES: tuple[Site, Site] = ("attention", "mlp")
"""A layer's residual branches, in the order of `anatomy.residual_blocks`. An only branch counts as attention."""


@dataclass(frozen=True)
class EnsembleSpec:
    """The settings of an ensemble; with a step and a member's number they fix every mask.

    Raises ConfigError for fewer than two members.
    """

    members: int
    dropout: float = 0.1
    scope: Literal["full", "last_k"] = "full"
    last_k: int | None = None
    """None: a quarter of the layers."""
    mask_sharing: Literal["member", "token"] = "member"
    blocks: tuple[tuple[str, str], ...] | None = None
    seed: int = 0

    @property
    def block_names(self) -> dict[str, str] | None:
        """Names of the attention and MLP blocks, where they had to be given."""
        return dict(self.blocks) if self.blocks else None

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ConfigError(f"disagreement.members is {self.members}: disagreement needs at least 2")


def member_mask(spec: EnsembleSpec, step: int, member: int, layer: int, site: Site, width: int) -> Tensor:
    """(D,) float32 mask of one member at one site: Bernoulli(1-p)/(1-p), so its expectation is 1.

    One sample of the weights (Gal & Ghahramani 2016, "Dropout as a Bayesian approximation"): the same
    for every position, completion and rank.
    """
    return torch.from_numpy(_bernoulli(spec, f"{step}/{member}/{layer}/{site}", width))


def token_mask(
    spec: EnsembleSpec, step: int, member: int, layer: int, site: Site, row_key: str, length: int, width: int
) -> Tensor:
    """(length, D) float32 mask with independent draws at every position of one sequence (mask_sharing: token).

    row_key is made from the tokens themselves (`row_keys`), so the draws depend on neither batch order, padding nor
    rank. Position t reads the t-th stretch of the stream: a longer sequence keeps its first positions' draws.
    """
    flat = _bernoulli(spec, f"{step}/{member}/{layer}/{site}/{row_key}", length * width)
    return torch.from_numpy(flat).view(length, width)


def row_keys(prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, mask: Tensor) -> list[str]:
    """A key for the completion of every row: a hash of its valid tokens and its prompt's."""
    keys = []
    for prompt, valid, ids, kept in zip(prompt_ids, prompt_mask, completion_ids, mask, strict=True):
        content = hashlib.blake2b(prompt[valid.bool()].cpu().numpy().tobytes(), digest_size=16)
        content.update(b"|" + ids[kept.bool()].cpu().numpy().tobytes())
        keys.append(content.hexdigest())
    return keys


def prompt_keys(prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
    """A key for every prompt. Its positions are read once for the group, so its draws are the group's."""
    empty = prompt_ids[:, :0]
    return row_keys(prompt_ids, prompt_mask, empty, empty.bool())


def _bernoulli(spec: EnsembleSpec, name: str, count: int) -> np.ndarray:
    """(count,) float32 in {0, 1/(1-p)} from the Philox stream that seed and name select.

    Raw generator words against a threshold, not numpy's distributions: numpy promises that the
    raw stream never changes, and promises nothing about the distributions.
    """
    digest = hashlib.blake2b(f"{spec.seed}/{name}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))
    words = philox.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
    kept = words >= np.uint32(min(round(spec.dropout * 2**32), 2**32 - 1))
    return kept.astype(np.float32) / np.float32(1.0 - spec.dropout)
