"""Information measures against float64 loops from the definitions, enumeration on a toy, bounds and symmetries."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdr_cli.disagreement import information
from vdr_cli.disagreement.information import MEASURES
from vdr_cli.exploration.bonus import reduce
from vdr_cli.exploration.disagreement import token_credit
from vdr_cli.models.head import Head


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def by_definition(logits: Tensor, target: int) -> dict[str, float]:
    """One position, (M, V) logits, Python floats throughout."""
    rows = logits.double().tolist()
    p = []
    for row in rows:
        top = max(row)
        weights = [math.exp(x - top) for x in row]
        p.append([w / sum(weights) for w in weights])
    M, V = len(p), len(p[0])

    def bald(members: list[int]) -> float:
        mean = [sum(p[m][v] for m in members) / len(members) for v in range(V)]
        return entropy(mean) - sum(entropy(p[m]) for m in members) / len(members)

    mean = [sum(p[m][v] for m in range(M)) / M for v in range(V)]
    logps = [math.log(p[m][target]) for m in range(M)]
    centre = sum(logps) / M
    pairs = [(i, j) for i in range(M) for j in range(M) if i != j]
    divergences = [sum(p[i][v] * math.log(p[i][v] / p[j][v]) for v in range(V) if p[i][v] > 0) for i, j in pairs]
    votes = [max(range(V), key=lambda v, m=m: p[m][v]) for m in range(M)]
    without = [bald([i for i in range(M) if i != j]) for j in range(M)]
    middle = sum(without) / M
    return {
        "total": entropy(mean),
        "aleatoric": sum(entropy(row) for row in p) / M,
        "bald": bald(list(range(M))),
        "rmi": math.log(mean[target]) - centre,
        "epkl": sum(divergences) / len(pairs),
        "logp_var": sum((x - centre) ** 2 for x in logps) / (M - 1),
        "vote_disagree": 1 - max(votes.count(v) for v in votes) / M,
        "bald_jk": M * bald(list(range(M))) - (M - 1) * middle,
        "bald_se": math.sqrt((M - 1) / M * sum((x - middle) ** 2 for x in without)),
    }


def random_logits(n: int, M: int, V: int, spread: float, between: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = spread * torch.randn(n, 1, V, generator=generator)
    return common + between * torch.randn(n, M, V, generator=generator)


@pytest.mark.parametrize(
    ("M", "V", "spread", "between"), [(2, 5, 1, 1), (8, 50, 2, 0.3), (5, 300, 6, 2), (8, 200, 1, 0.03)]
)
def test_measures_equal_the_definitions(M: int, V: int, spread: float, between: float) -> None:
    logits = random_logits(4, M, V, spread, between)
    targets = torch.tensor([0, 1, 2, V - 1])
    found = information.from_logits(logits, targets, MEASURES)
    for position in range(4):
        truth = by_definition(logits[position], int(targets[position]))
        for name, value in truth.items():
            assert float(found[name][position]) == pytest.approx(
                value, rel=2e-5, abs=2e-8 if name == "bald" else 1e-6
            ), name


def test_small_bald_is_right_where_a_difference_of_entropies_is_not() -> None:
    """At bald = 1e-6 and V = 32,000 the entropies agree to all float32 digits; the divergences do not lose any."""
    logits = random_logits(3, 8, 32_000, 1.0, 1.5e-3)
    p = torch.softmax(logits.double(), -1)
    truth = -torch.xlogy(p.mean(1), p.mean(1)).sum(-1) + torch.xlogy(p, p).sum(-1).mean(1)
    found = information.from_logits(logits, torch.zeros(3, dtype=torch.long), {"bald"})["bald"]
    assert truth.max() < 2e-6
    torch.testing.assert_close(found.double(), truth, rtol=2e-2, atol=0)
    p = p.float()
    naive = -torch.xlogy(p.mean(1), p.mean(1)).sum(-1) + torch.xlogy(p, p).sum(-1).mean(1)
    assert ((naive - truth).abs() / truth).max() > 0.05


def test_identical_members_agree() -> None:
    logits = random_logits(3, 1, 500, 3, 0).expand(3, 8, 500).contiguous()
    found = information.from_logits(logits, torch.tensor([0, 1, 2]), MEASURES)
    for name in ("bald", "rmi", "logp_var", "vote_disagree", "bald_se", "epkl", "bald_jk"):
        assert found[name].abs().max() <= 1e-6, name
    assert found["bald"].max() <= 2e-7


def test_disjoint_members_reach_log_m() -> None:
    logits = torch.full((1, 4, 4), -200.0)
    logits[0].fill_diagonal_(0.0)
    found = information.from_logits(logits, torch.tensor([0]), MEASURES)
    assert float(found["bald"]) == pytest.approx(math.log(4))
    assert float(found["total"]) == pytest.approx(math.log(4))
    assert float(found["aleatoric"]) == pytest.approx(0, abs=1e-6)
    assert float(found["vote_disagree"]) == 0.75
    assert float(found["epkl"]) == pytest.approx(200)


def test_probabilities_that_underflow_count_as_zero() -> None:
    logits = random_logits(2, 3, 40, 300.0, 5.0)
    found = information.from_logits(logits, torch.tensor([0, 1]), {"bald", "total", "aleatoric", "bald_jk"})
    assert all(bool(values.isfinite().all()) for values in found.values())


def test_nan_is_never_turned_into_agreement() -> None:
    logits = random_logits(2, 3, 40, 1.0, 1.0)
    logits[1, 0, 0] = float("nan")
    found = information.from_logits(logits, torch.tensor([0, 1]), {"bald", "total", "rmi", "epkl"})
    for name, values in found.items():
        assert values.isnan().tolist() == [False, True], name


def test_only_what_is_asked_is_returned() -> None:
    head = Head(torch.randn(11, 4), None)
    found = information.token_statistics(torch.randn(3, 5, 4), torch.zeros(5, dtype=torch.long), head, {"bald"})
    assert found.bald is not None and found.total is None and found.member_logps is None
    with pytest.raises(KeyError, match="total"):
        found.get("total")
    with pytest.raises(ValueError, match="unknown measure 'bold'"):
        information.token_statistics(torch.randn(3, 5, 4), torch.zeros(5, dtype=torch.long), head, {"bold"})


@pytest.mark.parametrize("budget", [1, 4 * 3 * 97, 3 * 4 * 3 * 97, 2**26])
@pytest.mark.parametrize("head", ["plain", "bias", "scale", "softcap"])
def test_chunked_equals_dense(budget: int, head: str) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 10, 16, generator=generator)
    weight, bias = torch.randn(97, 16, generator=generator), torch.randn(97, generator=generator)
    head_ = Head(
        weight, bias if head == "bias" else None, 0.3 if head == "scale" else 1.0, 2.0 if head == "softcap" else None
    )
    targets = torch.arange(10)
    dense = information.from_logits(head_.logits(hidden).transpose(0, 1).contiguous(), targets, MEASURES)
    chunked = information.token_statistics(hidden, targets, head_, MEASURES, budget)
    for name in MEASURES:
        expected = dense[name].T if name == "member_logps" else dense[name]
        torch.testing.assert_close(chunked.get(name), expected, rtol=1e-6, atol=1e-6)


def test_no_positions_give_empty_statistics() -> None:
    head = Head(torch.randn(11, 4), None)
    found = information.token_statistics(torch.randn(3, 0, 4), torch.zeros(0, dtype=torch.long), head, MEASURES)
    assert found.bald.shape == (0,) and found.member_logps.shape == (3, 0)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_models_at_a_real_vocabulary(seed: int) -> None:
    """Entropies in bfloat16 lose what members differ by; the same bfloat16 logits with float32 entropies lose nothing.

    Between 8 and 16 nats bfloat16 numbers lie 1/16 apart, so a disagreement of 0.03 is 0 or two times too large.
    """
    V, M, N = 151_936, 4, 24
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, 64, generator=generator).bfloat16()
    apart = torch.linspace(0.02, 0.15, N)[torch.randperm(N, generator=generator)][:, None]
    common, own = torch.randn(N, 64, generator=generator), torch.randn(M, N, 64, generator=generator)
    hidden = (0.2 * (common + apart * own)).bfloat16()
    exact = torch.softmax(hidden.transpose(0, 1).float() @ weight.float().T, -1)
    truth = disagreement(exact.double())
    rounded = (hidden @ weight.T).transpose(0, 1)  # logits as a bfloat16 model gives them
    plain = disagreement(torch.softmax(rounded, -1))
    only_entropies = disagreement(exact, torch.bfloat16)

    targets = torch.zeros(N, dtype=torch.long)
    found = information.token_statistics(hidden, targets, Head(weight, None), {"bald"}).bald
    assert correlation(found, truth) > 0.9999
    assert correlation(disagreement(torch.softmax(rounded.float(), -1)), truth) > 0.99
    for lossy in (plain, only_entropies):
        assert (lossy == 0).float().mean() >= 0.5
        assert correlation(lossy, truth) < 0.7
    assert 0.01 < truth.max() < 1 / 32, "below half a step: what is lost is no small part of it"


def disagreement(p: Tensor, kept: torch.dtype | None = None) -> Tensor:
    """H(p̄) - mean_m H(p_m) of (N, M, V), in p's own precision; kept: that of the entropies."""
    mean = p.mean(1)
    total, members = -torch.xlogy(mean, mean).sum(-1), -torch.xlogy(p, p).sum(-1)
    return total.to(kept or p.dtype) - members.to(kept or p.dtype).mean(-1)


