"""A trial before a run, on a few tokens: the model samples from the distribution that it reads off whole texts."""

from __future__ import annotations

import torch
from torch import nn

from vdr_cli.errors import ConfigError, VdrError
from vdr_cli.models.anatomy import output_head, unwrapped
from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import CudaGraphs, TransformersRollout
from vdr_cli.samples import Sampling, to_device
from vdr_cli.system.text import first_line

PROMPT_WIDTHS = (5, 2)
COMPLETIONS = 4
"""Completions of each prompt."""

NEW_TOKENS = 4
ENDING = 3
"""Every third token of the vocabulary ends a completion, so that rows leave the batch."""

TOLERANCE = 1e-2
"""Largest difference in float32, as a share of the mean log-probability. Not smaller: transformers' Nemotron-H limits a
state-space layer's time steps when it reads a prompt, and not when it samples."""

HALF_TOLERANCE = 5e-2
"""The same in half precision."""


@torch.no_grad()
def check_sampling(model: nn.Module, cuda_graphs: CudaGraphs) -> None:
    """Raise ConfigError unless sampled tokens have the log-probabilities that a reading without a cache gives them.

    It finds models that ignore or reject transformers' key-value cache, that see later tokens, and whose memory of a
    prompt cannot be given to several completions. Only for sampling in this process. cuda_graphs: the run's setting,
    which selects the cache; nothing is captured.
    """
    kind, V = type(unwrapped(model)).__name__, output_head(model).weight.shape[0]
    prompts = [[(7 * token + 3) % V for token in range(width)] for width in PROMPT_WIDTHS]
    request = RolloutRequest(prompts, COMPLETIONS, Sampling(max_new_tokens=NEW_TOKENS), range(len(prompts)))
    try:
        rollout = TransformersRollout(pad_id=0, eos_ids=range(0, V, ENDING), cuda_graphs=cuda_graphs)
        rollout.can_capture = False
        c = to_device(rollout.generate(model, request), output_head(model).weight.device)
        read, _ = completion_logps(model, c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask, 1.0)
    except VdrError:
        raise
    except Exception as error:  # whatever an unknown architecture trips over
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"model: {kind} cannot be sampled token by token ({first_line(error)}): its code and "
            "transformers' key-value cache do not fit each other; use a version of it that runs with transformers' "
            "DynamicCache, rollout.backend vllm in vdr train, or another model"
        ) from error
    off = (read - c.sampler_logps).abs().sum(1) / c.completion_mask.sum(1)  # (B,) nats a token; padding is 0 in both
    tolerance = TOLERANCE if output_head(model).weight.dtype == torch.float32 else HALF_TOLERANCE
    if float(off.max()) > tolerance * max(float(-read[c.completion_mask].mean()), 1.0):
        raise ConfigError(
            f"model: {kind} gives tokens other log-probabilities when it samples them one by one than when it reads "
            f"them together ({float(off.max()):.2g} nats a token apart): it ignores the key-value cache, or sees later "
            "tokens; use a causal language model that works with transformers' generate"
        )
