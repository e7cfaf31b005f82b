"""Every source against a loop in float64 written from its paper: the number, the advantage, and the loss's gradient."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vdr_cli import train
from vdr_cli.config import Config
from vdr_cli.config.sections import bonus as bonus_config
from vdr_cli.exploration import counts, sources
from vdr_cli.exploration.bonus import NOISE
from vdr_cli.exploration.noise import noise
from vdr_cli.exploration.novelty import novelty, sparse_projection
from vdr_cli.exploration.sources import SOURCES, Numbers, Signals
from vdr_cli.exploration.unlikeliness import shared_ranks, unlikeliness
from vdr_cli.exploration.value_heads import Heads, gradient, value_heads
from vdr_cli.grpo.losses import LossInputs, LossSettings, PolicyOutputs, policy_loss, token_weights
from vdr_cli.samples import Completions, Prompt
from vdr_cli.training.batch import RewardedGroups
from vdr_cli.training.state import LoopState

G, T, D = 4, 5, 6
COMES_WITH = {"answers": "visits", "start_states": "projection", "states": "weights"}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "exploration.md"


def signals_of(rewards: list[float], seed: int = 0) -> Signals:
    """Groups of 4 with these rewards and random everything else."""
    random = torch.Generator().manual_seed(seed)
    B = len(rewards)
    r = torch.tensor(rewards)
    lengths = torch.randint(1, T + 1, (B,), generator=random)
    mask = torch.arange(T)[None] < lengths[:, None]
    log_probs = -torch.rand(B, T, generator=random) * 3
    entropies = torch.rand(B, T, generator=random) * 2
    answers = torch.randint(0, 3, (B,), generator=random)
    visits = torch.randint(1, 9, (3,), generator=random)[answers]
    deviation = r.view(-1, G) - r.view(-1, G).mean(1, keepdim=True)
    task = (deviation / (r.view(-1, G).std(1, keepdim=True) + 1e-4)).flatten()
    return Signals(
        G,
        mask,
        r,
        r >= 1.0,
        task,
        measure=torch.rand(B, generator=random),
        log_probs=log_probs * mask,
        entropies=entropies * mask,
        answers=answers.tolist(),
        visits=visits,
        start_states=torch.randn(B, D, generator=random),
        projection=sparse_projection(torch.rand(D, 3, generator=random, dtype=torch.float64)),
        states=torch.randn(B, D, generator=random),
        weights=torch.randn(5, D + 1, generator=random, dtype=torch.float64),
        uniforms=torch.rand(B, 2, generator=random, dtype=torch.float64),
    )


def config_of(source: str, **bonus: Any) -> Config:
    mode = {"disagreement": {"mode": "end_of_sequence"}}
    return Config.model_validate(
        {
            "model": {"name": "m"},
            "rollout": {"group_size": G},
            "bonus": {"source": source, "gate": "all", **bonus},
            **mode,
        }
    )


def numbers_of(source: str, signals: Signals, **bonus: Any) -> Numbers:
    return SOURCES[source].numbers(signals, config_of(source, **bonus))


def rows(signals: Signals) -> list[tuple[int, list[int]]]:
    """(row, its valid tokens)."""
    return [(row, valid.nonzero().flatten().tolist()) for row, valid in enumerate(signals.mask)]


MIXED = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "kappa"), [(1.0, None), (2.0, 3.0)])
def test_surprisal_is_the_mean_negative_log_probability(alpha: float, kappa: float | None) -> None:
    on = signals_of(MIXED)
    expected = []
    for row, tokens in rows(on):
        s = -sum(float(on.log_probs[row, t]) for t in tokens) / len(tokens)
        expected.append(alpha * s if kappa is None else min(abs(MIXED[row]) / kappa, alpha * s))
    found = numbers_of("surprisal", on, surprisal={"alpha": alpha, "kappa": kappa})
    assert found.b.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kappa", [2.0, None])
def test_entropy_is_capped_by_the_advantage(kappa: float | None) -> None:
    on = signals_of(MIXED)
    expected = np.zeros((len(MIXED), T))
    for row, tokens in rows(on):
        for t in tokens:
            most = math.inf if kappa is None else abs(float(on.task_advantages[row])) / kappa
            expected[row, t] = min(0.4 * float(on.entropies[row, t]), most)
    found = numbers_of("entropy", on, entropy={"kappa": kappa})
    assert found.b.numpy() == pytest.approx(expected, rel=1e-6)
    means = [expected[row, tokens].mean() for row, tokens in rows(on)]
    assert found.per_completion.tolist() == pytest.approx(means, rel=1e-6)


def test_counts_pay_what_was_seen_seldom() -> None:
    on = signals_of(MIXED)
    ucb = [1.0 / math.sqrt(int(n)) - 0.5 for n in on.visits]
    assert numbers_of("counts", on).b.tolist() == pytest.approx(ucb, rel=1e-6)
    expected = []
    for row in range(len(MIXED)):
        group = on.answers[row // G * G : row // G * G + G]
        expected.append(-sum(other == on.answers[row] for other in group) / G + 1 / G)
    assert numbers_of("counts", on, counts={"kind": "batch"}).b.tolist() == pytest.approx(expected, rel=1e-6)


def test_unlikeliness_takes_from_likely_correct_completions() -> None:
    on = signals_of(MIXED)
    mean = [float(on.log_probs[row, tokens].double().mean()) for row, tokens in rows(on)]
    expected = []
    for row, reward in enumerate(MIXED):
        group = range(row // G * G, row // G * G + G)
        rank = sum(mean[other] < mean[row] for other in group)
        expected.append(reward * (1 - 0.25 * rank / G) - reward if reward >= 1.0 else 0.0)
    found = numbers_of("unlikeliness", on).b.tolist()
    assert found == pytest.approx(expected, rel=1e-6) and min(found) < 0


def test_equal_completions_share_a_rank() -> None:
    values = torch.tensor([[0.3, 0.1, 0.1 + 2e-8, 0.2], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    assert shared_ranks(values).tolist() == [[3.0, 0.5, 0.5, 2.0], [1.5] * 4]
    mask = torch.ones(4, 1, dtype=torch.bool)
    once = unlikeliness(torch.tensor([[-1.0], [-2.0], [-2.0], [-3.0]]), mask, torch.ones(4), torch.ones(4) > 0, 4, 1.0)
    assert once.tolist() == pytest.approx([-0.75, -0.375, -0.375, 0.0])


def test_novelty_is_the_leverage_by_dense_linear_algebra() -> None:
    on = signals_of(MIXED)
    expected = []
    h = on.start_states.double().numpy() @ on.projection.numpy()
    for start in range(0, len(MIXED), G):
        group = h[start : start + G] - h[start : start + G].mean(0)
        total = 0.01 * np.eye(3) + sum(np.outer(row, row) for row in group)
        expected += [row @ np.linalg.inv(total) @ row for row in group]
    assert numbers_of("novelty", on).b.tolist() == pytest.approx(expected, rel=1e-5)
    alone = novelty(torch.tensor([[0.0], [0.0], [0.0], [4.0]]), torch.ones(1, 1), 4, 12.0)
    assert alone.tolist() == pytest.approx([1 / 24, 1 / 24, 1 / 24, 9 / 24]), "the one that differs is new"
    assert novelty(torch.ones(4, 6), on.projection, 4).tolist() == [0.0] * 4


def test_a_projection_keeps_lengths_on_average() -> None:
    uniforms = torch.rand(100, 400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = sparse_projection(uniforms)
    assert set(found.unique().tolist()) == {-1 / math.sqrt(0.1 * 400), 0.0, 1 / math.sqrt(0.1 * 400)}
    h = torch.randn(50, 100, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert ((h @ found).square().sum(1) / h.square().sum(1)).mean() == pytest.approx(1.0, abs=0.05)


def loop_features(row: np.ndarray) -> np.ndarray:
    return np.append(row / math.sqrt((row**2).mean()), 1.0)


def test_value_heads_disagree_by_their_standard_deviation() -> None:
    on = signals_of(MIXED)
    weights, states = on.weights.numpy(), on.states.double().numpy()
    expected = [np.std([head @ loop_features(row) for head in weights], ddof=1) for row in states]
    assert numbers_of("value_heads", on).b.tolist() == pytest.approx(expected, rel=1e-6)


def test_two_heads_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.1], [0.2, -0.2]], dtype=torch.float64)
    assert value_heads(torch.tensor([[3.0]]), weights).tolist() == pytest.approx([0.6 / math.sqrt(2)])


def test_heads_learn_their_share_by_adam() -> None:
    on, rewards = signals_of(MIXED), torch.tensor([*MIXED[:-1], math.nan])
    kept = torch.rand(len(MIXED), 5, generator=torch.Generator().manual_seed(2)) < 0.5
    heads = Heads(0.01)
    heads.start(torch.rand(5, D + 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    expected = heads.weights.numpy().copy()
    first, second = np.zeros_like(expected), np.zeros_like(expected)
    for step in range(1, 4):
        slope = np.zeros_like(expected)
        for k in range(5):
            rows = [i for i in range(len(MIXED)) if kept[i, k] and not math.isnan(rewards[i])]
            for i in rows:
                x = loop_features(on.states[i].double().numpy())
                slope[k] += (expected[k] @ x - float(rewards[i])) * x / len(rows)
        found = gradient(on.states, rewards, kept, heads.weights)
        assert found.numpy() == pytest.approx(slope, rel=1e-9, abs=1e-12)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        expected -= 0.01 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        heads.take(torch.full_like(found, 9.0))  # of an abandoned step
        heads.take(found)
        heads.commit()
        assert heads.weights.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        heads, saved = Heads(0.01), heads.state_dict()
        heads.load_state_dict(saved)


def test_heads_agree_about_what_they_have_seen() -> None:
    """Their disagreement falls where completions are visited, and stays elsewhere."""
    random = torch.Generator().manual_seed(7)
    states = torch.randn(8, 16, generator=random)
    seen, unseen = states.clone(), torch.randn(8, 16, generator=random)
    seen[:, 8:], unseen[:, :8] = 0.0, 0.0
    heads = Heads(0.05)
    heads.start(torch.rand(8, 17, generator=random, dtype=torch.float64))
    before = value_heads(seen, heads.weights).mean(), value_heads(unseen, heads.weights).mean()
    for _ in range(200):
        kept = torch.rand(8, 8, generator=random) < 0.5
        heads.take(gradient(seen, torch.ones(8), kept, heads.weights))
        heads.commit()
    after = value_heads(seen, heads.weights).mean(), value_heads(unseen, heads.weights).mean()
    assert after[0] < 0.05 * before[0] and after[1] > 0.3 * before[1]


def test_noise_is_standard_normal() -> None:
    uniforms = torch.rand(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = noise(uniforms).double()
    assert abs(found.mean()) < 0.03 and abs(found.std() - 1) < 0.03 and abs((found**4).mean() - 3) < 0.3
    assert noise(torch.zeros(1, 2, dtype=torch.float64)).tolist() == [0.0]


def test_worked_by_hand() -> None:
    """The examples of docs/exploration.md."""
    on = replace(
        signals_of([1.0, 0.0, 1.0, 0.0]),
        mask=torch.ones(4, 2, dtype=torch.bool),
        log_probs=torch.tensor([[-0.1, -0.3], [-1.0, -2.0], [-0.5, -0.7], [-0.2, -0.2]]),
        entropies=torch.tensor([[1.0, 2.0], [0.5, 3.0], [0.1, 0.2], [1.0, 1.0]]),
        task_advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        answers=[7, 8, 7, 7],
        visits=torch.tensor([4, 1, 4, 4]),
    )
    assert numbers_of("surprisal", on).b.tolist() == pytest.approx([0.2, 1.5, 0.6, 0.2])
    assert numbers_of("entropy", on).b.tolist()[:2] == [pytest.approx([0.4, 0.5]), pytest.approx([0.2, 0.5])]
    assert numbers_of("counts", on).b.tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])
    assert numbers_of("counts", on, counts={"kind": "batch"}).b.tolist() == pytest.approx([-0.5, 0.0, -0.5, -0.5])
    assert numbers_of("unlikeliness", on).b.tolist() == pytest.approx([-0.15625, 0.0, -0.0625, 0.0])


# ---- visits -----------------------------------------------------------------------------------------------------


def test_visits_are_those_of_a_dict_over_the_run() -> None:
    random = np.random.default_rng(0)
    memory, seen = counts.Visits(), Counter[int]()
    for step in range(20):
        keys = random.integers(0, 9, size=12).tolist()
        memory.take(keys)
        if step % 5 == 3:  # an abandoned step, done again with other completions
            keys = random.integers(0, 9, size=12).tolist()
            memory.take(keys)
        seen.update(keys)
        assert memory.of(keys).tolist() == [seen[key] for key in keys]
        memory.commit()
        if step == 10:
            memory, saved = counts.Visits(), memory.state_dict()
            memory.load_state_dict(saved)


def test_a_checkpoint_holds_finished_steps_alone() -> None:
    memory = counts.Visits()
    memory.take([1, 1, 2])
    memory.commit()
    memory.take([2, 3])
    state = memory.state_dict()
    assert dict(zip(state["keys"].tolist(), state["counts"].tolist(), strict=True)) == {1: 2, 2: 1}


# ---- advantages and gradients -----------------------------------------------------------------------------------


def batch_with(on: Signals) -> RewardedGroups:
    B, width = on.mask.shape
    ids = torch.zeros(B, width, dtype=torch.int64)
    completions = Completions(ids, on.mask, ids, on.mask, on.log_probs, torch.zeros(B, dtype=torch.bool))
    prompts = [Prompt(row, "p", [row]) for row in range(B)]
    positions = [row // G for row in range(B)]
    return RewardedGroups(prompts, completions, ["t"] * B, on.task_rewards[:, None], on.task_rewards, positions)


def advantages_of(config: Config, on: Signals, source: sources.Source | None = None) -> tuple[Tensor, Tensor]:
    """(advantages (B, T), the bonus), through the loop's own reward head."""
    source = source or SOURCES[config.bonus_source]
    res: Any = SimpleNamespace(config=config, source=source, reward_weights=lambda: torch.ones(1))
    names = {name for need in source.needs for name in (need, COMES_WITH.get(need, need))}
    given = {name: getattr(on, name) for name in names}
    found = train.reward_head(res, LoopState(), batch_with(on), train.ReferenceLogps(), given)
    assert found.bonus is not None
    return found.inputs.advantages, found.bonus.added


