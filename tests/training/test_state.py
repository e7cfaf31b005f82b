"""The state that a step leaves to the next, and what is due after it."""

from __future__ import annotations

import pytest

from vdr_cli.config.schema import TrainConfig
from vdr_cli.training.state import Due, LoopState, due_after

YES, NO = True, False


@pytest.mark.parametrize(
    ("before", "refused", "expected"),
    [
        (0, [NO], (0, 0)),
        (2, [YES], (3, 3)),
        (2, [NO, YES], (1, 1)),
        (2, [YES, NO], (0, 3)),
        (4, [NO, NO], (0, 0)),
        (1, [YES, NO, YES, YES], (2, 2)),
    ],
)
def test_a_step_that_went_well_ends_the_row(before: int, refused: list[bool], expected: tuple[int, int]) -> None:
    state = LoopState(refused=before)
    longest = state.count_refusals(refused)
    assert (state.refused, longest) == expected


def test_ranks_take_their_prompts_one_after_the_other() -> None:
    taken = []
    for rank in range(3):
        state = LoopState(drawn=10)
        taken += state.take([2, 0, 1], rank)
        assert list(state.take([1, 1, 1], rank)) == [13 + rank] and state.drawn_in_step == 6
    assert taken == [10, 11, 12]


def test_a_step_moves_everything_on() -> None:
    state = LoopState(drawn_in_step=5)
    state.rms.update(8.0, 2.0)
    state.next_pending = "next"  # type: ignore[assignment]
    state.end_step(2, tokens=30)
    assert state.pending == "next" and state.next_pending is None
    state.drawn_in_step = 4
    state.end_step(2, tokens=12, prompt_tokens=7)
    assert (state.step, state.tokens, state.prompt_tokens, state.drawn, state.drawn_in_step) == (4, 42, 7, 9, 0)
    assert state.finished_rms == state.rms.state_dict() and state.finished_rms["average"] > 0


def test_a_restored_state_is_the_one_after_the_last_whole_step() -> None:
    state = LoopState(step=3, drawn=24, tokens=99, best=0.5, best_step=2)
    state.rms.update(8.0, 2.0)
    state.end_step(1, tokens=1)
    state.entropy.follow(0.1, 0.2, 1e-4, 5e-3)
    whole = state.rms.state_dict()
    state.rms.update(100.0, 1.0)  # in a step that is abandoned
    state.take([4], 0)
    found = LoopState.restored(state.saved())
    assert found.entropy == state.entropy and found.entropy.weight(0.2) == 1e-4
    assert found.rms.state_dict() == whole and found.saved() == state.saved() and found.drawn_in_step == 0


@pytest.mark.parametrize(("stride", "every", "due"), [(1, 2, [2, 4, 6]), (2, 3, [4, 6]), (1, 0, [])])
def test_what_is_due_every_nth_step(stride: int, every: int, due: list[int]) -> None:
    names = ("eval_every", "completions_every", "sync_reference_every", "checkpoint_every")
    found = {
        step: due_after(step - stride, step, over=False, **dict.fromkeys(names, every))
        for step in range(stride, 7, stride)
    }
    for name in ("evaluation", "completions", "reference", "checkpoint"):
        assert [step for step, each in found.items() if getattr(each, name)] == due


def test_the_last_step_is_evaluated_and_its_completions_saved() -> None:
    found = due_after(4, 5, over=True, eval_every=3, completions_every=3, sync_reference_every=3, checkpoint_every=5)
    assert found == Due(evaluation=True, completions=True, reference=False, checkpoint=False)
    off = due_after(4, 5, over=True, eval_every=0, completions_every=0, sync_reference_every=0, checkpoint_every=0)
    assert off == Due(False, False, False, False)


@pytest.mark.parametrize(
    ("limits", "over"),
    [
        ({}, [False, False, False, True]),
        ({"max_seconds": 2.5}, [False, False, True, True]),
        ({"max_sampled_tokens": 20}, [False, True, True, True]),
        ({"max_seconds": 99.0, "max_sampled_tokens": 99}, [False, False, False, True]),
    ],
)
def test_a_run_is_over_with_its_steps_its_seconds_or_its_tokens(limits: dict[str, float], over: list[bool]) -> None:
    """The counts go on over a resume: each step is done by a state restored from the one before."""
    train = TrainConfig(steps=4, **limits)  # type: ignore[arg-type]
    state, found = LoopState(), []
    for _ in range(4):
        state.end_step(1, tokens=10, seconds=1.0)
        state = LoopState.restored(state.saved())
        found.append(state.is_over(train))
    assert found == over


def test_a_checkpoint_without_seconds_counts_from_nought() -> None:
    saved = LoopState(step=3, seconds=5.0).saved()
    del saved["seconds"]
    assert LoopState.restored(saved).seconds == 0.0
