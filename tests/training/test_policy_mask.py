"""A batch of conversations against a float64 reference written from its turns, one token at a time.

Environment tokens are read and count for nothing: no log-probability, gradient, KL, entropy, measure or length.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.exploration.bonus import group_deviation, reduce
from vdr_cli.exploration.disagreement import token_credit
from vdr_cli.grpo.losses import LossInputs, LossSettings, PolicyOutputs, Totals, policy_loss, token_weights
from vdr_cli.models.policy import completion_logps, completion_states, end_state, mean_state
from vdr_cli.samples import Completions, last_token, pad_prompts

Turn = tuple[bool, list[int]]
"""(sampled by the policy, its token ids)."""

PROMPTS = [[5, 6, 7], [8, 9]]
EPISODES: list[list[Turn]] = [
    [(True, [11, 12, 1]), (False, [20, 21]), (True, [13, 1])],
    [(True, [14, 1]), (False, [22, 23, 24]), (True, [15, 16, 1]), (False, [25]), (True, [17])],
    [(True, [18, 1])],
    [(True, [19]), (False, [26, 27]), (True, [11, 1])],
]
OWNERS = [0, 0, 1, 1]
TEMPERATURE, BETA = 0.8, 0.1
ADVANTAGES = [0.7, -1.1, 0.4, -0.4]
MEMBERS = EnsembleSpec(members=3, dropout=0.2, scope="full", seed=4)


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.to(dtype)


def completions() -> Completions:
    prompt_ids, prompt_mask = pad_prompts([PROMPTS[owner] for owner in OWNERS], 0)
    lengths = [sum(len(ids) for _, ids in turns) for turns in EPISODES]
    ids = torch.zeros(4, max(lengths), dtype=torch.int64)
    policy = torch.zeros(ids.shape, dtype=torch.bool)
    for row, turns in enumerate(EPISODES):
        ids[row, : lengths[row]] = torch.tensor([token for _, own in turns for token in own])
        policy[row, : lengths[row]] = torch.tensor([sampled for sampled, own in turns for _ in own])
    valid = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    logps = torch.where(policy, torch.tensor(-1.0), torch.tensor(0.0))
    return Completions(prompt_ids, prompt_mask, ids, valid, logps, torch.zeros(4, dtype=torch.bool), policy)


def sampled_tokens(row: int) -> list[tuple[list[int], int, int]]:
    """(history, token, its column) of every token that the policy sampled, in order."""
    found, history, column = [], list(PROMPTS[OWNERS[row]]), 0
    for sampled, ids in EPISODES[row]:
        for token in ids:
            if sampled:
                found.append((list(history), token, column))
            history.append(token)
            column += 1
    return found


def distribution(model: Any, history: list[int], temperature: float) -> Tensor:
    """(V,) float64 log-probabilities after a history."""
    logits = model(input_ids=torch.tensor([history])).logits[0, -1]
    return torch.log_softmax(logits.double() / temperature, -1)


def tensors(own: Completions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return own.prompt_ids, own.prompt_mask, own.completion_ids, own.completion_mask


@pytest.mark.parametrize("way", [{"share_prompts": False}, {"share_prompts": True}, {"as_trees": True}])
def test_log_probabilities_and_entropies_of_the_policys_tokens_under_the_full_history(way: dict[str, bool]) -> None:
    own, reference = completions(), tiny(torch.float64)
    model = tiny()
    logps, entropies = completion_logps(model, *tensors(own), TEMPERATURE, policy_mask=own.policy_mask, **way)
    expected, expected_entropies = torch.zeros(2, *logps.shape, dtype=torch.float64)
    for row in range(4):
        for history, token, column in sampled_tokens(row):
            log_p = distribution(reference, history, TEMPERATURE).detach()
            expected[row, column] = log_p[token]
            expected_entropies[row, column] = -(log_p.exp() * log_p).sum()
    assert torch.allclose(logps.double(), expected, atol=1e-5)
    assert torch.allclose(entropies.double(), expected_entropies, atol=1e-5)


def reference_loss(model: Any, start: Any, loss: str) -> Tensor:
    """The step's loss from the turns: k3 KL, entropy bonus, ratio 1."""
    counts = [len(sampled_tokens(row)) for row in range(4)]
    weight = {"dapo": [1 / sum(counts)] * 4, "grpo": [1 / (4 * n) for n in counts], "dr_grpo": [1 / (4 * 12)] * 4}
    total = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        for history, token, _ in sampled_tokens(row):
            log_p = distribution(model, history, TEMPERATURE)
            x = log_p[token] - distribution(start, history, TEMPERATURE)[token].detach()
            ratio = torch.exp(log_p[token] - log_p[token].detach())
            value = -ratio * ADVANTAGES[row] + BETA * (torch.exp(-x) + x - 1)
            total = total + weight[loss][row] * value + 0.01 * (log_p.exp() * log_p).sum() / sum(counts)
    return total


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2]])
def test_loss_and_gradient_however_the_batch_is_split(loss: str, split: list[int]) -> None:
    own, start = completions(), tiny(torch.float64, seed=1)
    model, reference = tiny(torch.float64), tiny(torch.float64)
    expected = reference_loss(reference, start, loss)
    expected.backward()
    totals = Totals(completions=4.0, tokens=float(own.policy_mask.sum()))
    settings = LossSettings(loss=loss, beta=BETA, entropy_weight=0.01)
    found = 0.0
    for rows in torch.arange(4).split(split):
        part = own.rows(rows).trimmed()
        logps, entropy = completion_logps(model, *tensors(part), TEMPERATURE, policy_mask=part.policy_mask)
        with torch.no_grad():
            ref_logps, _ = completion_logps(start, *tensors(part), TEMPERATURE, policy_mask=part.policy_mask)
        mask = part.policy_mask
        inputs = LossInputs(
            advantages=torch.tensor(ADVANTAGES)[rows],
            mask=mask,
            ref_logps=ref_logps,
            weights=token_weights(loss, mask, totals, 12),
            entropy_weights=token_weights("dapo", mask, totals, 12),
        )
        output = policy_loss(PolicyOutputs(logps, entropy), inputs, settings)
        output.loss.backward()
        found += float(output.loss.detach())
        assert output.metrics["entropy"][1] == mask.sum()
    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, dict(reference.named_parameters())[name].grad, atol=1e-5), name