def by_hand(config: Config, on: Signals) -> np.ndarray:
    """(B, T) advantages in float64, from the source's numbers, for weight x shape alone."""
    cfg, r = config.bonus, on.task_rewards.double().numpy().reshape(-1, G)
    b = SOURCES[cfg.source].numbers(on, config).b.double().numpy()
    task = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    weight, per_token = cfg.effective_weight, np.ones((len(b), T))
    if cfg.effective_shape == "plain":
        per_row = task.reshape(-1, 1) * per_token
        return per_row + weight * np.clip(b if b.ndim == 2 else b[:, None] * per_token, -cfg.clip, cfg.clip)
    deviation = b.reshape(-1, G) - b.reshape(-1, G).mean(1, keepdims=True)
    if cfg.effective_shape == "reward":
        shaped = r + weight * b.reshape(-1, G) * (np.ptp(b.reshape(-1, G), axis=1, keepdims=True) > NOISE)
        score = (shaped - shaped.mean(1, keepdims=True)) / (shaped.std(1, ddof=1, keepdims=True) + 1e-4)
        return score.reshape(-1, 1) * per_token
    rms = math.sqrt((deviation**2).mean())
    return (task + weight * np.clip(deviation / rms, -cfg.clip, cfg.clip)).reshape(-1, 1) * per_token


