"""The work of one step and the GPUs it is done on, as the formulas of memory and traffic take it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from vdr_cli.models.limits import PACKED_TOKENS, TREE_TOKENS
from vdr_cli.planning.shape import Shape


@dataclass(frozen=True)
class Work:
    """The work of one step, and the GPUs it is done on."""

    gpus: int
    stage: int = 3
    element_bytes: int = 2
    prompts_per_step: int = 8
    group_size: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 256
    micro_batch_size: int = 8
    num_iterations: int = 1
    minibatches: int = 1
    cached_tokens: int = 262_144
    """rollout.batch_tokens: most tokens decoded at once on a rank."""
    members: int = 0
    """0: no disagreement."""
    checkpointing: bool = False
    reference: bool = False
    """A frozen reference model (grpo.beta above 0, or bonus.source novelty)."""
    by_layers: bool = False
    """engine.gather layer (stage 3): no full copy of the weights, one decoder layer at a time; vLLM samples."""
    sequence: int = 1
    """engine.sequence_parallel: ranks that hold parts of the same rows in the update."""
    reward_models: tuple[Shape, ...] = ()
    """Reward models (`model:PATH`), as decoders."""
    gpu_bytes: float | None = None
    """Memory of a GPU; None: unknown, so that reward models are not kept there whole."""
    balances_experts: bool = False
    """grpo.router_aux_loss_coef above 0."""
    muon: bool = False
    """Muon moves the layers' matrices: one mean a parameter, gradients all-reduced."""
    gloo: bool = False
    """CPU: gloo has no reduce-scatter, torch does an all-reduce instead and keeps a share of it."""

    @property
    def groups_per_rank(self) -> int:
        return -(-self.prompts_per_step // self.gpus)

    @property
    def row(self) -> int:
        """Tokens of a prompt with its completion."""
        return self.prompt_tokens + self.new_tokens

    @property
    def packed(self) -> bool:
        """The update reads rows without padding inside, and no mask (models/packed_rows.py)."""
        return self.sequence > 1 or (self.new_tokens >= PACKED_TOKENS and not self.balances_experts)

    @property
    def trees(self) -> bool:
        """The update reads a prompt and its completions as one row (models/prompt_tree.py)."""
        short = self.group_size * self.new_tokens <= TREE_TOKENS and not self.balances_experts
        return short and self.sequence == 1

    @property
    def two_passes(self) -> bool:
        """The update reads prompts first, then all their completions."""
        return not (self.packed or self.trees or self.checkpointing)

    @property
    def micro_batches(self) -> int:
        """Those that a rank takes part in, per optimizer step."""
        groups = -(-self.groups_per_rank // self.minibatches)
        return -(-groups * self.group_size // self.micro_batch_size) * self.sequence

    @property
    def updates(self) -> int:
        """Optimizer steps from one rollout."""
        return self.num_iterations * self.minibatches
