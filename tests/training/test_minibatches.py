"""The rows of a rank in each minibatch."""

from __future__ import annotations

import pytest
import torch

from vdr_cli.training.minibatches import rows_of_minibatches


def groups_on(ranks: list[int], minibatches: int) -> list[list[int]]:
    """The step's groups in each minibatch, when rank r holds the next ranks[r] of them."""
    found: list[list[int]] = [[] for _ in range(minibatches)]
    first = 0
    for count in ranks:
        for part, rows in enumerate(rows_of_minibatches(first, count, minibatches, group_size=3)):
            numbers = (first + rows.view(-1, 3)[:, 0] // 3).tolist()
            assert torch.equal(rows.view(-1, 3) % 3, torch.arange(3).expand(len(numbers), 3)), "groups stay whole"
            found[part] += numbers
        first += count
    return found


@pytest.mark.parametrize("ranks", [[12], [6, 6], [5, 7], [4, 4, 4], [1] * 12])
def test_minibatches_do_not_depend_on_the_ranks(ranks: list[int]) -> None:
    assert groups_on(ranks, 4) == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_every_rank_has_its_share_of_each() -> None:
    for first in (0, 6):
        assert [len(rows) for rows in rows_of_minibatches(first, 6, 3, 2)] == [4, 4, 4]


def test_one_minibatch_is_everything_in_order() -> None:
    (rows,) = rows_of_minibatches(7, 3, 1, 2)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
