"""Memory that an update keeps for backward: the formula against autograd, in every way of reading."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vdr_cli.models.policy import Policy
from vdr_cli.planning import work as works
from vdr_cli.planning.shape import Shape, shape_of
from vdr_cli.planning.update_memory import activations, update_memory
from vdr_cli.planning.work import Work

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 160, "num_attention_heads": 4}
WIDE = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 384, "num_attention_heads": 6}
FLOAT = Work(gpus=1, element_bytes=4, group_size=2, prompt_tokens=40, new_tokens=200, micro_batch_size=4)
WAYS = {
    "packed": {},
    "packed, checkpointing": {"checkpointing": True},
    "two passes": {},
    "rows with padding": {"checkpointing": True},
    "trees": {"new_tokens": 100},
}


def model_of(settings: dict[str, int], dtype: torch.dtype) -> Qwen2ForCausalLM:
    config = Qwen2Config(**settings, num_key_value_heads=2, vocab_size=50, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config).to(dtype).train()


def kept_by_autograd(policy: Policy, work: Work) -> int:
    """Bytes of the storages that backward will read, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    B = work.micro_batch_size
    prompts = torch.arange(B)[:, None].floor_divide(work.group_size).add(3).repeat(1, work.prompt_tokens)
    mask = torch.ones_like(prompts).bool()
    mask[:, 0] = False
    completions = torch.full((B, work.new_tokens), 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = policy(prompts, mask, completions, completions > 0, 1.0)
    return sum(storages.values()) if found else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [SMALL, WIDE])
@pytest.mark.parametrize("way", list(WAYS))
def test_activations_are_what_autograd_keeps(
    way: str, settings: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "PACKED_TOKENS", 200 if way.startswith("packed") else 4096)
    work = dataclasses.replace(FLOAT, element_bytes=dtype.itemsize, **WAYS[way])
    assert (work.packed, work.trees, work.two_passes) == (way.startswith("packed"), way == "trees", way == "two passes")
    model = model_of(settings, dtype)
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model, as_trees=work.trees, packed=work.packed)
    found, planned = kept_by_autograd(policy, work), activations(shape(model), work)
    if work.checkpointing:  # arguments of checkpointed layers are no tensors of the graph: mask and rotary tables
        tables = 2 * work.element_bytes * shape(model).head_dim * work.micro_batch_size * work.row
        planned -= tables + (0 if work.packed else work.micro_batch_size * work.row**2)
    assert planned == pytest.approx(found, rel=0.05)


def shape(model: Qwen2ForCausalLM) -> Shape:
    return shape_of({**model.config.to_dict(), "model_type": "qwen2"})


def test_dividing_rows_divides_what_they_keep() -> None:
    sizes = shape(model_of(SMALL, torch.float32))
    long = dataclasses.replace(FLOAT, new_tokens=8000)
    whole, half, quarter = (activations(sizes, dataclasses.replace(long, sequence=n)) for n in (1, 2, 4))
    assert half / whole == pytest.approx(0.5, rel=0.05) and quarter / half == pytest.approx(0.5, rel=0.01)


def test_chunks_of_logits_are_no_larger_than_the_logits() -> None:
    sizes = dataclasses.replace(shape(model_of(SMALL, torch.float32)), vocabulary=150_000)
    few = dataclasses.replace(FLOAT, new_tokens=2, prompt_tokens=2, stage=0)
    assert update_memory(sizes, few) < 1.1 * (2 * 8 * 4 + 4 * 64) * 150_000
