"""Measures land where they belong, in whatever order states arrive and however few logits fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vdr_cli.disagreement.information import token_statistics
from vdr_cli.disagreement.results import HEAD_ROWS, MOST_LOGITS, Results
from vdr_cli.errors import MachineError
from vdr_cli.models.head import Head

M, D, V = 3, 4, 61
NAMES = frozenset({"bald", "member_logps"})


def head() -> Head:
    return Head(torch.randn(V, D, generator=torch.Generator().manual_seed(1)), None)


def test_each_position_gets_its_measure_and_the_others_stay_0(ragged: Callable) -> None:
    batch, hidden = ragged(), torch.randn(M, 3, D, generator=torch.Generator().manual_seed(0))
    rows, tokens = torch.tensor([4, 0, 2]), torch.tensor([1, 0, 3])
    results = Results(batch, M, NAMES, head(), 2**20)
    results.take(hidden[:, :2], rows[:2], tokens[:2])
    results.take(hidden[:, 2:], rows[2:], tokens[2:])
    found = results.statistics(one_a_row=False)
    expected = token_statistics(hidden, batch.completion_ids[rows, tokens], head(), NAMES)
    torch.testing.assert_close(found.bald[rows, tokens], expected.bald)
    torch.testing.assert_close(found.member_logps[:, rows, tokens], expected.member_logps)
    assert int(found.bald.count_nonzero()) == 3
    assert torch.equal(results.statistics(one_a_row=True).bald, found.bald.sum(1))


@pytest.mark.parametrize(
    ("budget", "logits"),
    [(1, 1), (4 * V * HEAD_ROWS, 4 * V * HEAD_ROWS), (10**6, 5 * 10**5), (2**40, MOST_LOGITS)],
)
def test_logits_take_a_part_of_the_budget(budget: int, logits: int, ragged: Callable) -> None:
    assert Results(ragged(), M, NAMES, head(), budget).budget == logits


def test_a_smaller_budget_that_worked_is_kept(ragged: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, hidden, tried = ragged(), torch.randn(M, 2, D), []
    least = 4 * M * V

    def scarce(hidden: object, targets: object, head: object, measures: object, budget: int) -> object:
        tried.append(budget)
        if budget > 2 * least:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_statistics(hidden, targets, head, measures, budget)

    monkeypatch.setattr("vdr_cli.disagreement.results.token_statistics", scarce)
    results = Results(batch, M, NAMES, head(), 8 * least)
    for _ in range(2):
        results.take(hidden, torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert tried == [8 * least, 4 * least, 2 * least, 2 * least]


def test_one_position_that_does_not_fit_is_an_error(ragged: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vdr_cli.disagreement.results.token_statistics", never)
    with pytest.raises(MachineError, match="not enough memory"):
        Results(ragged(), M, NAMES, head(), 10**6).take(torch.randn(M, 1, D), torch.tensor([0]), torch.tensor([0]))
