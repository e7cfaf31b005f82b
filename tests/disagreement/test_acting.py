"""Sampling from members: what is recorded are the member's own log-probabilities, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from vdr_cli.disagreement.acting import acting, acting_members, by_position
from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling

V, STEP = 40, 3
SMALL = {"vocab_size": V, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
DECODER = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**DECODER),
    "gemma": lambda: GemmaConfig(**DECODER, head_dim=8),
    "gpt2": lambda: GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt_neox": lambda: GPTNeoXConfig(**{key: value for key, value in DECODER.items() if "key_value" not in key}),
    "mixtral": lambda: MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "sliding": lambda: MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
}
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21], [22, 23]]
KEYS = [101, 202, 303, 404, 505]
SAMPLING = Sampling(max_new_tokens=9, temperature=1.3)
POSITIONS = [17, 18, 19, 20, 21]
SPEC = EnsembleSpec(members=3, dropout=0.3, seed=5)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # members of a near-uniform model would all agree
    return model.to(dtype)


def sample(
    model: PreTrainedModel, chosen: Sequence[int] = range(5), spec: EnsembleSpec = SPEC, **rollout: object
) -> Completions:
    """Four completions of each chosen prompt, from its member."""
    request = RolloutRequest(
        [PROMPTS[index] for index in chosen],
        4,
        SAMPLING,
        [KEYS[index] for index in chosen],
        acting=by_position(spec, STEP, [POSITIONS[index] for index in chosen]),
    )
    return TransformersRollout(0, [1], **rollout).generate(model, request)


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, out: Completions, spec: EnsembleSpec = SPEC) -> Tensor:
    """(B, T) log-probabilities of each row alone, without cache and padding, under the member of its prompt."""
    found = torch.zeros(out.completion_ids.shape, dtype=torch.float64)
    members = acting_members(spec, POSITIONS)
    for row in range(len(out)):
        prompt = out.prompt_ids[row][out.prompt_mask[row]]
        ids = out.completion_ids[row][out.completion_mask[row]]
        with ensemble(model, spec, STEP, [members[row // 4]]):
            logits = model(input_ids=torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = (logits.double() / SAMPLING.temperature).log_softmax(-1)
        found[row, : len(ids)] = logps.gather(-1, ids[:, None])[:, 0]
    return found


DOUBLE = [(name, torch.float64) for name in CONFIGS if name not in ("mixtral", "sliding")]
"""torch multiplies experts' matrices in float32 at most."""


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CONFIGS), *DOUBLE])
def test_the_sampler_records_its_members_log_probabilities(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    out = sample(model)
    tolerance = 2e-5 if dtype is torch.float32 else 2e-6  # the sampler's softmax is float32
    torch.testing.assert_close(out.sampler_logps.double(), teacher_forced(model, out), rtol=0, atol=tolerance)
    assert len(set(out.completion_mask.sum(1).tolist())) > 1, "rows leave the batch at different tokens"


@pytest.mark.parametrize(
    "rollout", [{"cuda_graphs": "on"}, {"batch_tokens": 60}, {"batch_tokens": 1}], ids=["static", "parts", "single"]
)
def test_caches_and_batches_change_nothing(rollout: dict[str, object]) -> None:
    model = model_of("qwen2")
    plain, other = sample(model), sample(model, **rollout)
    assert torch.equal(plain.completion_ids, other.completion_ids)
    torch.testing.assert_close(plain.sampler_logps, other.sampler_logps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3, 4]], [[0], [1, 2, 3, 4]], [[4, 3, 2, 1, 0]]])
def test_the_member_follows_the_prompts_position_on_any_rank(shares: list[list[int]]) -> None:
    model = model_of("qwen2")
    whole = sample(model)
    for share in shares:
        rows = torch.tensor([index * 4 + g for index in share for g in range(4)])
        own = sample(model, share)
        width = own.completion_ids.shape[1]
        assert torch.equal(own.completion_ids, whole.completion_ids[rows, :width])


def test_the_top_layers_alone() -> None:
    model, spec = model_of("qwen2"), EnsembleSpec(members=3, dropout=0.3, seed=5, scope="last_k", last_k=1)
    out = sample(model, spec=spec)
    torch.testing.assert_close(out.sampler_logps.double(), teacher_forced(model, out, spec), rtol=0, atol=2e-5)
    assert (out.sampler_logps - sample(model).sampler_logps[:, : out.sampler_logps.shape[1]]).abs().max() > 1e-2


def test_members_are_spread_over_positions_and_depend_on_the_seed() -> None:
    members = acting_members(SPEC, range(3000))
    counts = torch.tensor(members).bincount(minlength=3)
    assert len(counts) == 3 and ((counts / 3000 - 1 / 3).abs() < 0.045).all()  # 5 standard errors
    assert members == acting_members(SPEC, range(3000)) != acting_members(EnsembleSpec(3, seed=6), range(3000))


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("qwen2")
    model.train()
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(RuntimeError, match="stop"), acting(model, SPEC, STEP, [0]):
        raise RuntimeError("stop")
    assert model.training and not any(module._forward_hooks for module in model.modules())
    plain = model_of("qwen2")
    assert torch.equal(model(input_ids=ids).logits, plain.train()(input_ids=ids).logits)
