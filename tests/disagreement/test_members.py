"""Members read completions right: against full forwards with masks applied by hand, in every architecture and mode."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vdr_cli.disagreement import information, masks
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.models import anatomy
from vdr_cli.samples import Completions

EVERYTHING = frozenset({"total", "aleatoric", "bald", "rmi", "epkl", "logp_var", "member_logps"})


def float64_measures(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The definitions, term by term: (M, B, T, V) float64 logits and (B, T) tokens."""
    p = torch.softmax(logits.double(), -1)
    mean = p.mean(0)
    entropies = -torch.xlogy(p, p).sum(-1)
    total, aleatoric = -torch.xlogy(mean, mean).sum(-1), entropies.mean(0)
    at_target = p.log().gather(-1, targets.expand(len(p), -1, -1)[..., None]).squeeze(-1)
    count = len(p)
    pairs = sum(
        torch.xlogy(p[i], p[i]).sum(-1) - (p[i] * p[j].log()).sum(-1)
        for i in range(count)
        for j in range(count)
        if i != j
    )
    return {
        "total": total,
        "aleatoric": aleatoric,
        "bald": total - aleatoric,
        "rmi": mean.gather(-1, targets[..., None]).squeeze(-1).log() - at_target.mean(0),
        "epkl": pairs / (count * (count - 1)),
        "logp_var": at_target.var(0),
        "member_logps": at_target,
    }


@torch.no_grad()
def by_hand(model: nn.Module, completions: Completions, spec: EnsembleSpec, step: int) -> Tensor:
    """(M, B, T, V): one whole row, one member at a time, masks multiplied in by hooks written here."""
    layers = anatomy.decoder_layers(model)
    width = anatomy.text_config(model).hidden_size
    first = len(layers) - (spec.last_k or len(layers))
    rows, length = completions.completion_ids.shape
    logits = torch.zeros(spec.members, rows, length, anatomy.output_head(model).weight.shape[0])
    for member in range(spec.members):
        handles = []
        for number in range(first, len(layers)):
            for site, block in zip(("attention", "mlp", "mlp"), anatomy.residual_blocks(layers[number]), strict=False):
                mask = masks.member_mask(spec, step, member, number, site, width)

                def multiply(module: nn.Module, arguments: object, output: object, mask: Tensor = mask) -> object:
                    return (output[0] * mask, *output[1:]) if isinstance(output, tuple) else output * mask

                handles.append(block.register_forward_hook(multiply))
        for row in range(rows):
            prompt = completions.prompt_ids[row][completions.prompt_mask[row]]
            answer = completions.completion_ids[row][completions.completion_mask[row]]
            read = model(input_ids=torch.cat([prompt, answer])[None]).logits[0]
            logits[member, row, : len(answer)] = read[len(prompt) - 1 : -1]
        for handle in handles:
            handle.remove()
    return logits


@pytest.mark.parametrize("scope", ["full", "last_k"])
def test_measures_equal_the_definitions(architecture: str, scope: str, tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(architecture), ragged()
    spec = EnsembleSpec(members=4, dropout=0.2, scope=scope, last_k=2 if scope == "last_k" else None, seed=5)
    truth = float64_measures(by_hand(model, batch, spec, 7), batch.completion_ids)
    assert truth["bald"][batch.completion_mask].min() > 1e-4, "members must differ for the test to mean anything"
    found = EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 7, measures=EVERYTHING))
    last = EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 7, positions="last", measures=EVERYTHING))
    at_end = (torch.arange(6), batch.completion_mask.sum(1) - 1)
    for name in EVERYTHING:
        wanted = truth[name].float() * batch.completion_mask
        torch.testing.assert_close(found.get(name), wanted, rtol=1e-3, atol=3e-6)
        torch.testing.assert_close(last.get(name), wanted[..., at_end[0], at_end[1]], rtol=1e-3, atol=3e-6)
    assert found.bald.max() <= math.log(4)
    assert last.bald.shape == (6,)


@pytest.mark.parametrize("scope", ["full", "last_k"])
def test_expected_ig_is_the_mutual_information_of_completion_and_member(scope: str, tiny_model: Callable) -> None:
    """A whole model with three words, read on all 27 completions of three tokens: E over p̄ of ig_seq is exact."""
    model = tiny_model(vocab_size=3)
    ids = torch.cartesian_prod(*[torch.arange(3)] * 3)
    prompts, everything = torch.tensor([[1, 2, 0, 1]]).expand(27, -1), torch.ones(27, 3, dtype=torch.bool)
    no = torch.zeros(27, dtype=torch.bool)
    batch = Completions(prompts, torch.ones_like(prompts, dtype=torch.bool), ids, everything, torch.zeros(27, 3), no)
    spec = EnsembleSpec(members=4, dropout=0.3, scope=scope, last_k=1 if scope == "last_k" else None, seed=2)
    logps = torch.log_softmax(by_hand(model, batch, spec, 0).double(), -1)
    p = logps.gather(-1, ids.expand(4, -1, -1)[..., None]).sum((-1, -2)).exp()  # (M, 27): of each completion
    torch.testing.assert_close(p.sum(1), torch.ones(4, dtype=torch.float64))
    mean = p.mean(0)
    exact = float(-torch.xlogy(mean, mean).sum() + torch.xlogy(p, p).sum(1).mean())
    found = EnsembleReader(spec).measure(model, MeasureRequest(batch, 27, 0, measures={"member_logps"})).member_logps
    ig = information.ig_seq(found, everything).double()
    assert exact > 1e-2
    assert float((found.double().sum(-1).exp().mean(0) * ig).sum()) == pytest.approx(exact, rel=1e-5)
