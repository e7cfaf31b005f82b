"""Rows without padding inside: every token in its place, and causality alone as good as the mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.test_policy import ARCHITECTURES, groups, tiny
from vdr_cli.config import Config
from vdr_cli.engine.build import reads_packed
from vdr_cli.models.limits import PACKED_TOKENS
from vdr_cli.models.packed_rows import packed_rows
from vdr_cli.models.policy import Policy, completion_hidden
from vdr_cli.models.train_mode import silence_dropout

PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13], [0, 0, 0, 14]])
COMPLETIONS = torch.tensor([[20, 21, 22], [23, 0, 0], [0, 0, 0], [24, 25, 0]])
TOKENS = PROMPTS, PROMPTS > 0, COMPLETIONS, COMPLETIONS > 0


def test_parts_of_the_columns_put_together_are_the_rows() -> None:
    rows = packed_rows(*TOKENS, multiple=2)
    parts = [rows.part(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.ids for part in parts], 1), rows.ids)
    assert torch.equal(torch.cat([part.positions for part in parts], 1), rows.positions)
    for rank, part in enumerate(parts):
        inside = (part.columns >= 0) & (part.columns < 2)
        assert inside.equal((rows.columns >= 2 * rank) & (rows.columns < 2 * rank + 2))
        assert part.columns[inside].tolist() == (rows.columns[inside] - 2 * rank).tolist()


def test_tokens_follow_each_other() -> None:
    rows = packed_rows(*TOKENS, multiple=2)
    assert rows.ids.tolist() == [[5, 6, 20, 21], [7, 8, 9, 10], [11, 12, 13, 0], [14, 24, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3]] * 4
    assert rows.columns.tolist() == [[1, 2, 3], [3, 3, 3], [2, 2, 2], [0, 1, 0]]


def test_the_width_is_a_multiple_and_no_position_is_beyond_the_longest_row() -> None:
    rows = packed_rows(*TOKENS, multiple=3)
    assert rows.ids.shape == (4, 6) and rows.ids[0].tolist() == [5, 6, 20, 21, 0, 0]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_hidden_states_are_those_of_masked_rows(kind: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = shape | {"num_key_value_heads": 1} if kind == "qwen2" else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=41, **small)).double().eval()
    rows = packed_rows(*TOKENS, multiple=4)
    alone = model.get_decoder()(input_ids=rows.ids, position_ids=rows.positions)[0]
    expected = completion_hidden(model, *TOKENS)
    for b, t in (COMPLETIONS > 0).nonzero().tolist():
        torch.testing.assert_close(alone[b, rows.columns[b, t]], expected[b, t], rtol=1e-9, atol=1e-12)


def results(model: nn.Module, data: dict[str, Tensor], packed: bool) -> list[Tensor]:
    """Log-probabilities, entropies and the gradient of a combination of both."""
    coefficients = torch.randn(2, *data["completion_ids"].shape, generator=torch.Generator().manual_seed(2))
    model.train().zero_grad()
    logps, entropy = Policy(model, packed=packed)(**data, temperature=0.7)
    (coefficients[0] * logps + coefficients[1] * entropy).sum().backward()
    return [logps, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_packing_changes_nothing(kind: str, checkpointing: bool) -> None:
    """Unequal groups, padded prompts, an empty completion; against prompts read once, or masked rows."""
    model = tiny(kind)
    silence_dropout(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain, packed = results(model, groups(), False), results(model, groups(), True)
    largest = max(tensor.norm() for tensor in plain[2:])
    for one, other in zip(plain, packed, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() + 1e-7 * largest


@pytest.mark.parametrize("packed", [False, True])
def test_what_backward_needs_grows_with_the_tokens_not_with_their_square(packed: bool) -> None:
    """Twice the tokens, twice the memory; masked rows need nearly four times as much."""
    model = tiny("qwen2", max_position_embeddings=2048).train()

    def kept(tokens: int) -> int:
        prompts, completions = torch.full((2, 8), 5), torch.full((2, tokens), 5)
        prompt_mask = torch.ones_like(prompts).bool()
        prompt_mask[0, 0] = False
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results = Policy(model, packed=packed)(prompts, prompt_mask, completions, completions > 0, 1.0)
        return sum(storages.values()) if results else 0

    growth = kept(1024) / kept(512)
    assert (growth < 2.05) == packed, growth


def test_only_long_completions_are_packed() -> None:
    model = tiny("qwen2")

    def packs(tokens: int, **sections: object) -> bool:
        return reads_packed(Config.model_validate({"rollout": {"max_new_tokens": tokens}, **sections}), model)

    assert packs(PACKED_TOKENS) and not packs(PACKED_TOKENS - 1)
    assert not packs(PACKED_TOKENS, grpo={"router_aux_loss_coef": 0.1})
