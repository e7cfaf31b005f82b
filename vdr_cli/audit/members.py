"""Dropout members and their measures in float64, from docs/disagreement.md: one forward a member, masks in hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vdr_cli.audit import streams
from vdr_cli.audit.model import Ids, alike, logits_of, picked
from vdr_cli.config import Config

Array = NDArray[np.float64]

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe", "shared_mlp", "fc2")


class CannotReadError(Exception):
    """The audit does not know how this model's members are made; its text says why."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the outermost list with as many entries as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    found = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise CannotReadError("no list of decoder layers was found")
    return list(min(found, key=lambda entry: entry[0])[1])


def block_of(layer: nn.Module, given: str | None, names: Sequence[str]) -> nn.Module:
    """A layer's attention or MLP block."""
    for name in (given,) if given else names:
        try:
            block = layer.get_submodule(name)
        except AttributeError:
            continue
        if "residual" in block.forward.__code__.co_varnames[: block.forward.__code__.co_argcount]:
            raise CannotReadError(f"{type(block).__name__} adds the residual itself")
        return block
    raise CannotReadError(f"no {names[0]} block was found in {type(layer).__name__}")


def first_layer(count: int, scope: str, last_k: int | None) -> int:
    """The lowest layer that members differ in; last_k None: a quarter of the layers, rounded up."""
    return 0 if scope == "full" else count - (last_k or -(-count // 4))


MaskOf = Callable[[int, str, int], Tensor]
"""(layer, site, D) to a mask that multiplies the block's (n, W, D) output."""


@contextmanager
def one_member(model: nn.Module, cfg: Config, mask_of: MaskOf) -> Iterator[None]:
    """Inside the block the model is one member: its blocks' outputs are multiplied by the masks."""
    d = cfg.disagreement
    blocks = d.blocks or {}
    sites: list[tuple[int, str, nn.Module]] = []
    layers = layers_of(model)
    for number in range(first_layer(len(layers), d.effective_scope, d.last_k), len(layers)):
        attention = block_of(layers[number], blocks.get("attention"), ATTENTION)
        sites.append((number, "attention", attention))
        sites.append((number, "mlp", block_of(layers[number], blocks.get("mlp"), MLP)))
        shared = getattr(layers[number], "shared_mlp", None)
        if shared is not None and "mlp" not in blocks and shared is not sites[-1][2]:  # added to the experts' output
            sites.append((number, "mlp", shared))

    def hook(layer: int, site: str) -> Callable[..., Any]:
        def multiply(module: nn.Module, arguments: object, output: Any) -> Any:
            branch = output[0] if isinstance(output, tuple) else output
            masked = branch * mask_of(layer, site, branch.shape[-1])
            return (masked, *output[1:]) if isinstance(output, tuple) else masked

        return multiply

    handles = [module.register_forward_hook(hook(layer, site)) for layer, site, module in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masks_of(cfg: Config, step: int, member: int, prompts: Sequence[Ids], completions: Sequence[Ids]) -> MaskOf:
    """The masks of one member for rows of one shape; the completions are those of the rows, in order."""
    seed, p = cfg.train.seed, cfg.disagreement.dropout

    def shared(layer: int, site: str, width: int) -> Tensor:
        return torch.from_numpy(streams.mask(seed, f"{step}/{member}/{layer}/{site}", width, p))

    def by_token(layer: int, site: str, width: int) -> Tensor:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            parts = [(streams.sequence_name(prompt), len(prompt))]
            parts.append((streams.sequence_name(prompt, completion), len(completion)))
            drawn = [
                streams.mask(seed, f"{step}/{member}/{layer}/{site}/{name}", length * width, p).reshape(length, width)
                for name, length in parts
            ]
            rows.append(np.concatenate(drawn))
        return torch.from_numpy(np.stack(rows))

    return shared if cfg.disagreement.mask_sharing == "member" else by_token


@torch.no_grad()
def measures(
    model: nn.Module, cfg: Config, step: int, prompts: Sequence[Ids], completions: Sequence[Ids]
) -> dict[str, Array]:
    """`bald` and `rmi` of every token, (B, T) nats, 0 at padding.

    bald = H(p̄) - mean_m H(p_m), rmi = log p̄(y) - mean_m log p_m(y), p_m at temperature 1.
    """
    M = cfg.disagreement.members
    widest = max(max((len(ids) for ids in completions), default=0), 1)
    found = {name: np.zeros((len(prompts), widest)) for name in ("bald", "rmi")}
    for rows in alike(prompts, completions):
        own = [prompts[row] for row in rows], [completions[row] for row in rows]
        mixture: Tensor | None = None
        entropy, logp = torch.zeros(()), torch.zeros(())
        for member in range(M):
            with one_member(model, cfg, masks_of(cfg, step, member, *own)):
                log_p = torch.log_softmax(logits_of(model, prompts, completions, rows), dim=-1)
            p = log_p.exp()
            mixture = p / M if mixture is None else mixture + p / M
            entropy = entropy - torch.special.xlogy(p, p).sum(-1) / M
            logp = logp + picked(log_p, completions, rows) / M
        assert mixture is not None
        T = mixture.shape[1]
        bald = -torch.special.xlogy(mixture, mixture).sum(-1) - entropy
        rmi = picked(mixture.log(), completions, rows) - logp
        found["bald"][rows, :T], found["rmi"][rows, :T] = bald.clamp_min(0).numpy(), rmi.clamp_min(0).numpy()
    return found
