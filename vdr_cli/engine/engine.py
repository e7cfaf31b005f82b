"""One rank's view of the model being trained: the only object that knows about ZeRO.

The rest of the program sees a policy forward, `backward`, `step`, and the weights inside `gathered_model()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.engine import collectives, muon
from vdr_cli.engine.determinism import in_fixed_order
from vdr_cli.engine.ds_config import DsConfig, zero_stage
from vdr_cli.engine.gathered import GatheredModel
from vdr_cli.engine.gpu import peak_of
from vdr_cli.engine.sequence import SequenceGroup, divided_logps
from vdr_cli.models.anatomy import WholeLayer, has_experts, input_embeddings, output_head
from vdr_cli.models.policy import HeadLogps, completion_logps, completion_states
from vdr_cli.samples import Completions, to_device

KEPT_OF_SETTINGS = ("betas", "eps", "weight_decay", "momentum")
"""Keys of an optimizer's parameter group that keep the run's own settings, whatever checkpoint was loaded."""

Portion = tuple[slice | None, Completions]
"""A slice of a rank's completions, and the completions in it. None: the rank only takes part in the collectives."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step."""

    grad_norm: float
    """Global gradient norm before clipping; inf when refused."""
    refused: bool
    """True when the gradient was not finite on any rank: the weights are as before, on all ranks."""