def toy_ensemble(M: int, V: int, length: int, seed: int) -> Tensor:
    """(M, V^length) log-probabilities of every sequence under autoregressive members, float64."""
    generator = torch.Generator().manual_seed(seed)
    tables = [2 * torch.randn(M, *[V] * t, V, generator=generator, dtype=torch.float64) for t in range(length)]
    joint = torch.zeros(M, *[V] * length, dtype=torch.float64)
    for t, table in enumerate(tables):
        joint += torch.log_softmax(table, -1).view(M, *[V] * (t + 1), *[1] * (length - t - 1))
    return joint.view(M, -1)


@pytest.mark.parametrize(("M", "V", "length"), [(2, 2, 1), (3, 2, 3), (4, 3, 3)])
def test_expected_ig_is_the_exact_mutual_information(M: int, V: int, length: int) -> None:
    joint = toy_ensemble(M, V, length, seed=M)
    p = joint.exp()
    mean = p.mean(0)
    exact = -torch.xlogy(mean, mean).sum() + torch.xlogy(p, p).sum(-1).mean()
    every_sequence = joint[..., None]  # (M, sequences, 1): one number a sequence
    mask = torch.ones(joint.shape[1], 1)
    ig = information.ig_seq(every_sequence, mask).double()
    rmi = information.rmi_seq(every_sequence, mask).double()
    assert float((mean * ig).sum()) == pytest.approx(float(exact), rel=1e-6)
    assert float((mean * rmi).sum()) >= float(exact) - 1e-9  # Jensen: KL(p̄ ‖ p) side, an upper bound here
    assert float(exact) > 1e-3


