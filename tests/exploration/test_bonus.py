"""The bonus: reduction, credit, gates, schedules and the four shapes, against the formulas written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_cli.exploration import bonus
from vdr_cli.exploration.bonus import NOISE, RunningRms
from vdr_cli.exploration.disagreement import token_credit
from vdr_cli.exploration.watch import BonusWatch
from vdr_cli.grpo.advantages import group_advantages

STATISTIC = torch.tensor([[0.1, 0.2, 0.4, 9.0], [0.5, 9.0, 9.0, 9.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
OPEN = torch.ones(4, dtype=torch.bool)


def test_reduce_is_the_masked_mean() -> None:
    torch.testing.assert_close(bonus.reduce(STATISTIC, MASK), torch.tensor([0.7 / 3, 0.5]))
    torch.testing.assert_close(bonus.reduce(STATISTIC, MASK, last_n=2), torch.tensor([0.3, 0.5]))
    assert bonus.reduce(STATISTIC, torch.zeros(2, 4)).tolist() == [0.0, 0.0]
    assert torch.equal(bonus.reduce(torch.tensor([1.0, 2.0]), MASK), torch.tensor([1.0, 2.0]))


def test_token_credit_is_what_follows() -> None:
    by_bald = token_credit(STATISTIC, MASK, "bald", discount=0.5)
    torch.testing.assert_close(by_bald, torch.tensor([[0.2 + 0.5 * 0.4, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    by_rmi = token_credit(STATISTIC, MASK, "rmi", discount=0.5)
    expected = [[0.1 + 0.5 * 0.2 + 0.25 * 0.4, 0.2 + 0.5 * 0.4, 0.4, 0.0], [0.5, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(by_rmi, torch.tensor(expected))
    late = token_credit(STATISTIC, MASK, "rmi", last_n=1)
    torch.testing.assert_close(late[0], torch.tensor([0.4, 0.4, 0.4, 0.0]))


def test_bald_at_the_token_itself_is_a_baseline() -> None:
    """Credit looks ahead, because any f(prefix) times the score of the next token has zero expectation."""
    logits = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    p = torch.softmax(logits, 0)
    expectation = sum(
        p[y].detach() * 0.37 * torch.autograd.grad(p[y].log(), logits, retain_graph=True)[0] for y in range(3)
    )
    torch.testing.assert_close(expectation, torch.zeros(3))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.2, 0.0, 0.0, 0.0]),
        ("cosine", [0.4, 0.2, 0.0, 0.0, 0.0]),
        ("staircase", [0.4, 0.2, 0.0, 0.0, 0.0]),
    ],
)
def test_schedules_fall_to_zero(schedule: str, expected: list[float]) -> None:
    found = [bonus.weight_at(schedule, 0.4, 0.5, step, 100) for step in (0, 25, 50, 75, 100)]
    assert found == pytest.approx(expected)
    assert bonus.weight_at("staircase", 1.0, 1.0, 26, 100) == 0.75


def test_additive_is_standardised_and_sums_to_zero_before_the_clip() -> None:
    b = torch.tensor([0.1, 0.3, 0.2, 0.6, 1.0, 1.0, 1.0, 2.0])
    task = torch.arange(8.0)
    advantages, added = bonus.shaped_advantages("additive", task, task, b, OPEN.repeat(2), 4, 0.5, 100.0, 0.25)
    deviation = b.view(2, 4) - b.view(2, 4).mean(1, keepdim=True)
    torch.testing.assert_close(added, (0.5 * deviation / 0.25).view(-1))
    torch.testing.assert_close(advantages, task + added)
    torch.testing.assert_close(added.view(2, 4).sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    _, clipped = bonus.shaped_advantages("additive", task, task, b, OPEN.repeat(2), 4, 0.5, 1.0, 0.25)
    assert clipped.abs().max() == 0.5


def test_additive_acts_where_all_rewards_are_equal_and_none_other_does() -> None:
    rewards, b = torch.ones(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    task = group_advantages(rewards, 4)
    assert not task.any()
    assert bonus.shaped_advantages("additive", task, rewards, b, OPEN, 4, 0.1, 3.0, 0.1)[1].abs().min() > 0
    for shape in ("multiplicative", "quality"):
        assert not bonus.shaped_advantages(shape, task, rewards, b, OPEN, 4, 0.1, 3.0, 0.1)[0].any()


def test_additive_does_not_depend_on_the_rewards_scale() -> None:
    b = torch.tensor([0.1, 0.2, 0.3, 0.4])
    small, large = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 1000.0, 0.0, 1000.0])
    one = bonus.shaped_advantages("additive", group_advantages(small, 4), small, b, OPEN, 4, 0.1, 3.0, 0.1)[1]
    other = bonus.shaped_advantages("additive", group_advantages(large, 4), large, b, OPEN, 4, 0.1, 3.0, 0.1)[1]
    assert torch.equal(one, other)


def test_multiplicative_and_quality_formulas() -> None:
    b = torch.tensor([0.1, 0.3, 0.2, 0.6])
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    task = group_advantages(rewards, 4)
    z = ((b - b.mean()) / (b.std() + 1e-6)).clamp(-1.0, 1.0)
    factor = 1 + 0.7 * torch.sigmoid(torch.relu(z))
    found, added = bonus.shaped_advantages("multiplicative", task, rewards, b, OPEN, 4, 0.7, 1.0, 0.1)
    torch.testing.assert_close(found, task * factor)
    torch.testing.assert_close(added, task * (factor - 1))
    coefficient = 1 + 0.7 * torch.sigmoid(rewards - 0.5) * torch.sigmoid(torch.relu(z))
    found, _ = bonus.shaped_advantages("quality", task, rewards, b, OPEN, 4, 0.7, 1.0, 0.1)
    torch.testing.assert_close(found, task * coefficient / coefficient.mean())


def test_reward_shape_adds_before_normalisation() -> None:
    rewards = torch.tensor([0.0, 1.0, float("nan"), 1.0])
    shaped = bonus.shaped_rewards(rewards, torch.tensor([0.5, 0.0, 1.0, 1.0]), OPEN, 0.1, 4)
    torch.testing.assert_close(shaped, torch.tensor([0.05, 1.0, float("nan"), 1.1]), equal_nan=True)


def test_reward_shape_leaves_groups_without_spread_as_they_are() -> None:
    """To the bit: a constant would only add rounding, which is no bonus."""
    rewards, b = torch.tensor([0.1, 0.7, 0.7, 0.3]), torch.full((4,), 0.0123)
    assert torch.equal(bonus.shaped_rewards(rewards, b, OPEN, 0.1, 4), rewards)


@pytest.mark.parametrize("shape", ["additive", "multiplicative", "quality"])
def test_closed_gate_adds_nothing(shape: str) -> None:
    rewards, b = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.1, 0.3, 0.2, 0.6])
    task = group_advantages(rewards, 4)
    _, added = bonus.shaped_advantages(shape, task, rewards, b, ~OPEN, 4, 0.7, 1.0, 0.1)
    assert not added.any()


def test_gates_look_at_task_rewards() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0])
    solved = rewards >= 1
    assert bonus.gated("all", rewards, solved, 2).tolist() == [True] * 4
    assert bonus.gated("incorrect", rewards, solved, 2).tolist() == [True, False, False, False]
    assert bonus.gated("zero_variance", rewards, solved, 2).tolist() == [False, False, True, True]


def test_rounding_noise_is_never_reward() -> None:
    """The original's failure: rounding scaled by 1e7. Here groups whose values agree to 1e-6 get exactly 0."""
    b = torch.full((4,), 0.3) + torch.tensor([0.0, 3e-8, -3e-8, 6e-8])
    rms = RunningRms()
    rms.update(*bonus.deviation_sums(b, 4))
    _, added = bonus.shaped_advantages("additive", torch.zeros(4), torch.zeros(4), b, OPEN, 4, 0.1, 3.0, rms.value)
    assert not added.any()
    assert rms.value == NOISE
    assert not bonus.has_spread(b, 4).any()
    assert not bonus.group_scores(b, 4, 3.0).any()


