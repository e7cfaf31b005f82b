"""Needs of a run: memory per GPU and bytes over the network per step, by formula. Pure arithmetic, no torch.

The formulas follow the code (engine/gathered.py, engine/build.py, models/policy.py) and are held against
measurements by scripts/verify/plan_check.py. GPU kernels' workspaces, NCCL's buffers and the allocator's
fragmentation come on top: leave a tenth of the memory free.
"""

from __future__ import annotations

from dataclasses import replace

from vdr_cli.models.limits import CHUNK_BYTES, JUDGED_TOKENS, MOST_OF_MEMORY, SERVER_MARGIN
from vdr_cli.models.placement import Placement, placement
from vdr_cli.planning.shape import Shape
from vdr_cli.planning.update_memory import layer_bytes, update_memory
from vdr_cli.planning.work import Work

FP32, BF16 = 4, 2
MASTER_AND_MOMENTS = 12
"""Bytes a parameter of float32 master weights and Adam's two moments."""


def model_states(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes per GPU between steps (ZeRO, Rajbhandari et al. 2020): N parameters of e bytes on W GPUs.

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
    if work.reward_models:
        states["reward models"] = sum(held_of(each, work) for each in work.reward_models)
    return states


def home_of(judge: Shape, work: Work) -> Placement:
    """The home of a reward model's weights between two steps, as engine/reward_models.py chooses it."""
    is_sharded = work.stage >= 3 and work.gpus > 1 and not work.by_layers
    return placement(weights_of(judge), int(work.gpu_bytes or 0), is_sharded, on_cpu=False)


def weights_of(judge: Shape) -> int:
    """Bytes of a reward model's weights, which are in bfloat16 on GPUs: it has no LM head."""
    return BF16 * replace(judge, tied=True).parameters


def held_of(judge: Shape, work: Work) -> float:
    """Bytes per GPU of a reward model between two steps."""
    share = {"device": 1.0, "sharded": 1 / work.gpus, "host": 0.0}[home_of(judge, work)]
    return share * weights_of(judge)


def phase_memory(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes per GPU that each phase adds to the model states."""
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
    if work.reward_models:
        memory["rewards"] = copied + sum(_judging(each, work) for each in work.reward_models)
    if work.members:
        memory["disagreement, at least"] = copied + _disagreement(shape, work)
    memory["update"] = update_memory(shape, work)
    return memory


def _judging(judge: Shape, work: Work) -> float:
    """Bytes per GPU that a reward model adds while it judges: weights that are not there yet, and a batch's states."""
    held = weights_of(judge) if home_of(judge, work) == "device" else 0
    tokens = max(JUDGED_TOKENS, work.row)
    return weights_of(judge) - held + tokens * BF16 * (8 * judge.hidden + 3 * judge.intermediate)


def _disagreement(shape: Shape, work: Work) -> float:
    """Bytes per GPU that the members need at least beside the weights; they take half of what is free.

    One member reads one group, or with rows divided this rank's part of one. Layer by layer there are one layer's keys,
    and every member's hidden state of every token waits for the next layer.
    """
    e, rows = work.element_bytes, work.groups_per_rank * work.group_size
    tokens = work.prompt_tokens + work.group_size * work.new_tokens
    waiting = work.groups_per_rank * tokens
    if work.sequence > 1:
        tokens, waiting = -(-work.row // work.sequence), rows * work.row
    kept = e * shape.layers * shape.kv_width * tokens if work.sequence == 1 else 0
    if work.by_layers:
        kept = e * shape.kv_width * tokens + e * shape.hidden * work.members * waiting
    return kept + tokens * layer_bytes(shape, e) + CHUNK_BYTES["cuda"]


def copy_of_weights(shape: Shape, work: Work) -> float:
    """Bytes per GPU of what rollout and disagreement read: nothing beside the weights below stage 3."""
    if work.stage < 3:
        return 0.0
    others = shape.parameters - shape.layers * shape.layer_parameters
    held = others + shape.layer_parameters if work.by_layers else shape.parameters
    return float(work.element_bytes * held)


def wants_layers(asked: str, shape: Shape, work: Work, gpu_bytes: float | None) -> bool:
    """engine.gather on GPUs of this much memory, as the engine decides it; `auto` is `whole` when unknown."""
    if work.stage < 3 or asked == "whole" or (asked == "auto" and gpu_bytes is None):
        return False
    before = replace(work, reward_models=())  # they are loaded after the engine has decided
    free = (gpu_bytes or 0.0) - sum(model_states(shape, before).values())
    return asked == "layer" or work.element_bytes * shape.parameters > MOST_OF_MEMORY * free


def peak_memory(shape: Shape, work: Work) -> float:
    """Bytes per GPU at the worst moment of a step."""
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
    judges = sum(weights_of(each) for each in work.reward_models if home_of(each, work) == "sharded")
    return {
        **{phase: e * numbers * share for phase, numbers in _gathered_before_the_update(shape, work).items()},
        **({"rewards": judges * share} if judges else {}),
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