@pytest.mark.parametrize("length", [1, 3])
def test_expected_token_measures_on_the_toy(length: int) -> None:
    """E over y ~ p̄ of rmi_t is the reverse mutual information; the chain rule ties per-token numbers to it."""
    joint = toy_ensemble(3, 2, length, seed=0)
    p, mean = joint.exp(), joint.exp().mean(0)
    reverse = (torch.xlogy(mean, mean)[None] - mean * joint).sum(-1).mean()
    scores = information.rmi_seq(joint[..., None], torch.ones(joint.shape[1], 1)).double()
    assert float((mean * scores).sum()) == pytest.approx(float(reverse), rel=1e-6)
    assert p.sum(-1).allclose(torch.ones(3, dtype=torch.float64))


def test_jackknife_removes_most_of_the_bias() -> None:
    """Plug-in bald of 8 members is low by about 1/M of itself; the jackknife is far closer to the converged value."""
    members = random_logits(1, 6000, 40, 1.5, 0.8, seed=3)
    target = torch.tensor([0])
    converged = float(information.from_logits(members, target, {"bald"})["bald"])
    groups = members[0].view(-1, 8, 40)
    found = information.from_logits(groups, target.expand(len(groups)), {"bald", "bald_jk", "bald_se"})
    plug_in, jackknifed = float(found["bald"].mean()), float(found["bald_jk"].mean())
    assert plug_in < 0.95 * converged
    assert abs(jackknifed - converged) < 0.25 * abs(plug_in - converged)
    spread = float(found["bald_jk"].std())
    assert 0.6 * spread < float(found["bald_se"].mean()) < 1.6 * spread


numbers = st.floats(-8, 8, width=32)
ensembles = st.integers(2, 5).flatmap(
    lambda M: st.integers(2, 7).flatmap(
        lambda V: st.lists(st.lists(numbers, min_size=V, max_size=V), min_size=M, max_size=M)
    )
)


