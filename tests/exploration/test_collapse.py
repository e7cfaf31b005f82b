"""Warnings of a policy that stops exploring: when they come, how often, and what they advise."""

from __future__ import annotations

from typing import Any

import pytest

from vdr_cli.config import Config
from vdr_cli.exploration.collapse import WINDOW, warnings_of, watch_of

Lines = list[dict[str, float]]


def lines(count: int, first: int = 1, **metrics: Any) -> Lines:
    """`count` steps; a metric is a number or a function of the step."""
    fine = {"loss": 0.1, "entropy": 0.5, "frac_reward_zero_std": 0.2, "completions_distinct": 7.0, "reward": 0.4}
    found = []
    for step in range(first, first + count):
        line = {name: float(value(step) if callable(value) else value) for name, value in (fine | metrics).items()}
        line["completions/distinct"] = line.pop("completions_distinct")
        found.append({"step": step, **line})
    return found


def evaluations(values: list[tuple[float, float]], k: int = 8) -> Lines:
    """Lines of held-out pass@1 0.5 and pass@k with its upper bound; the first is the start's."""
    return [
        {"step": 10 * index, "eval/pass@1": 0.5, f"eval/pass@{k}": value, f"eval/pass@{k}_high": high}
        for index, (value, high) in enumerate(values)
    ]


def warned(given: Lines, **settings: Any) -> list[tuple[int, str]]:
    return warnings_of(Config.model_validate(settings), given)


def test_a_healthy_run_warns_of_nothing() -> None:
    falling = lines(300, entropy=lambda step: 0.5 - step / 1000, completions_distinct=lambda step: 7 - step / 100)
    assert warned(falling + evaluations([(0.9, 0.95), (0.87, 0.93), (0.88, 0.94)])) == []


def test_entropy_far_below_the_start_is_reported_once_and_in_time() -> None:
    fall = lines(200, entropy=lambda step: 0.5 if step <= 50 else 0.01)
    ((step, text),) = warned(fall)
    assert step == 69, "19 of 20 lines at 0.01"
    assert "0.0345 nats per token" in text and "7% of the start's 0.5" in text
    assert "set grpo.entropy_target" in text and "lower train.learning_rate" in text


def test_a_dip_is_no_collapse() -> None:
    assert warned(lines(100, entropy=lambda step: 0.01 if step % 10 == 0 else 0.5)) == []
    assert warned(lines(100, frac_reward_zero_std=lambda step: 1.0 if step % 2 else 0.5)) == []


@pytest.mark.parametrize(
    ("reward", "what", "cure"), [(0.95, "solved", "harder prompts"), (0.01, "not solved", "easier")]
)
def test_groups_without_signal_say_which_way(reward: float, what: str, cure: str) -> None:
    ((step, text),) = warned(lines(60, frac_reward_zero_std=0.9, reward=reward))
    assert step == WINDOW and f"most of them {what};" in text and cure in text and "grpo.resample_groups" in text


def test_a_policy_that_has_become_worse_is_told_so() -> None:
    ruined = lines(60, frac_reward_zero_std=0.9, reward=lambda step: 0.4 if step <= 5 else 0.05)
    ((_, text),) = warned(ruined)
    assert "the mean reward was 0.4 at the start and is 0.137" in text and "train.learning_rate" in text
    assert "easier" not in text and "grpo.beta" in text and "grpo.beta" not in warned(ruined, grpo={"beta": 0.1})[0][1]
    given = evaluations([(0.9, 0.95), (0.3, 0.4), (0.3, 0.4)])
    given[2]["eval/pass@1"] = 0.1
    ((_, text),) = warned(given)
    assert "pass@1 has fallen as well, from 0.500 to 0.100" in text and "train.learning_rate" in text


def test_groups_of_equal_completions() -> None:
    ((_, text),) = warned(lines(80, completions_distinct=lambda step: 8 if step < 30 else 1.5))
    assert "against 8.0 at the start" in text and "pass_at_k" in text


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ([(0.9, 0.95), (0.7, 0.8), (0.7, 0.8)], 1),
        ([(0.9, 0.95), (0.7, 0.8), (0.89, 0.95), (0.7, 0.8)], 0),  # not twice in a row
        ([(0.9, 0.95), (0.85, 0.91), (0.85, 0.91)], 0),  # within the interval
        ([(0.5, 0.6), (0.9, 0.95), (0.7, 0.8), (0.7, 0.8), (0.6, 0.7)], 1),  # from the best, and once
    ],
)
def test_held_out_pass_at_the_largest_k(values: list[tuple[float, float]], count: int) -> None:
    found = warned(evaluations(values))
    assert len(found) == count and all("held-out pass@8 has fallen from 0.900" in text for _, text in found)
    assert warned(evaluations(values, k=1)) == []


def test_the_largest_k_counts() -> None:
    given = evaluations([(0.9, 0.95), (0.5, 0.6), (0.5, 0.6)], k=4)
    for line in given:
        line |= {"eval/pass@32": 0.99, "eval/pass@32_high": 1.0}
    assert warned(given) == []


def test_what_is_in_use_already_is_not_advised() -> None:
    low = lines(
        60, entropy=lambda step: 0.5 if step <= 5 else 0.01, completions_distinct=lambda step: 8 if step < 6 else 1
    )
    grpo = {"entropy_target": 0.2, "advantage": "pass_at_k"}
    texts = sorted(text for _, text in warned(low, grpo=grpo))
    assert len(texts) == 2 and not any("set grpo.entropy_target" in text for text in texts)
    assert "grpo.pass_k" in texts[0] and "grpo.entropy_max" in texts[1]


def test_numbers_that_are_missing_or_not_finite_are_passed_over() -> None:
    broken = lines(30, entropy=float("nan"), frac_reward_zero_std=float("nan"), completions_distinct=float("inf"))
    assert warned([*broken, {"step": 40}, {"step": 41, "loss": float("nan")}]) == []


def test_a_resumed_run_neither_repeats_nor_forgets() -> None:
    """The watch is fed the lines on file; then it says what the undisturbed run says from there on."""
    given = lines(60, entropy=lambda step: 0.5 if step <= 20 else 0.01) + lines(60, 61, frac_reward_zero_std=1.0)
    whole = warned(given)
    assert len(whole) == 2
    for cut in (10, 30, 70):
        watch = watch_of(Config())
        for line in given[:cut]:
            watch.warnings(line)
        rest = [(int(line["step"]), text) for line in given[cut:] for text in watch.warnings(line)]
        assert rest == [(step, text) for step, text in whole if step > cut]
