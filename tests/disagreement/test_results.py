"""Measures filled in position by position, and what happens where their logits do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vdr_cli.disagreement import results as results_module
from vdr_cli.disagreement.information import Statistics, token_statistics
from vdr_cli.disagreement.results import Results
from vdr_cli.errors import MachineError
from vdr_cli.models.anatomy import output_head
from vdr_cli.models.head import Head

MEMBERS, ROWS, TOKENS, WIDTH, VOCABULARY = 3, 2, 4, 8, 11
MEASURES = frozenset({"bald", "member_logps"})
IDS = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % VOCABULARY
HIDDEN = torch.randn(MEMBERS, 3, WIDTH, generator=torch.Generator().manual_seed(0))
WHERE = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2])


@pytest.fixture(scope="module")
def head() -> Head:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1}
    model: nn.Module = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2))
    return output_head(model)


def results(head: Head, budget: int = 2**30) -> Results:
    completions: Any = SimpleNamespace(completion_ids=IDS)
    return Results(completions, MEMBERS, MEASURES, head, budget)


def test_positions_are_filled_in_and_the_others_are_zero(head: Head) -> None:
    found = results(head)
    with torch.no_grad():
        found.take(HIDDEN, *WHERE)
        expected = token_statistics(HIDDEN, IDS[WHERE], head, MEASURES)
    statistics = found.statistics(one_a_row=False)
    assert statistics.get("bald").shape == (ROWS, TOKENS)
    assert statistics.get("member_logps").shape == (MEMBERS, ROWS, TOKENS)
    torch.testing.assert_close(statistics.get("bald")[WHERE], expected.get("bald"))
    torch.testing.assert_close(statistics.get("member_logps")[:, *WHERE], expected.get("member_logps"))
    assert int((statistics.get("member_logps") != 0).sum()) == MEMBERS * 3


def test_one_position_per_row_is_that_position(head: Head) -> None:
    found = results(head)
    with torch.no_grad():
        found.take(HIDDEN[:, :2], torch.tensor([0, 1]), torch.tensor([3, 0]))
    assert found.statistics(one_a_row=True).get("member_logps").shape == (MEMBERS, ROWS)


class Scarce:
    """token_statistics with memory for so many bytes of logits."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.budgets: list[int] = []

    def __call__(self, hidden: Any, targets: Any, head: Head, measures: Any, budget: int) -> Statistics:
        self.budgets.append(budget)
        if budget > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_statistics(hidden, targets, head, measures, budget)


def test_logits_are_halved_until_they_fit(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    least = 4 * MEMBERS * VOCABULARY
    scarce = Scarce(room=2 * least)
    monkeypatch.setattr(results_module, "token_statistics", scarce)
    found = results(head)
    start = found.budget
    with torch.no_grad():
        found.take(HIDDEN, *WHERE)
    assert scarce.budgets == [start // 2**halved for halved in range(len(scarce.budgets))]
    assert scarce.budgets[-1] <= scarce.room < scarce.budgets[-2]
    plain = results(head)
    monkeypatch.undo()
    with torch.no_grad():
        plain.take(HIDDEN, *WHERE)
    torch.testing.assert_close(found.values, plain.values)


def test_what_does_not_fit_at_one_position_is_an_error(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "token_statistics", Scarce(room=0))
    with torch.no_grad(), pytest.raises(MachineError):
        results(head).take(HIDDEN, *WHERE)


def test_other_errors_are_not_taken_for_a_lack_of_memory(head: Head) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes|size"):
        results(head).take(torch.randn(MEMBERS, 3, WIDTH + 1), *WHERE)
