"""The state that a step leaves to the next, and what is due after it."""

from __future__ import annotations

import pytest

from vdr_cli.training.state import LoopState

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
