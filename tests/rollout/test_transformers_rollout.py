"""The transformers backend against transformers' own generate and full forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from vdr_cli.errors import ConfigError, DataError
from vdr_cli.models.anatomy import position_ids
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.sampling import processors
from vdr_cli.rollout.transformers_backend import TransformersRollout, _batches
from vdr_cli.samples import Completions, Sampling

PAD, EOS = 0, 1
V = 40
SMALL = {"vocab_size": V, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
DECODER = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NO_GROUPS = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**DECODER),
    "qwen3": lambda: Qwen3Config(**DECODER, head_dim=8),
    "llama": lambda: LlamaConfig(**DECODER),
    "gpt2": lambda: GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gemma": lambda: GemmaConfig(**DECODER, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**NO_GROUPS),
    "mixtral": lambda: MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "sliding": lambda: MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "qwen2_sliding": lambda: Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=1),
}

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21], [22, 23]]
KEYS = [101, 202, 303, 404, 505]
MODELS: dict[str, PreTrainedModel] = {}


def tiny(name: str, seed: int = 0, spread: float = 3.0) -> PreTrainedModel:
    """A random model whose distributions are peaked enough to differ from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    return model


@pytest.fixture(params=["plain", "packed"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of matrix product; models as small as those here are not packed otherwise."""
    if request.param == "packed":
        monkeypatch.setattr("vdr_cli.models.cpu_linear.LEAST_BYTES", 0)
    return str(request.param)


def rollout(**kwargs: object) -> TransformersRollout:
    return TransformersRollout(PAD, [EOS], **kwargs)  # type: ignore[arg-type]


def full_logits(model: PreTrainedModel, out: Completions) -> torch.Tensor:
    """(B, T, V) logits that predict the completions, from one forward without a cache."""
    ids = torch.cat([out.prompt_ids, out.completion_ids], 1)
    mask = torch.cat([out.prompt_mask, out.completion_mask], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits
    P = out.prompt_ids.shape[1]
    return logits[:, P - 1 : -1].float()


def answers(out: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers_generate(name: str) -> None:
    model = tiny(name)
    out = rollout().generate(model, RolloutRequest(PROMPTS, 1, Sampling(max_new_tokens=14, temperature=0), KEYS))
    theirs = model.generate(
        input_ids=out.prompt_ids, attention_mask=out.prompt_mask.long(), do_sample=False, max_new_tokens=14
    )[:, out.prompt_ids.shape[1] :]
    theirs = torch.nn.functional.pad(theirs, (0, 14 - theirs.shape[1]), value=PAD)
    ours = torch.nn.functional.pad(out.completion_ids, (0, 14 - out.completion_ids.shape[1]), value=PAD)
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", CONFIGS)
def test_logps_equal_a_full_forward(name: str) -> None:
    model = tiny(name)
    out = rollout().generate(model, RolloutRequest(PROMPTS, 3, Sampling(max_new_tokens=12, temperature=0.7), KEYS))
    logps = (full_logits(model, out) / 0.7).log_softmax(-1).gather(-1, out.completion_ids[..., None])[..., 0]
    assert torch.allclose(out.sampler_logps, logps * out.completion_mask, atol=1e-5)
    assert (out.sampler_logps[~out.completion_mask] == 0).all()
    assert out.completion_mask.any(1).all()


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "qwen2_sliding"])
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    n=st.integers(1, 6),
    ends=st.integers(1, 20),
    batch_tokens=st.sampled_from([60, 262_144]),
    key=st.integers(0, 2**60),
)
@settings(max_examples=20, deadline=None)
def test_logps_equal_a_full_forward_whichever_rows_leave(
    name: str, lengths: list[int], n: int, ends: int, batch_tokens: int, key: int
) -> None:
    """Groups that shrink, vanish and change places in the batch: every token was drawn after its own prompt."""
    model = MODELS.setdefault(name, tiny(name, spread=1.5))
    prompts = [[21 + 5 * index + step for step in range(length)] for index, length in enumerate(lengths)]
    eos = range(1, 1 + ends)
    out = TransformersRollout(PAD, eos, batch_tokens=batch_tokens).generate(
        model, RolloutRequest(prompts, n, Sampling(max_new_tokens=9), [key + index for index in range(len(prompts))])
    )
    logps = full_logits(model, out).log_softmax(-1).gather(-1, out.completion_ids[..., None])[..., 0]
    assert torch.allclose(out.sampler_logps, logps * out.completion_mask, atol=1e-5)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12, temperature=1.3, top_p=0.8),
        Sampling(12, temperature=0.7, top_k=6),
        Sampling(12, min_p=0.05),
        Sampling(12, temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    ],
)
def test_logps_are_those_of_the_filtered_distribution_of_a_full_forward(sampling: Sampling) -> None:
    model = tiny("qwen2", spread=2.0)
    for index, prompt in enumerate(PROMPTS):  # one prompt at a time: no padding that a penalty could see
        out = rollout().generate(model, RolloutRequest([prompt], 4, sampling, KEYS[index : index + 1]))
        logits, ids = full_logits(model, out), torch.cat([out.prompt_ids, out.completion_ids], 1)
        for t in range(out.completion_ids.shape[1]):
            scores = processors(sampling)(ids[:, : len(prompt) + t], logits[:, t].clone())
            logps = scores.log_softmax(-1).gather(1, out.completion_ids[:, t : t + 1])[:, 0]
            valid = out.completion_mask[:, t]
            assert torch.allclose(out.sampler_logps[valid, t], logps[valid], atol=1e-5)


def test_rows_end_at_eos_and_truncated_says_which_did_not() -> None:
    model = tiny("qwen2", spread=1.0)
    out = rollout().generate(model, RolloutRequest(PROMPTS, 40, Sampling(max_new_tokens=30, temperature=1.0), KEYS))
    ended = 0
    for ids, truncated in zip(answers(out), out.truncated.tolist(), strict=True):
        assert EOS not in ids[:-1]
        assert truncated == (ids[-1] != EOS)
        assert len(ids) == 30 or not truncated
        ended += not truncated
    assert 0 < ended < len(out)
    assert (out.completion_ids[~out.completion_mask] == PAD).all()


def test_eos_as_the_last_allowed_token_is_not_truncated() -> None:
    model = tiny("qwen2")
    first = rollout().generate(model, RolloutRequest(PROMPTS[:1], 1, Sampling(1, temperature=0), KEYS[:1]))
    assert first.truncated.tolist() == [True]
    token = int(first.completion_ids[0, 0])
    out = TransformersRollout(PAD, [EOS, token]).generate(
        model, RolloutRequest(PROMPTS[:1], 1, Sampling(1, temperature=0), KEYS[:1])
    )
    assert out.truncated.tolist() == [False]
    assert out.completion_mask.sum() == 1


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "qwen2_sliding"])
def test_a_completion_does_not_depend_on_batch_size_or_order(name: str) -> None:
    model = tiny(name)
    sampling = Sampling(max_new_tokens=10, temperature=1.3, top_p=0.95)
    together = answers(rollout().generate(model, RolloutRequest(PROMPTS, 6, sampling, KEYS)))
    order = [3, 1, 4, 0, 2]
    shuffled = rollout().generate(
        model, RolloutRequest([PROMPTS[i] for i in order], 6, sampling, [KEYS[i] for i in order])
    )
    for place, index in enumerate(order):
        assert answers(shuffled)[place * 6 : place * 6 + 6] == together[index * 6 : index * 6 + 6]
    for rows in (1, 7, 64):
        split = rollout(batch_tokens=rows * 18).generate(model, RolloutRequest(PROMPTS, 6, sampling, KEYS))
        assert answers(split) == together
    fewer = answers(rollout().generate(model, RolloutRequest(PROMPTS[1:2], 2, sampling, KEYS[1:2])))
    assert fewer == together[6:8]
    assert len({tuple(ids) for ids in together}) > 20


def test_200000_completions_follow_the_joint_distribution_of_their_tokens() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**{**DECODER, "vocab_size": 7})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    prompt, sampling = [5, 2, 6], Sampling(max_new_tokens=2, temperature=0.9)
    out = TransformersRollout(PAD, []).generate(model, RolloutRequest([prompt], 200_000, sampling, [77]))
    with torch.no_grad():
        continued = torch.tensor([[*prompt, token] for token in range(7)])
        logits = model(input_ids=continued).logits.double() / 0.9
    exact = (logits[0, 2].softmax(-1)[:, None] * logits[:, 3].softmax(-1)).flatten()  # (7 * 7,)
    counts = (out.completion_ids[:, 0] * 7 + out.completion_ids[:, 1]).bincount(minlength=49)
    assert stats.chisquare(counts.numpy(), (exact * 200_000).numpy()).pvalue > 1e-3
    wrong = (exact**1.02 / (exact**1.02).sum()) * 200_000
    assert stats.chisquare(counts.numpy(), wrong.numpy()).pvalue < 1e-3


def test_batches_hold_the_limit_and_every_row_once() -> None:
    batches = list(_batches([5, 1, 3, 8, 2], 6, T=10, batch_tokens=60))
    rows = [(row.prompt, row.completion) for batch in batches for row in batch]
    assert sorted(rows) == [(prompt, g) for prompt in range(5) for g in range(6)]
    lengths = [5, 1, 3, 8, 2]
    for batch in batches:
        width = max(lengths[row.prompt] for row in batch) + 10
        assert len(batch) * width <= 60 or len(batch) == 1


@pytest.mark.parametrize("batch_tokens", [262_144, 90])
def test_every_prompt_is_told_once_and_before_the_last_are_sampled(batch_tokens: int) -> None:
    model = tiny("qwen2", spread=1.0)
    told: dict[int, list[list[int]]] = {}
    forwards: list[int] = []

    def finished(places: Sequence[int], given: Completions) -> None:
        forwards.append(calls[0])
        for k, place in enumerate(places):
            assert place not in told
            told[place] = answers(given)[4 * k : 4 * k + 4]

    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    sampling = Sampling(max_new_tokens=30, temperature=1.0)
    backend = TransformersRollout(PAD, range(1, 12), batch_tokens=batch_tokens)  # many tokens end a completion
    out = backend.generate(model, RolloutRequest(PROMPTS, 4, sampling, KEYS, finished))
    assert told == {place: answers(out)[4 * place : 4 * place + 4] for place in range(len(PROMPTS))}
    assert len(forwards) > 1 and forwards[0] < calls[0]
    again = backend.start(model, RolloutRequest(PROMPTS, 4, sampling, KEYS))()
    assert answers(again) == answers(out) and torch.equal(again.truncated, out.truncated)


class Letters:
    """Token i is the i-th letter."""

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return ["".join(chr(97 + token) for token in row) for row in rows]


def test_a_stop_string_ends_after_the_token_that_completes_it() -> None:
    model = tiny("qwen2")
    sampling = Sampling(max_new_tokens=12, temperature=1.5)
    free = answers(rollout().generate(model, RolloutRequest(PROMPTS, 4, sampling, KEYS)))
    text = Letters().batch_decode(free)
    stop = next(t[3:5] for t in text if len(t) >= 8)
    stopped = rollout(tokenizer=Letters()).generate(
        model, RolloutRequest(PROMPTS, 4, Sampling(max_new_tokens=12, temperature=1.5, stop=("zzz", stop)), KEYS)
    )
    hits = 0
    for before, after, truncated in zip(text, Letters().batch_decode(answers(stopped)), stopped.truncated, strict=True):
        if stop in before:
            assert after == before[: before.index(stop) + len(stop)]
            assert not truncated
            hits += 1
        else:
            assert after == before
    assert hits > 0


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match="stop needs a tokenizer"):
        rollout().generate(tiny("qwen2"), RolloutRequest(PROMPTS, 1, Sampling(4, stop=("x",)), KEYS))


def test_an_empty_prompt_is_refused_and_no_prompts_give_no_rows() -> None:
    model = tiny("qwen2")
    with pytest.raises(DataError, match="prompt 1"):
        rollout().generate(model, RolloutRequest([[3], []], 1, Sampling(4), [1, 2]))
    out = rollout().generate(model, RolloutRequest([], 4, Sampling(4), []))
    assert len(out) == 0
    assert out.completion_ids.shape[0] == 0


def test_repetition_penalty_ignores_padding() -> None:
    """transformers penalises the pad token of padded rows; a completion must not depend on its neighbours."""
    model = tiny("qwen2")
    sampling = Sampling(max_new_tokens=8, temperature=1.0, repetition_penalty=1.7)
    together = answers(rollout().generate(model, RolloutRequest(PROMPTS, 4, sampling, KEYS)))
    for index, prompt in enumerate(PROMPTS):
        alone = rollout().generate(model, RolloutRequest([prompt], 4, sampling, [KEYS[index]]))
        assert answers(alone) == together[index * 4 : index * 4 + 4]


def test_the_model_is_used_in_inference_only() -> None:
    model = tiny("qwen2")
    out = rollout().generate(model, RolloutRequest(PROMPTS, 2, Sampling(3), KEYS))
    assert not out.sampler_logps.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_models_give_float32_logps() -> None:
    model = tiny("qwen2").to(torch.bfloat16)
    out = rollout().generate(model, RolloutRequest(PROMPTS, 2, Sampling(5), KEYS))
    assert out.sampler_logps.dtype == torch.float32
    assert torch.isfinite(out.sampler_logps).all()