def test_running_rms_is_bias_corrected_and_survives_saving() -> None:
    rms = RunningRms(decay=0.9)
    rms.update(*bonus.deviation_sums(torch.tensor([0.0, 2.0, 0.0, 2.0]), 2))
    assert rms.value == pytest.approx(1.0)
    rms.update(0.0, 0.0)
    rms.update(*bonus.deviation_sums(torch.tensor([0.0, 4.0]), 2))
    assert rms.value == pytest.approx(math.sqrt((0.09 * 1 + 0.1 * 4) / 0.19))
    other = RunningRms()
    other.load_state_dict(rms.state_dict())
    assert other == rms


def test_ranks_may_hold_different_groups() -> None:
    b = torch.rand(12, generator=torch.Generator().manual_seed(0))
    whole = bonus.deviation_sums(b, 3)
    parts = [bonus.deviation_sums(b[:3], 3), bonus.deviation_sums(b[3:], 3)]
    assert whole == pytest.approx((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]))


def test_token_bonus_is_centred_at_every_position() -> None:
    credit = torch.tensor([[3.0, 2.0, 1.0], [1.0, 5.0, 0.0], [7.0, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    gate = torch.tensor([True, True, False])
    advantages, added = bonus.shaped_advantages(
        "additive", torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), credit, gate, 3, 1.0, 100.0, 2.0, mask
    )
    mean = credit[:, 0].mean()
    expected = torch.tensor([[(3 - mean) / 2, -0.75, 0.0], [(1 - mean) / 2, 0.75, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(advantages, torch.tensor([[1.0], [2.0], [3.0]]) + expected)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 10, width=32), min_size=8, max_size=8), st.floats(0.01, 5), st.permutations(range(4)))
def test_additive_sums_to_zero_and_commutes_with_permutation(values: list[float], rms: float, order: list[int]) -> None:
    b = torch.tensor(values)
    zero = torch.zeros(8)
    _, added = bonus.shaped_advantages("additive", zero, zero, b, OPEN.repeat(2), 4, 1.0, 1e9, rms)
    assert added.view(2, 4).double().sum(1).abs().max() <= 1e-5 * max(1.0, float(added.abs().max()))
    permuted = b.view(2, 4)[:, order].reshape(-1)
    _, other = bonus.shaped_advantages("additive", zero, zero, permuted, OPEN.repeat(2), 4, 1.0, 1e9, rms)
    torch.testing.assert_close(other, added.view(2, 4)[:, order].reshape(-1))


def test_watch_speaks_once_with_the_cause() -> None:
    watch = BonusWatch("rmi", "members that agree", flat_after=3, outweighed_after=3)
    said = [watch.warning(False, True, 0.0, 1.0) for _ in range(6)]
    assert [line is not None for line in said] == [False, False, True, False, False, False]
    assert said[2].startswith("the rmi of") and said[2].endswith("the bonus is 0: members that agree")
    said = [watch.warning(True, True, 2.0, 1.0) for _ in range(6)]
    (line,) = filter(None, said)
    assert "bonus.weight" in line and line.endswith(
        "set bonus.gate to not_failed (no bonus in groups where nothing succeeded)"
    )


def test_watch_does_not_advise_a_gate_where_there_is_one() -> None:
    watch = BonusWatch("rmi", "members that agree", "some_correct", outweighed_after=1)
    line = watch.warning(True, True, 2.0, 1.0)
    assert line is not None and line.endswith("lower it or give it a schedule")


def test_watch_names_the_reason_of_a_gate_that_stays_closed() -> None:
    watch = BonusWatch("rmi", "members that agree", "some_correct", flat_after=3)
    said = [watch.warning(True, is_open, 0.0, 1.0) for is_open in (False, False, True, False, False, False, False)]
    (line,) = filter(None, said)
    assert said[5] == line and line == (
        "bonus.gate some_correct has been closed for all completions for 3 rollouts, so the bonus is 0: no completion "
        "reached rewards.solved_at"
    )


def test_watch_compares_means_not_single_steps() -> None:
    watch = BonusWatch("rmi", "members that agree", outweighed_after=4)
    tasks = [1.0, 0.0, 0.3, 0.0, 0.3, 0.0, 1.0]  # a lucky group now and then
    said = [watch.warning(True, True, 0.2, task) for task in tasks]
    assert [line is not None for line in said] == [False, False, False, False, True, False, False]


def test_plain_adds_the_numbers_as_they_are_clipped() -> None:
    b, gate = torch.tensor([0.5, -4.0, 2.0, 1.0]), torch.tensor([True, True, True, False])
    task = torch.arange(4.0)
    advantages, added = bonus.shaped_advantages("plain", task, task, b, gate, 4, -0.5, 3.0, 123.0)
    assert added.tolist() == [-0.25, 1.5, -1.0, 0.0] and torch.equal(advantages, task + added)
    mask = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    _, tokens = bonus.shaped_advantages("plain", task, task, b[:, None].repeat(1, 2), gate, 4, 1.0, 3.0, 1.0, mask)
    assert tokens.tolist() == [[0.5, 0.0], [-3.0, -3.0], [2.0, 2.0], [0.0, 0.0]]


def test_a_negative_weight_is_the_opposite_bonus() -> None:
    b, task = torch.tensor([0.1, 0.3, 0.2, 0.6]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    for shape in ("additive", "plain"):
        up, down = (bonus.shaped_advantages(shape, task, task, b, OPEN, 4, w, 3.0, 0.1)[1] for w in (0.2, -0.2))
        assert torch.equal(up, -down) and up.abs().max() > 0


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("all", [True] * 6),
        ("incorrect", [False, True, True, True, False, False]),
        ("correct", [True, False, False, False, True, True]),
        ("some_correct", [True, True, False, False, True, True]),
        ("not_failed", [True, True, False, False, True, True]),
        ("zero_variance", [False, False, True, True, True, True]),
    ],
)
def test_gates_by_the_task_reward(gate: str, expected: list[bool]) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    assert bonus.gated(gate, rewards, rewards >= 1.0, 2).tolist() == expected


def test_a_group_has_not_failed_where_rewards_differ_whatever_counts_as_solved() -> None:
    rewards = torch.tensor([0.2, 0.1, 0.3, 0.3])
    assert bonus.gated("not_failed", rewards, rewards >= 1.0, 2).tolist() == [True, True, False, False]
    assert not bonus.gated("some_correct", rewards, rewards >= 1.0, 2).any()


def test_the_initial_scale_is_the_rms_of_the_first_steps_and_stays() -> None:
    rms = RunningRms()
    for squares, count in ((8.0, 2.0), (0.0, 0.0), (2.0, 1.0)):
        rms.update(squares, count, first=2)
    assert rms.value == pytest.approx(math.sqrt((4.0 + 2.0) / 2)), "a step without values is none"
    saved = rms.state_dict()
    rms.update(1e6, 1.0, first=2)
    assert rms.state_dict() == saved
    again = RunningRms()
    again.load_state_dict(saved)
    again.update(1e6, 1.0, first=2)
    assert again.value == rms.value


def test_a_permutation_keeps_every_groups_values() -> None:
    b = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0, 4.0])
    keys = torch.tensor([0.5, 0.1, 0.9, 0.2, 0.3, 0.8, 0.1, 0.4])
    found = bonus.permuted(b, keys, 4)
    assert found.tolist() == pytest.approx([0.2, 0.4, 0.1, 0.3, 3.0, 1.0, 4.0, 2.0])


