"""Policy log-probabilities against the model's own logits, for the architectures people use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vdr_cli.grpo.losses import LossInputs, LossSettings, PolicyOutputs, Totals, policy_loss, token_weights
from vdr_cli.models.policy import (
    Policy,
    can_share_prompts,
    completion_logps,
    completion_states,
    distinct_prompts,
    end_state,
    mean_state,
)
from vdr_cli.models.train_mode import silence_dropout

V = 41
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": SMALL,
    "llama": SMALL,
    "gemma": SMALL,
    "gemma2": SMALL | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    "granite": SMALL | {"logits_scaling": 4.0},
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2},
    "gpt_neox": SMALL,
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
}
DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt_neox": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1},
    "falcon": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "qwen2": {"attention_dropout": 0.1},
    "mixtral": {"attention_dropout": 0.1},
}


def tiny(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(ARCHITECTURES[kind] | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(prompt_lengths: list[int], lengths: list[int], pads: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    """Random rows with these true lengths; pads: extra columns on the left and on the right."""
    generator = torch.Generator().manual_seed(1)
    width, height = max(prompt_lengths) + pads[0], max(lengths) + pads[1]
    made = {
        "prompt_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
        "prompt_mask": torch.zeros(len(lengths), width, dtype=torch.bool),
        "completion_ids": torch.zeros(len(lengths), height, dtype=torch.int64),
        "completion_mask": torch.zeros(len(lengths), height, dtype=torch.bool),
    }
    for row, (before, after) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        tokens = torch.randint(3, V, (before + after,), generator=generator)
        made["prompt_ids"][row, width - before :] = tokens[:before]
        made["prompt_mask"][row, width - before :] = True
        made["completion_ids"][row, :after] = tokens[before:]
        made["completion_mask"][row, :after] = True
    return made


def row_by_row(model: nn.Module, data: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """The plain twin: each row alone, unpadded, through the model's own forward."""
    logps = torch.zeros(data["completion_ids"].shape)
    entropy = torch.zeros_like(logps)
    for row in range(len(logps)):
        prompt = data["prompt_ids"][row][data["prompt_mask"][row]]
        completion = data["completion_ids"][row][data["completion_mask"][row]]
        if len(completion) == 0:
            continue
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
        logps[row, : len(completion)] = log_p.gather(1, completion[:, None])[:, 0]
        entropy[row, : len(completion)] = -(log_p.exp() * log_p).sum(1)
    return logps, entropy


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_equals_the_models_own_logits(kind: str) -> None:
    model = tiny(kind)
    data = batch([5, 3, 7], [4, 6, 1])
    with torch.no_grad():
        ours = Policy(model, share_prompts=False)(**data, temperature=0.7)
        theirs = row_by_row(model, data, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2"])
def test_gradient_equals_the_dense_one(kind: str) -> None:
    model = tiny(kind)
    data = batch([5, 3], [4, 6])
    coefficients = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(2))
    gradients = []
    for function in (
        Policy(model, chunk_tokens=3, share_prompts=False),
        lambda **kw: row_by_row(model, {**kw}, kw.pop("temperature")),
    ):
        model.zero_grad()
        logps, entropy = function(**data, temperature=0.7)
        (coefficients[0] * logps * data["completion_mask"] + coefficients[1] * entropy).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, ours in gradients[0].items():
        scale = gradients[1][name].norm()
        assert (ours - gradients[1][name]).norm() <= 1e-5 * scale + 1e-7, name


def groups() -> dict[str, Tensor]:
    """Two prompts of different lengths with three and two completions, one of them empty."""
    data = batch([5, 3, 4, 4, 7], [4, 6, 1, 3, 2])
    for name in ("prompt_ids", "prompt_mask"):
        data[name] = data[name][[0, 0, 0, 4, 4]]
    data["completion_mask"][3] = False
    return data