def test_the_measure_is_of_the_policys_tokens_and_at_its_last_one() -> None:
    own, reference = completions(), tiny(torch.float64)
    expected = torch.zeros(own.completion_ids.shape, dtype=torch.float64)
    for row in range(4):
        for history, _, column in sampled_tokens(row):
            members = []
            for member in range(3):
                with ensemble(reference, MEMBERS, step=2, members=[member]), torch.no_grad():
                    members.append(distribution(reference, history, 1.0).exp())
            mean = torch.stack(members).mean(0)
            entropy = [-torch.special.xlogy(p, p).sum() for p in (mean, *members)]
            expected[row, column] = entropy[0] - torch.stack(entropy[1:]).mean()
    reader, model = EnsembleReader(MEMBERS), tiny()
    bald = reader.measure(model, MeasureRequest(own, 2, step=2)).get("bald").double()
    assert torch.allclose(bald, expected, atol=1e-5)
    at_end = reader.measure(model, MeasureRequest(own, 2, step=2, positions="last")).get("bald").double()
    last = torch.tensor([sampled_tokens(row)[-1][2] for row in range(4)])
    assert torch.allclose(at_end, expected[torch.arange(4), last], atol=1e-5)
    means = [expected[row, [column for _, _, column in sampled_tokens(row)]].mean() for row in range(4)]
    assert torch.allclose(reduce(bald.float(), own.policy_mask).double(), torch.stack(means), atol=1e-5)


@pytest.mark.parametrize("measure", ["bald", "rmi"])
def test_credit_passes_from_turn_to_turn_over_what_the_environment_said(measure: Any) -> None:
    own, discount = completions(), 0.9
    numbers = torch.rand(own.completion_ids.shape, generator=torch.Generator().manual_seed(0))
    credit = token_credit(numbers, own.policy_mask, measure, discount)
    for row in range(4):
        columns = [column for _, _, column in sampled_tokens(row)]
        rewards = [float(numbers[row, column]) for column in columns]
        if measure == "bald":
            rewards = [*rewards[1:], 0.0]
        for index, column in enumerate(columns):
            expected = sum(discount**k * reward for k, reward in enumerate(rewards[index:]))
            assert float(credit[row, column]) == pytest.approx(expected, abs=1e-5)
    assert not credit[~own.policy_mask].any()
    assert not group_deviation(credit, 2, own.policy_mask)[~own.policy_mask].any()


def test_hidden_states_of_the_policys_tokens() -> None:
    own, model = completions(), tiny(torch.float64)
    states = completion_states(model, *tensors(own), share_prompts=False).detach()  # (B, T + 1, D)
    for row in range(4):
        columns = [column for _, _, column in sampled_tokens(row)]
        assert int(last_token(own.policy_mask)[row]) == columns[-1]
        assert torch.allclose(end_state(states, own.policy_mask)[row], states[row, columns[-1]])
        mean = states[row, [column + 1 for column in columns]].mean(0)
        assert torch.allclose(mean_state(states, own.policy_mask)[row], mean)


def test_without_an_environment_every_valid_token_is_the_policys() -> None:
    own = completions()
    plain = Completions(*tensors(own), own.sampler_logps, own.truncated)
    assert plain.policy_mask is plain.completion_mask
    cut = own.rows(slice(2, 3)).trimmed()
    assert cut.policy_mask.tolist() == [[True, True]]
    assert math.isclose(float(own.policy_mask.sum()), 5 + 6 + 2 + 3)
