"""The policy: a causal language model that returns log-probabilities and entropies of completions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdr_cli.models.anatomy import (
    backbone,
    cache_arguments,
    decoder_layers,
    forward_arguments,
    output_head,
    position_ids,
    unwrapped,
)
from vdr_cli.models.head import Head
from vdr_cli.models.logprobs import chunked_logps
from vdr_cli.models.packed_rows import packed_completion_hidden
from vdr_cli.models.prefix import PrefixCache, RepeatedPrompts, shares_prompts
from vdr_cli.models.prompt_tree import distinct_prompts, tree_completion_hidden
from vdr_cli.models.routing import Routers
from vdr_cli.samples import last_token


class HeadLogps(nn.Module):
    """The LM head applied in chunks. It owns no parameter: the engine registers the head's weight as its external
    parameter, so that ZeRO-3 gathers it around this module's forward and backward."""

    def __init__(self, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden (N, D), targets (N,) → log-probabilities (N,), entropies (N,)."""
        return chunked_logps(
            hidden, head.weight, head.bias, targets, temperature, head.scale, head.softcap, self.chunk_tokens
        )


class Policy(nn.Module):
    """The module that the DeepSpeed engine wraps: its forward is all that the loss needs from the model.

    share_prompts: read a prompt once for all its completions in the batch; None: where that works. It depends on the
    model alone, never on a batch: ranks that choose differently wait for each other forever.
    as_trees: read a prompt in one row with all its completions, see `prompt_tree`.
    packed: read each completion behind its prompt without padding between them, see `packed_rows`.
    Neither depends on the batch.
    watch_routers: keep what the experts' routers do, for `router_balance`; not with as_trees or packed.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        chunk_tokens: int | None = None,
        share_prompts: bool | None = None,
        as_trees: bool = False,
        packed: bool = False,
        watch_routers: bool = False,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.share_prompts = can_share_prompts(causal_lm) if share_prompts is None else share_prompts
        self.as_trees, self.packed = as_trees, packed
        self.head_logps = HeadLogps(chunk_tokens)
        self._routers = Routers(causal_lm) if watch_routers else None

    @property
    def calls_layers_twice(self) -> bool:
        """True when a forward goes through the layers twice, prompts first: see `shared_completion_hidden`."""
        return self.share_prompts and not self.as_trees and not self.packed

    def router_balance(self) -> Tensor | None:
        """() load-balancing loss of the tokens read since the last call, with gradient; None without watch_routers."""
        return None if self._routers is None else self._routers.take_balance()

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
        policy_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """prompts (B, P), completions (B, T) → log-probabilities (B, T), entropies (B, T), float32.

        policy_mask: the valid tokens whose numbers are computed; None: all. The numbers of other tokens are 0.
        """
        read = shared_completion_hidden if self.share_prompts else completion_hidden
        if self.as_trees:
            read = tree_completion_hidden
        elif self.packed:
            read = packed_completion_hidden
        hidden = read(self.causal_lm, prompt_ids, prompt_mask, completion_ids, completion_mask)
        wanted = completion_mask if policy_mask is None else policy_mask
        head = output_head(self.causal_lm)
        return _at_wanted_tokens(self.head_logps, head, hidden, completion_ids, wanted, temperature)


def completion_logps(
    causal_lm: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float,
    chunk_tokens: int | None = None,
    share_prompts: bool | None = None,
    as_trees: bool = False,
    packed: bool = False,
    policy_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Policy.forward for a model outside the engine: the twin, the reference."""
    policy = Policy(causal_lm, chunk_tokens, share_prompts, as_trees, packed)
    return policy(prompt_ids, prompt_mask, completion_ids, completion_mask, temperature, policy_mask)  # type: ignore[no-any-return]


def completion_hidden(
    causal_lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """(B, T, D): the hidden states that produced each completion token, at columns P−1 ... P+T−2."""
    ids = torch.cat([prompt_ids, completion_ids], dim=1)[:, :-1]  # (B, P+T-1): nothing is read off the last token
    mask = torch.cat([prompt_mask, completion_mask], dim=1)[:, :-1]
    hidden = _trunk(causal_lm, ids, mask, position_ids(mask), None)
    return hidden[:, prompt_ids.shape[1] - 1 :]


def completion_states(
    causal_lm: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    share_prompts: bool,
) -> Tensor:
    """(B, T + 1, D): the last hidden state of the prompt, then of each completion token; padding says nothing."""
    read = shared_completion_hidden if share_prompts else completion_hidden
    ids, mask = (nn.functional.pad(tensor, (0, 1)) for tensor in (completion_ids, completion_mask))
    return read(causal_lm, prompt_ids, prompt_mask, ids, mask)


def mean_state(states: Tensor, policy_mask: Tensor) -> Tensor:
    """(B, D): the mean over the policy's tokens of states (B, T + 1, D), as `completion_states` gives them."""
    mask = policy_mask.unsqueeze(2).to(states.dtype)
    return (states[:, 1:] * mask).sum(1) / mask.sum(1).clamp_min(1.0)


def end_state(states: Tensor, policy_mask: Tensor) -> Tensor:
    """(B, D): the state that predicts the policy's last token, of states (B, T + 1, D)."""
    return states[torch.arange(len(states), device=states.device), last_token(policy_mask)]


def shared_completion_hidden(
    causal_lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """`completion_hidden`, each prompt read once: its keys and values serve all its completions, gradients included.

    Always two passes, whatever the batch, and a graph through both: ZeRO-3's gathers must be the same on all ranks.
    Nothing is read off the last token, so it is passed over; a completion of one token is read in vain.
    """
    firsts, owner = distinct_prompts(prompt_ids, prompt_mask)
    prompts = OwnedPrompts(owner)
    cache = PrefixCache(len(decoder_layers(causal_lm)), prompts)
    first_mask = prompt_mask[firsts]
    at_prompts = _trunk(causal_lm, prompt_ids[firsts], first_mask, position_ids(first_mask), cache)
    prompts.width = prompt_ids.shape[1]
    T = completion_ids.shape[1]
    read = slice(0, max(T - 1, 1))
    mask = torch.cat([prompt_mask, completion_mask[:, read]], dim=1)
    positions = position_ids(mask)[:, prompt_ids.shape[1] :]
    at_completions = _trunk(causal_lm, completion_ids[:, read], mask, positions, cache)
    first = at_prompts[:, -1:].index_select(0, owner)  # (B, 1, D)
    return torch.cat([first, at_completions[:, : T - 1]], dim=1)  # (B, T, D)


def can_share_prompts(causal_lm: nn.Module) -> bool:
    """True if `shared_completion_hidden` works for this model as it is set up.

    Not when layers remember something else than keys and values (`shares_prompts`), and not with gradient
    checkpointing, which switches caches off.
    """
    checkpointing = bool(getattr(unwrapped(causal_lm), "is_gradient_checkpointing", False))
    return shares_prompts(causal_lm) and not checkpointing


class OwnedPrompts(RepeatedPrompts):
    """Any prompt for any row, and nothing written in place: for training."""

    def __init__(self, owner: Tensor) -> None:
        """owner: (B,) int64, the prompt of each completion."""
        super().__init__()
        self.owner = owner

    def joined(self, name: str, prompt: Tensor, own: Tensor) -> Tensor:
        """(U, H, P, d) and (B, H, T, d) to (B, H, P + T, d)."""
        return torch.cat([prompt.index_select(0, self.owner), own], dim=-2)


def _trunk(causal_lm: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: PrefixCache | None) -> Tensor:
    """Final hidden states (B, W, D) of these ids; mask covers what the cache holds as well."""
    trunk = backbone(causal_lm)
    arguments = forward_arguments(causal_lm, mask, positions) | cache_arguments(trunk, cache)
    return trunk(input_ids=ids, **arguments)[0]  # type: ignore[no-any-return]


def _at_wanted_tokens(
    head_logps: HeadLogps, head: Head, hidden: Tensor, targets: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Send the wanted positions of hidden (B, T, D) through the head and scatter the results to (B, T).

    A batch without wanted tokens sends its first position (the end of a prompt, always a real token) and
    multiplies by 0: every rank's backward must reach every parameter, or ZeRO's collectives do not match.
    """
    valid = mask.bool()
    sent = valid if bool(valid.any()) else torch.zeros_like(valid).index_fill_(1, valid.new_zeros(1).long(), True)
    logps, entropy = head_logps(hidden[sent], head, targets[sent], temperature)
    empty = logps.new_zeros(mask.shape)
    keep = valid.to(logps.dtype)
    return empty.masked_scatter(sent, logps) * keep, empty.masked_scatter(sent, entropy) * keep
