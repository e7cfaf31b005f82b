"""Needs of a run: memory per GPU and bytes over the network per step, by formula. Pure arithmetic, no torch.

The formulas follow the code (engine/gathered.py, engine/build.py, models/policy.py) and are held against
measurements by scripts/verify/plan_check.py. GPU kernels' workspaces, NCCL's buffers and the allocator's
fragmentation come on top: leave a tenth of the memory free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vdr_cli.errors import ConfigError
from vdr_cli.models.limits import CHUNK_BYTES, MOST_OF_MEMORY, TREE_TOKENS

FP32 = 4
MASTER_AND_MOMENTS = 12
"""Bytes a parameter of float32 master weights and Adam's two moments."""


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json describes it."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    attention_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Keys and values of one token in one layer, numbers."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden * (2 * self.query_width + self.kv_width)
        mlp = 3 * self.hidden * self.intermediate * self.experts
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + mlp + router

    @property
    def layer_parameters(self) -> int:
        bias = self.query_width + self.kv_width if self.attention_bias else 0
        return self.layer_matrices + bias + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        ends = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends + self.hidden


SIZES = {
    "0.5B": Shape(896, 24, 4864, 14, 2, 64, 151_936, tied=True, attention_bias=True),
    "7B": Shape(3584, 28, 18_944, 28, 4, 128, 152_064, attention_bias=True),
    "32B": Shape(5120, 64, 27_648, 40, 8, 128, 152_064, attention_bias=True),
    "70B": Shape(8192, 80, 28_672, 64, 8, 128, 128_256),
}
"""Qwen2.5 0.5B, 7B, 32B and Llama 3 70B."""


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
    muon: bool = False
    """Muon moves the layers' matrices: one mean a parameter, gradients all-reduced."""
    gloo: bool = False
    """CPU: gloo has no reduce-scatter, torch does an all-reduce instead and keeps a share of it."""

    @property
    def groups_per_rank(self) -> int:
        return -(-self.prompts_per_step // self.gpus)

    @property
    def two_passes(self) -> bool:
        """The update reads prompts first, then all their completions: not with checkpointing, nor as trees, nor when
        rows are divided among ranks.
        """
        whole = self.sequence == 1 and not self.checkpointing
        return whole and self.group_size * self.new_tokens > TREE_TOKENS

    @property
    def micro_batches(self) -> int:
        """Those that a rank takes part in, per optimizer step."""
        groups = -(-self.groups_per_rank // self.minibatches)
        return -(-groups * self.group_size // self.micro_batch_size) * self.sequence

    @property
    def updates(self) -> int:
        """Optimizer steps from one rollout."""
        return self.num_iterations * self.minibatches


SERVER_MARGIN = 0.05
"""Share of a GPU that neither vLLM nor the trainer plans for; rollout/vllm_server.py leaves the same."""


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a Hugging Face config.json. ConfigError when it describes no decoder that we know."""
    inner: Mapping[str, Any] = config.get("text_config") or config
    names = {"hidden": ("hidden_size", "n_embd", "d_model"), "layers": ("num_hidden_layers", "n_layer")}
    names |= {"heads": ("num_attention_heads", "n_head"), "vocabulary": ("vocab_size",)}
    found = {ours: next((inner[key] for key in keys if inner.get(key)), None) for ours, keys in names.items()}
    missing = [names[ours][0] for ours, value in found.items() if value is None]
    if missing:
        raise ConfigError(f"the model's config.json has no {missing[0]}; give a causal language model or a size")
    hidden, heads = int(found["hidden"]), int(found["heads"])  # type: ignore[arg-type]
    bias = inner.get("attention_bias", inner.get("model_type") == "qwen2")
    return Shape(
        hidden=hidden,
        layers=int(found["layers"]),  # type: ignore[arg-type]
        intermediate=int(inner.get("moe_intermediate_size") or inner.get("intermediate_size") or 4 * hidden),
        heads=heads,
        kv_heads=int(inner.get("num_key_value_heads") or heads),
        head_dim=int(inner.get("head_dim") or hidden // heads),
        vocabulary=int(found["vocabulary"]),  # type: ignore[arg-type]
        tied=bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))),
        experts=int(inner.get("num_experts") or inner.get("num_local_experts") or 1),
        attention_bias=bool(bias),
    )


def model_states(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes a GPU between steps (ZeRO, Rajbhandari et al. 2020): N parameters of e bytes on W GPUs.

    weights eN, gradients eN, master weights and moments 12N (8 for Muon's); stage 1 divides the last by W, stage 2 the
    gradients as well, stage 3 all. A reference model adds eN, divided by W at stage 3.
    """
    n, w, e = shape.parameters, work.gpus, work.element_bytes
    shard_weights, shard_gradients = (w if work.stage >= 3 else 1), (w if work.stage >= 2 else 1)
    saved = FP32 * shape.layers * shape.layer_matrices if work.muon else 0
    states = {
        "weights": e * n / shard_weights,
        "gradients": e * n / shard_gradients,
        "master weights, moments": (MASTER_AND_MOMENTS * n - saved) / (w if work.stage >= 1 else 1),
    }
    if work.reference:
        states["reference model"] = e * n / shard_weights
    return states


def phase_memory(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes a GPU that each phase adds to the model states."""
    e, s = work.element_bytes, shape
    copied = copy_of_weights(shape, work)
    row = work.prompt_tokens + work.new_tokens
    completions = work.groups_per_rank * work.group_size
    decoded = min(work.cached_tokens, completions * row)
    memory = {"rollout": copied}  # by layers vLLM samples, elsewhere
    if not work.by_layers:
        memory["rollout"] += e * s.layers * s.kv_width * decoded + FP32 * completions * s.vocabulary
    if work.reference:
        memory["reference"] = 2 * copied + CHUNK_BYTES["cuda"]
    if work.members:
        # It takes half of what is free; the least it can work with is one member's reading of one group.
        tokens = work.prompt_tokens + work.group_size * work.new_tokens
        kept = e * s.layers * s.kv_width * tokens
        if work.by_layers:  # one layer's keys; every member's hidden state of every token waits for the next layer
            kept = e * s.kv_width * tokens + e * s.hidden * work.members * work.groups_per_rank * tokens
        memory["disagreement, at least"] = copied + kept + tokens * _layer_bytes(s, e) + CHUNK_BYTES["cuda"]
    memory["update"] = activations(shape, work) + CHUNK_BYTES["cuda"] + _whole_in_the_update(shape, work)
    return memory


def _whole_in_the_update(shape: Shape, work: Work) -> float:
    """Bytes of weights and gradients that one backward holds unsharded at stage 3.

    Where prompts are read before completions every layer's gradient waits for the prompts' pass.
    """
    if work.stage < 3:
        return 0.0
    live = 2 * shape.layer_parameters + shape.embedding_parameters
    waiting = shape.layers * shape.layer_parameters if work.two_passes else 0
    return float(work.element_bytes * (live + waiting))


def copy_of_weights(shape: Shape, work: Work) -> float:
    """Bytes a GPU of what rollout and disagreement read: nothing beside the weights below stage 3."""
    if work.stage < 3:
        return 0.0
    others = shape.parameters - shape.layers * shape.layer_parameters
    held = others + shape.layer_parameters if work.by_layers else shape.parameters
    return float(work.element_bytes * held)


def wants_layers(asked: str, shape: Shape, work: Work, gpu_bytes: float | None) -> bool:
    """engine.gather on GPUs of this much memory, as the engine decides it; `auto` is `whole` when unknown."""
    if work.stage < 3 or asked == "whole" or (asked == "auto" and gpu_bytes is None):
        return False
    free = (gpu_bytes or 0.0) - sum(model_states(shape, work).values())
    return asked == "layer" or work.element_bytes * shape.parameters > MOST_OF_MEMORY * free


def activations(shape: Shape, work: Work) -> float:
    """Bytes that one micro-batch keeps for backward.

    A layer keeps (4e + 8)D + 4e·I + 2e·(Q + KV) a token: the residual stream and both norms (with their
    float32 copies), the gated MLP, queries, keys, values and the attention's output, e bytes a number.
    With checkpointing each layer keeps its input, and one layer at a time all of it. Ranks that divide rows keep their
    part of them; each reads whole rows then, its prompts not once for all.
    """
    row = work.prompt_tokens + work.new_tokens
    tokens = -(-work.micro_batch_size * row // work.sequence)
    layer = _layer_bytes(shape, work.element_bytes)
    if work.sequence > 1:
        layer += work.element_bytes * shape.query_width  # attention's output before and after its all-to-all
    if not work.checkpointing and work.sequence > 1:
        return tokens * shape.layers * layer
    if not work.checkpointing:
        # A group's prompt is read once for the completions of the micro-batch.
        groups = -(-work.micro_batch_size // work.group_size)
        tokens = groups * work.prompt_tokens + work.micro_batch_size * work.new_tokens
        return tokens * shape.layers * layer
    return tokens * (shape.layers * shape.hidden * work.element_bytes + layer)


def peak_memory(shape: Shape, work: Work) -> float:
    """Bytes a GPU at the worst moment of a step."""
    return sum(model_states(shape, work).values()) + max(phase_memory(shape, work).values())


def server_share(shape: Shape, work: Work, gpu_bytes: float, sleeps: bool) -> float:
    """Share of a GPU that a vLLM server beside the trainer can have, in [0, 1].

    sleeps: it has memory only while the trainer holds its states and the copy of its weights; else always.
    """
    while_sampling = sum(model_states(shape, work).values()) + copy_of_weights(shape, work)
    held = while_sampling if sleeps else peak_memory(shape, work)
    return max(1.0 - held / gpu_bytes - SERVER_MARGIN, 0.0)


def traffic(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes a GPU receives over the network in a step, by phase.

    An all-gather or reduce-scatter of S bytes moves S·(W−1)/W to every GPU, an all-reduce twice that.
    Stage 3: one gather of all weights for rollout, reference and disagreement; in the update each
    micro-batch gathers the weights for forward and backward and scatters the gradients. Where prompts are
    read before completions the layers run twice, so they are gathered twice as often; their gradients are scattered
    once. Below stage 3 the weights are whole and only gradients and updated weights travel.
    """
    e, w = work.element_bytes, work.gpus
    n, ends = shape.parameters, shape.embedding_parameters * (1 if shape.tied else 2)
    share = (w - 1) / w
    scatter = 2.0 if work.gloo or work.muon else 1.0
    micro = work.micro_batches * work.updates
    exchanged = _exchanged_heads(shape, work)
    if work.stage < 3:
        synced = {0: 2.0, 1: 2.0, 2: scatter}[work.stage]  # gradients: all-reduce, or reduce-scatter
        per_step = micro if work.stage == 2 else work.updates
        weights = work.updates if work.stage else 0
        return {"rollout and disagreement": 0.0, "update": e * n * (synced * per_step + weights) * share + exchanged}
    layers = n - ends
    gathered = 4.0 * layers + 2.5 * ends if work.two_passes else 2.0 * n
    return {
        **{phase: e * numbers * share for phase, numbers in _gathered_before_the_update(shape, work).items()},
        "update": (e * (gathered + scatter * n) * micro + _muons_gathers(shape, work)) * share + exchanged,
    }


def _exchanged_heads(shape: Shape, work: Work) -> float:
    """Bytes of the all-to-alls around attention: queries, keys, values and output of a rank's share of the tokens, in
    forward and backward, with checkpointing once more.
    """
    completions = work.groups_per_rank * work.group_size * work.num_iterations
    tokens = completions * (work.prompt_tokens + work.new_tokens)
    numbers = tokens * shape.layers * (2 * shape.query_width + shape.kv_width)
    passes = 3 if work.checkpointing else 2
    return float(work.element_bytes * numbers * passes * (work.sequence - 1)) / work.sequence


def _muons_gathers(shape: Shape, work: Work) -> float:
    """Bytes of a rollout's optimizer steps: gradients and means in float32, gathered before Muon and again after it."""
    return 4.0 * FP32 * shape.layers * shape.layer_matrices * work.updates if work.muon else 0.0


def _gathered_before_the_update(shape: Shape, work: Work) -> dict[str, float]:
    """Parameters gathered by phase at stage 3.

    Layer by layer: once to send them to vLLM, once for each pass that checks what arrived, once by all members.
    """
    n, layers = shape.parameters, shape.layers * shape.layer_parameters
    reference = n if work.reference else 0
    if not work.by_layers:
        return {"rollout and disagreement": float(n + reference)}
    passes = 2 if work.two_passes else 1
    rest = n - layers + (layers if work.members else 0)
    if work.reference:
        rest += n - layers + layers * passes * work.micro_batches * work.minibatches
    return {"weights to vLLM": float(layers * (1 + passes)), "reference and disagreement": float(rest)}


def _layer_bytes(shape: Shape, e: int) -> int:
    """Bytes that one layer keeps of one token for backward."""
    return (4 * e + 8) * shape.hidden + 4 * e * shape.intermediate + e * (2 * shape.query_width + shape.kv_width)