def test_a_permutation_of_tokens_keeps_every_positions_values() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    b = torch.arange(12.0).view(4, 3) * mask
    keys = torch.tensor([0.5, 0.1, 0.9, 0.2])  # the order 1, 3, 0, 2
    found = bonus.permuted(b, keys, 4, mask)
    assert found.tolist() == [[3.0, 10.0, 11.0], [9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [6.0, 7.0, 2.0]]
    equal = bonus.permuted(torch.arange(8.0).view(4, 2), keys, 4, torch.ones(4, 2))
    assert equal.tolist() == [[2.0, 3.0], [6.0, 7.0], [0.0, 1.0], [4.0, 5.0]], "whole rows where lengths are equal"


@pytest.mark.parametrize("gate", ["all", "incorrect", "correct", "some_correct", "not_failed", "zero_variance"])
def test_a_completion_without_a_reward_gets_no_bonus(gate: str) -> None:
    """None is no opinion: neither wrong nor a reason to explore. Alone in its group, half of it, all of it."""
    none = float("nan")
    rewards = torch.tensor([1.0, none, none, none, 0.0, none])
    found = bonus.gated(gate, rewards, rewards >= 1.0, 2)
    assert not found[rewards.isnan()].any()
    known = [("all", [True, True]), ("incorrect", [False, True]), ("correct", [True, False])]
    assert found[[0, 4]].tolist() == dict(known).get(gate, found[[0, 4]].tolist())


def test_a_step_that_is_not_finite_leaves_the_scale_alone() -> None:
    rms = RunningRms()
    rms.update(8.0, 2.0)
    before = rms.state_dict()
    for squares in (math.nan, math.inf):
        rms.update(squares, 2.0)
    assert rms.state_dict() == before
