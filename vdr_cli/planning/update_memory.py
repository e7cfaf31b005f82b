"""Memory of an update by formula: what a micro-batch keeps for backward, and what backward adds. No torch.

It follows models/policy.py, packed_rows.py, prompt_tree.py and engine/sequence.py; tests hold it against what autograd
keeps, scripts/bench/bench_sequence.py against the memory of processes.
"""

from __future__ import annotations

from vdr_cli.models.limits import CHUNK_BYTES
from vdr_cli.planning.shape import Shape
from vdr_cli.planning.work import Work

FP32 = 4


def update_memory(shape: Shape, work: Work, device: str = "cuda") -> float:
    """Bytes that one micro-batch adds to the model states at its worst moment.

    That is backward's beginning, in the LM head's chunks of logits or in the last layer, whichever takes more. `device`
    sets the size of the chunks.
    """
    last_layer = _last_layer_bytes(shape, work)
    if work.checkpointing:
        last_layer += one_layer(shape, work)
    return activations(shape, work) + max(_head_bytes(shape, work, device), last_layer) + _whole_weights(shape, work)


def activations(shape: Shape, work: Work) -> float:
    """Bytes that one micro-batch keeps for backward: of every layer, and of what lies around them.

    Around them: the final norm and its float32 copy, the rotary embedding's two tables, the states that the head reads,
    a few numbers a token. With checkpointing a layer keeps its input alone.
    """
    tokens, e = read_tokens(work), work.element_bytes
    around = (e + FP32) * shape.hidden + 2 * e * shape.head_dim + 16
    at_head = wanted_tokens(work) * (e * shape.hidden + 24)
    if work.checkpointing:
        return tokens * (shape.layers * shape.hidden * e + around) + at_head + _shared_mask(work)
    return shape.layers * one_layer(shape, work) + tokens * around + at_head + _shared_mask(work)


def one_layer(shape: Shape, work: Work) -> float:
    """Bytes that one layer keeps of a micro-batch for backward, checkpointing aside.

    A mask is turned into numbers by each layer for itself, and makes it repeat keys and values for all heads. Prompts
    that are read first are in the keys of every completion.
    """
    e, tokens = work.element_bytes, read_tokens(work)
    kept = tokens * layer_bytes(shape, e)
    if work.sequence > 1:
        return kept + tokens * e * shape.query_width  # attention's output before and after its all-to-all
    if work.packed:
        return kept
    repeated = 2 * shape.query_width - shape.kv_width
    if work.trees:
        return kept + tokens * e * repeated
    rows, read = work.micro_batch_size, work.new_tokens if work.two_passes else work.row
    return kept + rows * e * (read * repeated + (work.row - read) * 2 * shape.query_width + read * work.row)


def layer_bytes(shape: Shape, e: int) -> int:
    """Bytes that one layer keeps of one token for backward, e bytes a number.

    (4e + 8)D + 4e·I + e·(2Q + KV) + 4·heads + 8: the residual stream and both norms (with their float32 copies), the
    gated MLP, queries, keys, values and the attention's output, its float32 normaliser and the norms'.
    """
    attention = e * (2 * shape.query_width + shape.kv_width) + FP32 * shape.heads
    return (4 * e + 8) * shape.hidden + 4 * e * shape.intermediate + attention + 2 * FP32


def read_tokens(work: Work) -> int:
    """Tokens of a micro-batch that a rank's layers read."""
    rows = work.micro_batch_size
    if work.trees or work.two_passes:
        return _prompts(work) * work.prompt_tokens + rows * work.new_tokens
    return -(-rows * work.row // work.sequence)


def wanted_tokens(work: Work) -> int:
    """Tokens of a micro-batch whose log-probabilities a rank computes, at most."""
    return min(work.micro_batch_size * work.new_tokens, read_tokens(work))


def _prompts(work: Work) -> int:
    return -(-work.micro_batch_size // work.group_size)


def _shared_mask(work: Work) -> float:
    """Bytes of the mask that all layers take: numbers for trees, truth values for padded rows."""
    if work.trees:
        width = work.prompt_tokens + min(work.group_size, work.micro_batch_size) * work.new_tokens
        return float(_prompts(work) * width**2 * work.element_bytes)
    if work.packed or work.two_passes:
        return 0.0
    return float(work.micro_batch_size * work.row**2)


def _last_layer_bytes(shape: Shape, work: Work) -> float:
    """Bytes that the last layer's backward adds to what is kept, in its MLP.

    Gradients of the residual stream and of the MLP's three intermediate results are there; what one of these three, the
    final norm and the head had kept is free by then.
    """
    e, tokens = work.element_bytes, read_tokens(work)
    gradients = e * (shape.hidden + 3 * shape.intermediate)
    freed = e * shape.intermediate + (e + FP32) * shape.hidden
    return float(tokens * (gradients - freed) - wanted_tokens(work) * e * shape.hidden)


def _head_bytes(shape: Shape, work: Work, device: str) -> float:
    """Bytes of the head's backward: two chunks of float32 logits, its gradient and that of the states."""
    wanted = wanted_tokens(work)
    logits = min(CHUNK_BYTES[device], 2 * FP32 * shape.vocabulary * wanted)
    return float(logits + FP32 * shape.embedding_parameters + wanted * work.element_bytes * shape.hidden)


def _whole_weights(shape: Shape, work: Work) -> float:
    """Bytes of weights and gradients that one backward holds unsharded at stage 3.

    Where prompts are read before completions every layer's gradient waits for the prompts' pass.
    """
    if work.stage < 3:
        return 0.0
    live = 2 * shape.layer_parameters + shape.embedding_parameters
    waiting = shape.layers * shape.layer_parameters if work.two_passes else 0
    return float(work.element_bytes * (live + waiting))
