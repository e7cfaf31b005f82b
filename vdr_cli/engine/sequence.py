"""Sequence parallelism (Ulysses, Jacobs et al. 2023): N ranks make the update of the same completions together.

Each rank of a group holds 1/N of every row: embeddings, MLPs, norms and LM head see its tokens alone. Around attention
an all-to-all exchanges tokens for heads, so that a rank sees whole rows with 1/N of the heads. Rows have no padding
inside (`packed_rows`), so attention needs no mask. To ZeRO the ranks are data-parallel all the same: a rank's gradient
is that of its tokens, and the sum over ranks is the step's.

Log-probabilities without gradient, of the policy and of the reference, are read the same way, and so are members.
Sampling, rewards and the states of other bonuses stay as they are: each rank has groups of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vdr_cli.engine import collectives
from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import attention_replaced, backbone, forward_arguments, output_head, text_config, unwrapped
from vdr_cli.models.packed_rows import packed_rows
from vdr_cli.models.policy import HeadLogps, Policy
from vdr_cli.models.prompt_tree import can_read_trees

ATTENTION = "vdr_sequence"
"""The name under which transformers knows the attention between all-to-alls."""


class SequenceGroup:
    """N neighbouring ranks. Made on all ranks together."""

    def __init__(self, size: int) -> None:
        """Collective."""
        world = collectives.world_size()
        assert world % size == 0, "checks.check_processes"
        self.size = size
        self.rank = collectives.rank() % size
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        self._group: Any = groups[collectives.rank() // size]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank of the group, in rank order. Collective in the group."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the group. Every rank goes on with it alike, so its gradient is that of its own part."""
        return _Sum.apply(own, self._group)  # type: ignore[no-any-return,no-untyped-call]

    def exchange(self, parts: Tensor) -> Tensor:
        """parts (N, ...): part i goes to rank i; returns what came, by rank. Collective in the group."""
        return _Exchange.apply(parts, self._group)  # type: ignore[no-any-return,no-untyped-call]

    def attention_of(self, causal_lm: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the model's attention is the group's, as `divided_logps` needs it."""
        return attention_replaced(causal_lm, ATTENTION)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: (B, H, S/N, d) each, to (B, S/N, H, d). Causal over the whole row."""
        whole = [self._swapped(states) for states in (query, key, value)]  # (B, H/N, S, d): all tokens, own heads
        output, _ = sdpa_attention_forward(module, *whole, None, **kwargs | {"is_causal": True})  # (B, S, H/N, d)
        return self._swapped(output), None

    def _swapped(self, states: Tensor) -> Tensor:
        """(B, X, Y/N, d) to (B, X/N, Y, d): X, here whole, is divided among the ranks, and Y becomes whole."""
        sent = states.unflatten(1, (self.size, -1)).movedim(1, 0)  # (N, B, X/N, Y/N, d)
        return self.exchange(sent).movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """An all-to-all over the first dimension; its gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _exchanged(gradient, ctx.group), None


def _exchanged(parts: Tensor, group: Any) -> Tensor:
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        total = own.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class SequencePolicy(Policy):
    """A policy whose forward is one of the whole group: the same rows on each rank, and the same results."""

    def __init__(self, causal_lm: nn.Module, group: SequenceGroup, as_trees: bool, packed: bool) -> None:
        """as_trees, packed: how readers without gradient read, see Policy."""
        super().__init__(causal_lm, as_trees=as_trees, packed=packed)
        check_heads(causal_lm, group.size)
        self._sequence = group
        AttentionInterface.register(ATTENTION, group.attention)
        text_config(causal_lm)._attn_implementation = ATTENTION

    @property
    def calls_layers_twice(self) -> bool:
        return False

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
        policy_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Policy.forward`."""
        tokens = prompt_ids, prompt_mask, completion_ids, completion_mask
        return divided_logps(self.causal_lm, self._sequence, self.head_logps, *tokens, temperature, policy_mask)


def divided_logps(
    causal_lm: nn.Module,
    group: SequenceGroup,
    head_logps: HeadLogps,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float,
    policy_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`Policy.forward` by the whole group, for a model whose attention is the group's. Collective in the group."""
    rows = packed_rows(prompt_ids, prompt_mask, completion_ids, completion_mask, group.size)
    part = rows.part(group.rank, group.size)
    arguments = forward_arguments(causal_lm, torch.ones_like(part.ids), part.positions)
    hidden = backbone(causal_lm)(input_ids=part.ids, use_cache=False, **arguments)[0]  # (B, S/N, D)
    wanted = completion_mask if policy_mask is None else policy_mask
    own = wanted.bool() & (part.columns >= 0) & (part.columns < part.ids.shape[1])
    b, t = own.nonzero(as_tuple=True)
    column = part.columns[b, t]
    keep = 1.0
    if not len(b):  # this rank's backward must reach every parameter, or ZeRO's collectives do not match
        b = t = column = torch.zeros(1, dtype=torch.int64, device=part.ids.device)
        keep = 0.0
    found = head_logps(hidden[b, column], output_head(causal_lm), completion_ids[b, t], temperature)
    logps, entropy = (values.new_zeros(own.shape).index_put((b, t), values * keep) for values in found)  # (B, T) each
    return group.sum(torch.stack([logps, entropy])).unbind()  # type: ignore[return-value]


def check_heads(causal_lm: nn.Module, size: int) -> None:
    """Raise ConfigError when the model's attention cannot be divided among `size` ranks by its heads."""
    config, kind = text_config(causal_lm), type(unwrapped(causal_lm)).__name__
    if not can_read_trees(causal_lm) or config._attn_implementation != "sdpa":
        raise ConfigError(
            f"engine.sequence_parallel {size}: the attention of {kind} cannot be replaced (it must be full, causal and "
            "transformers' sdpa in every layer); set it to 1"
        )
    heads = int(config.num_attention_heads)
    for what, count in (
        ("attention", heads),
        ("key and value", int(getattr(config, "num_key_value_heads", None) or heads)),
    ):
        if count % size:
            raise ConfigError(
                f"engine.sequence_parallel {size} does not divide the {count} {what} heads of {kind}; give a divisor "
                f"of {count}"
            )