@settings(deadline=None, max_examples=150)
@given(ensembles)
def test_bounds(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)[None]
    M, V = logits.shape[1:]
    found = {
        name: values.double() for name, values in information.from_logits(logits, torch.tensor([0]), MEASURES).items()
    }
    assert 0 <= found["bald"] <= math.log(M)
    assert found["bald"] <= found["total"] + 1e-6 and found["total"] <= math.log(V) + 1e-6
    assert found["total"] == pytest.approx(float(found["aleatoric"] + found["bald"]), abs=1e-6)
    assert found["epkl"] >= found["bald"] - 1e-6
    assert found["rmi"] >= 0 and found["logp_var"] >= 0 and 0 <= found["vote_disagree"] <= 1 - 1 / M + 1e-6


@settings(deadline=None, max_examples=60)
@given(ensembles, st.randoms())
def test_the_order_of_members_and_of_the_vocabulary_does_not_matter(rows: list[list[float]], random: object) -> None:
    logits = torch.tensor(rows)[None]
    M, V = logits.shape[1:]
    order, words = list(range(M)), list(range(V))
    random.shuffle(order)
    random.shuffle(words)
    before = information.from_logits(logits, torch.tensor([words[0]]), MEASURES - {"member_logps", "vote_disagree"})
    shuffled = logits[:, order][..., words].contiguous()
    after = information.from_logits(shuffled, torch.tensor([0]), MEASURES - {"member_logps", "vote_disagree"})
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=2e-6)


@settings(deadline=None, max_examples=40)
@given(ensembles)
def test_every_member_twice_changes_no_plug_in_measure(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)[None]
    asked = {"bald", "total", "aleatoric", "rmi"}
    once = information.from_logits(logits, torch.tensor([0]), asked)
    twice = information.from_logits(logits.repeat(1, 2, 1), torch.tensor([0]), asked)
    for name in asked:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-4, atol=2e-6)


def test_sequence_measures_ignore_padding() -> None:
    logps = -torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    short = mask[1:2, :2]
    for measure in (information.ig_seq, information.rmi_seq):
        whole = measure(logps, mask)
        torch.testing.assert_close(whole[1:2], measure(logps[:, 1:2, :2], short))
        assert whole[2] == 0
    scores = (logps.double() * mask).sum(-1)
    expected = (torch.logsumexp(scores, 0) - math.log(4) - scores.mean(0))[:2] / torch.tensor([6, 2])
    torch.testing.assert_close(information.rmi_seq(logps, mask)[:2], expected.float())
    weights = torch.softmax(scores, 0)
    expected = math.log(4) + torch.xlogy(weights, weights).sum(0)
    torch.testing.assert_close(information.ig_seq(logps, mask), expected.float().clamp_min(0))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 2**16))
def test_padding_and_what_lies_in_it_change_nothing(lengths: list[int], extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    logps, values = -torch.rand(3, len(lengths), 6, generator=generator), torch.rand(mask.shape, generator=generator)
    wide_mask = torch.nn.functional.pad(mask, (0, extra))
    wide_logps, wide_values = (
        torch.where(wide_mask, torch.nn.functional.pad(tensor, (0, extra)), -9.0) for tensor in (logps, values)
    )
    for measure in (information.ig_seq, information.rmi_seq):
        torch.testing.assert_close(measure(wide_logps, wide_mask), measure(logps, mask))
    assert torch.equal(information.at_last(wide_values, wide_mask), information.at_last(values, mask))
    for last_n in (None, 2):
        torch.testing.assert_close(reduce(wide_values, wide_mask, last_n), reduce(values, mask, last_n))
    for measure in ("bald", "rmi"):
        wide = token_credit(wide_values, wide_mask, measure, 0.9)
        torch.testing.assert_close(wide[:, :6], token_credit(values, mask, measure, 0.9))


def test_at_last() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    values = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    assert information.at_last(values, mask).tolist() == [2.0, 3.0, 0.0]


def test_combinations_are_consistent() -> None:
    """Any subset of measures gives the same numbers as all of them together."""
    logits, targets = random_logits(3, 4, 30, 2, 1), torch.tensor([0, 5, 9])
    everything = information.from_logits(logits, targets, MEASURES)
    for one, other in itertools.combinations(sorted(MEASURES), 2):
        for name, values in information.from_logits(logits, targets, {one, other}).items():
            torch.testing.assert_close(values, everything[name], rtol=0, atol=0)