@pytest.mark.parametrize(
    ("kind", "attention"), [*((kind, None) for kind in ARCHITECTURES), ("qwen2", "eager"), ("mixtral", "eager")]
)
def test_shared_prompts_change_nothing(kind: str, attention: str | None) -> None:
    model = tiny(kind, attn_implementation=attention)
    silence_dropout(model)
    data = groups()
    coefficients = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    results = []
    for share in (False, True):
        model.train().zero_grad()
        logps, entropy = Policy(model, share_prompts=share)(**data, temperature=0.7)
        (coefficients[0] * logps + coefficients[1] * entropy).sum().backward()
        results.append([logps, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    largest = max(tensor.norm() for tensor in results[0][2:])
    for plain, shared in zip(*results, strict=True):
        assert (plain - shared).norm() <= 1e-5 * plain.norm() + 1e-7 * largest


@pytest.mark.parametrize("width", [1, 6])
def test_both_passes_of_shared_prompts_join_the_graph(width: int) -> None:
    """All-masked batches and one-token completions: every call of every layer takes part in backward."""
    model = tiny("qwen2")
    data = groups()
    data = {name: value[:, :width] if "completion" in name else value for name, value in data.items()}
    data["completion_mask"][:] = False
    calls = []
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    Policy(model, share_prompts=True)(**data, temperature=1.0)[0].sum().backward()
    assert len(calls) == 2 * len(model.model.layers)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_distinct_prompts_ignore_what_padding_holds() -> None:
    ids = torch.tensor([[9, 1], [8, 1], [1, 1], [1, 1], [9, 1]])
    mask = torch.tensor([[False, True], [False, True], [True, True], [True, True], [False, True]])
    firsts, owner = distinct_prompts(ids, mask)
    assert firsts.tolist() == [0, 2, 4]
    assert owner.tolist() == [0, 0, 1, 1, 2]


def test_prompts_are_not_shared_where_that_does_not_work() -> None:
    model = tiny("qwen2")
    assert can_share_prompts(model)
    model.gradient_checkpointing_enable()
    assert not can_share_prompts(model)


def test_extra_padding_changes_nothing() -> None:
    model = tiny("qwen2")
    plain = completion_logps(model, **batch([5, 3], [4, 6]), temperature=1.0)[0]
    padded = completion_logps(model, **batch([5, 3], [4, 6], pads=(3, 4)), temperature=1.0)[0]
    torch.testing.assert_close(plain, padded[:, :6], rtol=1e-5, atol=1e-6)
    assert (padded[:, 6:] == 0).all()


@pytest.mark.parametrize("share", [False, True])
def test_all_masked_batch_reaches_every_parameter(share: bool) -> None:
    model = tiny("qwen2")
    data = batch([5, 3], [4, 6])
    data["completion_mask"][:] = False
    logps, entropy = Policy(model, share_prompts=share)(**data, temperature=1.0)
    assert (logps == 0).all()
    assert (entropy == 0).all()
    logps.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", list(DROPOUT))
def test_train_mode_equals_eval_mode_exactly(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention, **DROPOUT[kind])
    data = batch([5, 3], [4, 6])
    model.train()
    noisy = completion_logps(model, **data, temperature=1.0)[0]
    silence_dropout(model)
    train = completion_logps(model, **data, temperature=1.0)[0]
    old = completion_logps(model.eval(), **data, temperature=1.0)[0]
    assert (torch.exp(train - old) == 1.0).all()
    assert not torch.equal(noisy, train)


def test_gradient_checkpointing_runs_and_changes_nothing() -> None:
    model = tiny("gpt2", **DROPOUT["gpt2"])
    silence_dropout(model)
    data = batch([5, 3], [4, 6])
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        Policy(model)(**data, temperature=1.0)[0].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def step_gradient(model: nn.Module, data: dict[str, Tensor], parts: list[list[int]], loss: str) -> Tensor:
    """The whole step's gradient, its rows split into these micro-batches, each with padding of its own."""
    cfg = LossSettings(loss=loss, entropy_weight=0.1)
    totals = Totals(completions=len(data["prompt_ids"]), tokens=float(data["completion_mask"].sum()))
    advantages = torch.randn(len(data["prompt_ids"]), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    for part in parts:
        tokens = {name: value[part] for name, value in data.items()}
        logps, entropy = Policy(model)(**tokens, temperature=0.9)
        mask = tokens["completion_mask"]
        inputs = LossInputs(
            advantages=advantages[part],
            mask=mask,
            old_logps=logps.detach() - 0.05,
            weights=token_weights(loss, mask, totals, 6),
            entropy_weights=token_weights("dapo", mask, totals, 6),
        )
        policy_loss(PolicyOutputs(logps, entropy), inputs, cfg).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_step_does_not_depend_on_split_order_or_padding(loss: str) -> None:
    model = tiny("qwen2")
    lengths = [4, 6, 1, 3, 2, 5, 6, 2]
    data = batch([5] * 8, lengths)
    for name in ("prompt_ids", "prompt_mask"):
        data[name] = data[name][[0, 0, 0, 0, 4, 4, 4, 4]]
    whole = step_gradient(model, data, [list(range(8))], loss)
    splits = {
        "two": [list(range(4)), list(range(4, 8))],
        "four": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "eight": [[row] for row in range(8)],
        "unequal": [[0], [1, 2, 3, 4, 5], [6, 7]],
        "order": [[7, 2, 5], [0, 6, 1, 4, 3]],
    }
    for name, parts in splits.items():
        assert (step_gradient(model, data, parts, loss) - whole).norm() <= 1e-5 * whole.norm(), name
    padded = {}
    for name, value in data.items():
        sides = (3, 0) if name.startswith("prompt") else (0, 4)
        padded[name] = nn.functional.pad(value, sides, value=False if value.dtype == torch.bool else 7)
    assert (step_gradient(model, padded, [list(range(8))], loss) - whole).norm() <= 1e-5 * whole.norm()


def test_lora_trains_adapters_only_and_switched_off_is_the_base() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("qwen2")
    data = groups()
    with torch.no_grad():
        base = completion_logps(model, **data, temperature=1.0)[0]
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    silence_dropout(adapted)
    policy = Policy(adapted.train())
    assert policy.share_prompts
    assert torch.equal(policy(**data, temperature=1.0)[0], base)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    logps, _ = policy(**data, temperature=1.0)
    assert not torch.allclose(logps, base)
    logps.sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(policy(**data, temperature=1.0)[0], base)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gpt2"])
def test_states_of_completions_are_those_of_each_row_alone(kind: str, share: bool) -> None:
    """Mean and end states, whatever the padding and whether prompts are read once."""
    model, data = tiny(kind), groups()
    tokens = data["prompt_ids"], data["prompt_mask"], data["completion_ids"], data["completion_mask"]
    with torch.no_grad():
        states = completion_states(model, *tokens, share)
        means, ends = mean_state(states, tokens[3]), end_state(states, tokens[3])
        for row in range(len(tokens[0])):
            prompt = tokens[0][row, tokens[1][row].bool()]
            completion = tokens[2][row, tokens[3][row].bool()]
            if not len(completion):
                assert not means[row].any()
                continue
            alone = model(torch.cat([prompt, completion])[None], output_hidden_states=True).hidden_states[-1][0]
            P = len(prompt)
            torch.testing.assert_close(means[row], alone[P:].mean(0), atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(ends[row], alone[-2], atol=2e-5, rtol=1e-4)
