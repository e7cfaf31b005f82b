"""Rewards that say nothing get a line, and not a thousand of them."""

from vdr_cli.rewards.watch import NO_REWARD, RewardWatch


def lines(watch: RewardWatch, *steps: list[float]) -> list[list[str]]:
    return [watch.warnings(step) for step in steps]


def test_only_zeros_in_the_first_rollouts_are_said_once() -> None:
    found = lines(RewardWatch(["f", "g"], 100), [0.0, 0.0], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0])
    assert [len(each) for each in found] == [0, 0, 1, 0]
    assert found[2][0].startswith("reward f was 0 for every completion of the first 3 rollouts: ")
    ((line,),) = lines(RewardWatch(["f"], 1), [0.0])
    assert "the first 1 rollout:" in line
    assert lines(RewardWatch(["f"], 100), [0.0], [0.0], [1.0]) == [[], [], []]


def test_a_step_of_none_alone_is_said_1_2_4_times() -> None:
    found = lines(RewardWatch(["f"], 100), *[[NO_REWARD]] * 4, [1.0])
    assert [len(each) for each in found] == [1, 1, 0, 1, 0]
    assert found[0] == [
        "reward f returned None for every completion, in 1 rollout so far: there is no reward to learn from"
    ]
    assert "only the other functions count" in lines(RewardWatch(["f", "g"], 9), [NO_REWARD, 1.0])[0][0]


def test_none_and_zero_are_different() -> None:
    assert lines(RewardWatch(["f"], 9), [0.0], [NO_REWARD], [0.0])[2] == []