BUILT_IN = [name for name in SOURCES if name != "disagreement"]


@pytest.mark.parametrize("source", SOURCES)
def test_the_advantage_and_its_gradient_through_the_loss(source: str) -> None:
    config, on = config_of(source), signals_of(MIXED)
    advantages, _ = advantages_of(config, on)
    expected = by_hand(config, on)
    mask = on.mask
    assert advantages[mask].numpy() == pytest.approx(expected[mask.numpy()], rel=2e-5, abs=2e-6)

    logits = torch.randn(len(MIXED), T, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    tokens = torch.zeros(len(MIXED), T, 1, dtype=torch.int64)
    logps = logits.log_softmax(-1).gather(2, tokens).squeeze(2)
    weights = token_weights("dapo", mask, train.Totals(len(MIXED), float(mask.sum())), T)
    policy_loss(PolicyOutputs(logps), LossInputs(advantages, mask, weights=weights), LossSettings()).loss.backward()
    p = torch.softmax(logits.detach().double(), -1).numpy()
    score = -p
    score[..., 0] += 1.0  # the gradient of log p(token 0)
    gradient = -expected[..., None] * mask.numpy()[..., None] * score / float(mask.sum())
    assert logits.grad.numpy() == pytest.approx(gradient, rel=1e-4, abs=1e-6)


def table() -> dict[str, tuple[bool, bool]]:
    """Source to whether it gives a gradient in groups whose rewards are all 0, and all 1."""
    found = {}
    for name in BUILT_IN:
        by_reward = [
            advantages_of(config_of(name), signals_of([reward] * 8))[0].abs().max() > 0 for reward in (0.0, 1.0)
        ]
        found[name] = bool(by_reward[0]), bool(by_reward[1])
    return found


def test_which_sources_give_a_gradient_where_all_rewards_are_equal() -> None:
    """The table of docs/exploration.md."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| source | all wrong | all correct |")
    written = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, wrong, correct = (cell.strip(" `") for cell in line.strip("|").split("|"))
        written[name] = (wrong == "yes", correct == "yes")
    assert written.pop("disagreement") == (True, True)
    assert written == table()


@pytest.mark.parametrize("source", SOURCES)
def test_a_negative_weight_has_the_opposite_sign(source: str) -> None:
    if config_of(source).bonus.effective_shape == "reward":
        return  # normalised after it is added: only the direction is opposite
    on = signals_of(MIXED)
    (_, up), (_, down) = (advantages_of(config_of(source, weight=weight), on) for weight in (0.3, -0.3))
    assert torch.equal(up, -down) and up.abs().max() > 0


@pytest.mark.parametrize("source", SOURCES)
def test_a_permuted_bonus_has_the_same_numbers(source: str) -> None:
    on = signals_of(MIXED)
    if source == "entropy":
        on = replace(on, mask=torch.ones_like(on.mask))
    shape = {"shape": "plain", "clip": 1e6, "weight": 1.0}
    (_, own), (_, shuffled) = (advantages_of(config_of(source, permute=p, **shape), on) for p in ("none", "group"))
    assert not torch.equal(own, shuffled)
    groups = (own.view(-1, G, *own.shape[1:]), shuffled.view(-1, G, *own.shape[1:]))
    assert torch.equal(groups[0].sort(1).values, groups[1].sort(1).values)


def test_additive_bonuses_of_noise_sum_to_zero_in_every_group() -> None:
    _, bonus = advantages_of(config_of("noise", clip=100.0), signals_of(MIXED))
    assert bonus.view(-1, G).sum(1).abs().max() < 1e-6


# ---- names ------------------------------------------------------------------------------------------------------


def test_the_settings_know_every_source() -> None:
    assert set(bonus_config.SOURCES) == {*SOURCES, "none"}
    assert set(bonus_config.OWN) <= set(SOURCES)


def test_some_sources_need_no_forward() -> None:
    forwards = {"measure", "entropies", "start_states", "states"}
    assert {name for name, source in SOURCES.items() if not source.needs & forwards} == {
        "surprisal",
        "counts",
        "unlikeliness",
        "noise",
    }


def test_value_heads_pass_over_a_gradient_that_is_not_finite() -> None:
    heads = Heads(0.01)
    heads.start(torch.full((2, 3), 0.25, dtype=torch.float64))
    before = heads.weights
    heads.take(torch.full((2, 3), math.nan, dtype=torch.float64))
    heads.commit()
    assert heads.weights is before and heads.state_dict()["steps"] == 0
