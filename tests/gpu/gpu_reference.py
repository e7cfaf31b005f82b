"""Models, completions and plain float64 loops that the GPU tests share."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from vdr_cli.disagreement import masks
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.models import anatomy
from vdr_cli.samples import Completions

VOCABULARY, LAYERS = 61, 3
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "n_heads": 4,
    "sliding_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.25,
    "init_std": 0.25,
}
ARCHITECTURES = ["qwen2", "llama", "gpt2", "gemma2", "mixtral", "opt", "bloom"]


@functools.cache
def sibling(name: str) -> Any:
    """The module of another test file, such as models/test_logprobs, for the loops that it compares with."""
    path = Path(__file__).parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"gpu_sibling_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


@functools.cache
def tiny(kind: str = "qwen2", **changes: object) -> nn.Module:
    """A random float32 model on the CPU, the same on every machine; weights large enough for members to differ."""
    config_class = CONFIG_MAPPING[kind]
    known = inspect.signature(config_class.__init__).parameters
    settings = {key: value for key, value in {**SMALL, **changes}.items() if key in known}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**settings)).float().eval()


def model_on(device: torch.device, dtype: torch.dtype = torch.float32, kind: str = "qwen2", **changes: object) -> Any:
    """A copy of `tiny` there."""
    return copy.deepcopy(tiny(kind, **changes)).to(device, dtype)


def ragged(device: torch.device, groups: int = 2, group_size: int = 3, prompt: int = 6, length: int = 5) -> Completions:
    """Completions of unequal lengths under left-padded prompts."""
    generator = torch.Generator().manual_seed(0)
    rows = groups * group_size
    prompts = torch.randint(3, VOCABULARY, (groups, prompt), generator=generator)
    prompt_mask = torch.ones(groups, prompt, dtype=torch.bool)
    for group in range(groups):
        prompt_mask[group, : (2 * group) % prompt] = False
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([1 + (row * 3 + 1) % length for row in range(rows)])[:, None]
    made = Completions(
        torch.where(prompt_mask, prompts, 0).repeat_interleave(group_size, 0),
        prompt_mask.repeat_interleave(group_size, 0),
        torch.where(mask, ids, 0),
        mask,
        torch.zeros(rows, length),
        torch.zeros(rows, dtype=torch.bool),
    )
    return moved(made, device)


def moved(completions: Completions, device: torch.device) -> Completions:
    return Completions(*(tensor.to(device) for tensor in vars(completions).values()))


def tokens(completions: Completions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = completions
    return c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask


@torch.no_grad()
def logits_by_hand(model: nn.Module, completions: Completions, spec: EnsembleSpec | None, step: int) -> Tensor:
    """(M, B, T, V) float64 on the model's device: one whole row and one member at a time, masks multiplied in by hooks.

    spec: None reads the plain model, M = 1. The weights are the model's, in float64.
    """
    exact: Any = copy.deepcopy(model).double()
    completions = moved(completions, next(exact.parameters()).device)
    layers, width = anatomy.decoder_layers(exact), anatomy.text_config(exact).hidden_size
    first = len(layers) - ((spec.last_k if spec else None) or len(layers))
    members = spec.members if spec else 1
    rows, length = completions.completion_ids.shape
    device = completions.completion_ids.device
    vocabulary = anatomy.output_head(exact).weight.shape[0]
    logits = torch.zeros(members, rows, length, vocabulary, dtype=torch.float64, device=device)
    for member in range(members):
        handles = []
        for number in range(first, len(layers)) if spec else ():
            for site, block in zip(("attention", "mlp", "mlp"), anatomy.residual_blocks(layers[number]), strict=False):
                mask = masks.member_mask(spec, step, member, number, site, width).to(device).double()

                def multiply(module: nn.Module, arguments: object, output: Any, mask: Tensor = mask) -> Any:
                    return (output[0] * mask, *output[1:]) if isinstance(output, tuple) else output * mask

                handles.append(block.register_forward_hook(multiply))
        for row in range(rows):
            prompt = completions.prompt_ids[row][completions.prompt_mask[row]]
            answer = completions.completion_ids[row][completions.completion_mask[row]]
            read = exact(input_ids=torch.cat([prompt, answer])[None]).logits[0]
            logits[member, row, : len(answer)] = read[len(prompt) - 1 : -1]
        for handle in handles:
            handle.remove()
    return logits


def logp_error(dtype: torch.dtype, logits: Tensor) -> float:
    """Bound on the error of a log-probability that a model of this dtype gives, against float64 with its weights.

    A bfloat16 is off by 2^-9 of itself at most. Each of a layer's two branches is rounded on its way in, inside, on its
    way out and where it joins the residual stream, and logits twice more: 8 L + 2 roundings of numbers as large as the
    largest logit, were they all to add up.
    """
    unit = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-22
    return unit * (8 * LAYERS + 2) * float(logits.abs().max())


def measure_error(dtype: torch.dtype, measure: Tensor) -> float:
    """Bound on the error of bald or rmi, (B, T) float64, from such a model.

    Members share most of what is rounded, and what they share cancels: bfloat16 is allowed a tenth of the largest.
    """
    return (0.1 if dtype == torch.bfloat16 else 5e-6) * float(measure.max())


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach(), expected.detach().double()
    return float((found.to(expected.device).double() - expected).norm() / expected.norm())