class Engine:
    """The policy under DeepSpeed. Every method that touches weights is a collective unless it says otherwise."""

    def __init__(
        self,
        ds_engine: Any,
        causal_lm: nn.Module,
        gathered: GatheredModel,
        ds_config: DsConfig,
        by_layers: bool,
        muon_clip: float | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        """by_layers: no full copy of the weights is ever made on a device (engine.gather: layer).

        muon_clip: train.max_grad_norm where the optimizer is Muon; None: DeepSpeed clips.
        sequence: the ranks that make every forward and backward of the update together; None: each makes its own.
        """
        self.ds_engine = ds_engine
        self.causal_lm = causal_lm
        self.gathered = gathered
        self.ds_config = ds_config
        self.stage = zero_stage(ds_config)
        self.device: torch.device = ds_engine.device
        self.has_frozen = not all(parameter.requires_grad for parameter in causal_lm.parameters())
        self.by_layers = by_layers
        self._muon_clip = muon_clip
        self.sequence = sequence
        self.version = 0
        """Grows with every optimizer step: equal versions are equal weights."""
        groups = ds_engine.optimizer.param_groups
        self._given = [{key: group[key] for key in KEPT_OF_SETTINGS if key in group} for group in groups]
        self._rates = [group.get("rate", 1.0) for group in groups]  # Muon's over the learning rate
        self._whole_layer: WholeLayer | None = None

    # ---- weights ---------------------------------------------------------------------------------------------------

    @contextmanager
    def gathered_model(self) -> Iterator[Any]:
        """The hook-free model in eval mode, without gradients.

        It is whole, and its forwards are no collectives. With engine.gather `layer` its decoder layers are not: a
        forward gathers them one after another, so every rank must make as many.
        """
        with self.show(self.gathered) as model, torch.no_grad():
            yield model

    @contextmanager
    def show(self, other: GatheredModel) -> Iterator[Any]:
        """This gathered model, the policy's or one that is sharded like it, as `gathered_model` describes."""
        if not self.by_layers:
            with other.whole_model() as model:
                yield model
            return
        before = self._whole_layer
        with other.layer_by_layer() as (model, self._whole_layer):
            try:
                yield model
            finally:
                self._whole_layer = before

    @contextmanager
    def whole_layers(self) -> Iterator[WholeLayer]:
        """Inside `gathered_model` with engine.gather `layer`: makes one decoder layer whole at a time.

        Every rank enters whole_layer(0), whole_layer(1), ... in the same order, whatever happens to it in between.
        """
        assert self._whole_layer is not None
        yield self._whole_layer

    def for_writing(self, of: GatheredModel | None = None) -> AbstractContextManager[Any]:
        """The full model for rank 0 to write to a file; with engine.gather `layer` in the host's memory."""
        chosen = of or self.gathered
        return chosen.on_host(wanted=collectives.is_main()) if self.by_layers else chosen.whole_model()

    @contextmanager
    def copied_to_host(self, wanted: bool) -> Iterator[Any]:
        """Inside `gathered_model` with engine.gather `layer`: the full model in the host's memory, empty elsewhere."""
        assert self._whole_layer is not None
        with self.gathered.copied_to_host(self._whole_layer, wanted) as model:
            yield model

    def read_logps(
        self, model: Any, completions: Completions, micro_batch_size: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) of the completions under a gathered model; float32, on the CPU.

        Micro-batches are read as the update reads them: unchanged weights give the same numbers to the last bit. No
        collective where the model is whole and rows are not divided. Otherwise ranks with fewer micro-batches read a
        single token instead.
        """
        logps = torch.zeros(completions.completion_ids.shape)
        entropy = torch.zeros_like(logps)
        own = self._micro_batches(completions, micro_batch_size, matched=self.by_layers or self.sequence is not None)
        for rows, part in own if self.sequence is None else _everybodys(list(own), self.sequence):
            found = self._read(model, part, temperature)
            if rows is not None:
                T = part.completion_ids.shape[1]
                logps[rows, :T], entropy[rows, :T] = found
        return logps, entropy

    def read_states(
        self, model: Any, completions: Completions, micro_batch_size: int, reduce: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """(B, D) last hidden states of the completions under a gathered model; float32, on the CPU.

        reduce: from states (b, T + 1, D), the prompt's end first, and policy_mask (b, T) to (b, D). Collective as
        read_logps.
        """
        found = []
        for rows, part in self._micro_batches(completions, micro_batch_size, matched=self.by_layers):
            on = to_device(part, self.device)
            tokens = on.prompt_ids, on.prompt_mask, on.completion_ids, on.completion_mask
            states = completion_states(model, *tokens, self.share_prompts)
            if rows is not None:
                found.append(reduce(states.float(), on.policy_mask).cpu())
        return torch.cat(found)

    def _micro_batches(self, completions: Completions, micro_batch_size: int, matched: bool) -> Iterator[Portion]:
        """Rows and what they hold without common padding.

        matched: as many on every rank, None and one token where others have more to read. Collective then.
        """
        starts = range(0, len(completions), micro_batch_size)
        most = int(collectives.all_reduce_max([len(starts)])[0]) if matched else len(starts)
        for start in starts:
            rows = slice(start, start + micro_batch_size)
            yield rows, completions.rows(rows).trimmed()
        for _ in range(most - len(starts)):
            yield None, _one_token()

    def _read(self, model: Any, part: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """(B, T) each, on the device: one micro-batch, as the policy reads it."""
        on = to_device(part, self.device)
        tokens = on.prompt_ids, on.prompt_mask, on.completion_ids, on.completion_mask
        if self.sequence is not None:
            with self.sequence.attention_of(model):
                return divided_logps(model, self.sequence, HeadLogps(), *tokens, temperature, on.policy_mask)
        return completion_logps(
            model,
            *tokens,
            temperature,
            share_prompts=self.share_prompts,
            as_trees=self.as_trees,
            packed=self.packed,
            policy_mask=on.policy_mask,
        )

    # ---- update ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
        policy_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`Policy.forward` with gradient: log-probabilities and entropies (B, T) of the completions."""
        tokens = prompt_ids, prompt_mask, completion_ids, completion_mask
        return self.ds_engine(*tokens, temperature, policy_mask)  # type: ignore[no-any-return]

    def router_balance(self) -> Tensor | None:
        """() load-balancing loss of the newest forward, with gradient; None without grpo.router_aux_loss_coef."""
        return self.ds_engine.module.router_balance()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the step's loss; `last` closes the step's accumulation.

        DeepSpeed averages gradients over ranks; the loss is a sum over ranks, hence the factor. A loss that is not
        finite can have a finite gradient, so it is made NaN: `step` then refuses on every rank.
        """
        self.ds_engine.set_gradient_accumulation_boundary(last)
        finite = torch.where(loss.isfinite(), 1.0, torch.nan).to(loss.device)
        with in_fixed_order(self.causal_lm, self.device):
            self.ds_engine.backward(loss * finite * collectives.world_size(), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights once. Refused on all ranks alike when the gradient is not finite."""
        self.version += 1
        groups = self.ds_engine.optimizer.param_groups
        for group, rate, given in zip(groups, self._rates, self._given, strict=True):
            # A checkpoint brings those of its run, and a universal one gives all groups the first one's.
            group.update(given, lr=learning_rate * rate)
        if not hasattr(self.ds_engine.optimizer, "overflow"):
            return self._plain_step()
        skipped = self.ds_engine.skipped_steps
        if self._muon_clip is not None:
            norm = muon.step(self.ds_engine, self._muon_clip)
            return StepResult(norm, refused=self.ds_engine.skipped_steps > skipped)
        self.ds_engine.step()
        refused = self.ds_engine.skipped_steps > skipped
        norm = self.ds_engine.get_global_grad_norm()
        return StepResult(math.inf if refused or norm is None else float(norm), refused)

    def _plain_step(self) -> StepResult:
        """ZeRO stage 0 in float32, where DeepSpeed refuses nothing. Every rank holds the same reduced gradient."""
        gradients = [parameter.grad for parameter in self.causal_lm.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self.ds_engine.step()
            return StepResult(norm, refused=False)
        self.ds_engine.zero_grad()
        return StepResult(math.inf, refused=True)

    # ---- properties ------------------------------------------------------------------------------------------------

    @property
    def share_prompts(self) -> bool:
        """True when the policy reads a prompt once for its completions; who does the same gets its exact numbers."""
        return bool(self.ds_engine.module.share_prompts)

    @property
    def as_trees(self) -> bool:
        """True when a prompt and its completions are one row to the policy."""
        return bool(self.ds_engine.module.as_trees)

    @property
    def packed(self) -> bool:
        """True when the policy reads each completion right behind its prompt, without padding between them."""
        return bool(self.ds_engine.module.packed)

    @property
    def num_matrix_parameters(self) -> float:
        """Parameters that every token is multiplied with: all but the embeddings, unless they are the head too."""
        sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in self.causal_lm.parameters()}
        table = input_embeddings(self.causal_lm).weight
        tied = output_head(self.causal_lm).weight is table
        return float(sum(sizes.values()) - (0 if tied else sizes[id(table)]))

    def peak_flops(self) -> float | None:
        """Peak bfloat16 operations per second of this rank's device.

        None on a CPU, in float32, for unknown GPUs and for models with experts.
        """
        dtype = next(self.causal_lm.parameters()).dtype
        if self.device.type != "cuda" or dtype is not torch.bfloat16 or has_experts(self.causal_lm):
            return None
        return peak_of(torch.cuda.get_device_name(self.device))


def _everybodys(own: list[Portion], sequence: SequenceGroup) -> Iterator[Portion]:
    """The portions of the whole group, every rank's first, then every rank's second, ...; rows are None for others'.

    Collective in the group; as many portions on each of its ranks.
    """
    for at_once in zip(*sequence.gather_objects(own), strict=True):
        for rank, (rows, part) in enumerate(at_once):
            yield rows if rank == sequence.rank else None, part


def _one_token() -> Completions:
    """One completion of one token, for ranks that take part in a forward without rows of their own."""
    ids, valid = torch.zeros((1, 1), dtype=torch.int64), torch.ones((1, 1), dtype=torch.bool)
    return Completions(ids, valid, ids, valid, torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool))
