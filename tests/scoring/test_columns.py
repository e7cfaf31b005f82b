"""Columns of a scored completion against sums written out, with padding that must not count."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vdr_cli.disagreement.information import Statistics
from vdr_cli.samples import Completions
from vdr_cli.scoring.columns import MEASURES, base_columns, ensemble_columns, token_columns

MASK = torch.tensor([[True, True, True], [True, False, False]])
LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -99.0, -99.0]])
ENTROPY = torch.tensor([[0.5, 1.5, 1.0], [0.25, 99.0, 99.0]])
MEMBERS = 4


def statistics(padding: float) -> Statistics:
    generator = torch.Generator().manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.rand(2, 3, generator=generator).masked_fill(~MASK, padding)

    values = {name: tokens() for name in sorted(MEASURES - {"member_logps"})}
    member_logps = -torch.rand(MEMBERS, 2, 3, generator=generator).masked_fill(~MASK, -padding)
    return Statistics(**values, member_logps=member_logps)


def test_base_columns_are_sums_over_valid_tokens() -> None:
    columns = base_columns(LOGPS, ENTROPY, MASK)
    assert columns["n_tokens"].tolist() == [3, 1]
    assert columns["nll_sum"].tolist() == [6.0, 0.5]
    assert columns["nll_mean"].tolist() == [2.0, 0.5]
    assert columns["ppl"].tolist() == pytest.approx([math.exp(2.0), math.exp(0.5)])
    assert columns["entropy_mean"].tolist() == [1.0, 0.25]
    assert columns["entropy_max"].tolist() == [1.5, 0.25]


def test_ensemble_columns_are_reductions_of_their_measure() -> None:
    given = statistics(padding=1e6)
    columns = ensemble_columns(given, MASK)
    bald = given.get("bald").double()
    for row, count in enumerate((3, 1)):
        valid = bald[row, :count]
        assert columns["bald_mean"][row] == pytest.approx(float(valid.mean()))
        assert columns["bald_sum"][row] == pytest.approx(float(valid.sum()))
        assert columns["bald_max"][row] == pytest.approx(float(valid.max()))
        assert columns["bald_eos"][row] == pytest.approx(float(valid[-1]))
        assert columns["epkl_mean"][row] == pytest.approx(float(given.get("epkl")[row, :count].double().mean()))
        sums = given.get("member_logps")[:, row, :count].double().sum(1)
        weights = torch.softmax(sums, 0)
        ig = math.log(MEMBERS) + float((weights * weights.log()).sum())
        assert columns["ig_seq"][row] == pytest.approx(ig, abs=1e-6)
        rmi = float(torch.logsumexp(sums, 0) - math.log(MEMBERS) - sums.mean()) / count
        assert columns["rmi_seq"][row] == pytest.approx(rmi, abs=1e-6)


def test_padding_moves_no_column() -> None:
    one, other = (ensemble_columns(statistics(padding), MASK) for padding in (0.0, 1e6))
    assert {name: values.tolist() for name, values in one.items()} == {name: v.tolist() for name, v in other.items()}


def test_token_columns_have_a_value_per_token_and_null_where_it_is_not_the_assistants() -> None:
    ids = torch.tensor([[7, 8, 9], [5, 0, 0]])
    prompt, own = torch.ones(2, 1, dtype=torch.int64), MASK & torch.tensor([True, False, True])
    completions = Completions(prompt, prompt.bool(), ids, MASK, LOGPS, torch.zeros(2, dtype=torch.bool))
    columns = token_columns(completions, LOGPS, ENTROPY, None)
    assert columns["token_ids"] == [[7, 8, 9], [5]] and columns["token_logp"] == [[-1.0, -2.0, -3.0], [-0.5]]
    assert columns.keys() == {"token_ids", "token_logp", "token_entropy"}
    several = token_columns(replace(completions, policy_mask=own), LOGPS, ENTROPY, statistics(0.0))
    assert several["token_ids"] == columns["token_ids"] and several["token_logp"] == [[-1.0, None, -3.0], [-0.5]]
    assert {"token_bald", "token_rmi"} <= several.keys() and several["token_bald"][0][1] is None
