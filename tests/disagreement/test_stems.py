"""With last_k, the pass that gives the policy's log-probabilities is the undropped pass of the lower layers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vdr_cli.disagreement import hooks
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.disagreement.stems import StemKeeper
from vdr_cli.models import anatomy
from vdr_cli.models.policy import completion_logps

TOP = EnsembleSpec(members=4, dropout=0.2, seed=5, scope="last_k", last_k=1)


@torch.no_grad()
def kept(
    model: torch.nn.Module, batch: object, spec: EnsembleSpec, size: int, share: bool | None, as_trees: bool = False
) -> StemKeeper:
    keeper = StemKeeper(model, spec, batch, 3)
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        part = batch.rows(rows).trimmed()
        with keeper.keeping(rows, part.prompt_ids.shape[1]):
            completion_logps(
                model,
                part.prompt_ids,
                part.prompt_mask,
                part.completion_ids,
                part.completion_mask,
                1.0,
                share_prompts=share,
                as_trees=as_trees,
            )
    return keeper


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("share", [True, False, "trees"])
def test_kept_stems_are_those_that_would_be_made(
    size: int, share: bool | str, tiny_model: Callable, ragged: Callable
) -> None:
    """Micro-batches that cut groups, each way of reading; any division of the ensemble's own."""
    model, batch, spec = tiny_model(), ragged(groups=3), replace(TOP, last_k=2)
    if share == "trees":
        model = tiny_model(sliding_window=None, use_sliding_window=False)
    expected = measure(model, batch, 3, spec, 1, "all", {"bald", "member_logps"})
    keeper = kept(model, batch, spec, size, share is True, as_trees=share == "trees")
    assert keeper.is_full
    for budget in (None, 1, 30_000):
        found = measure(model, batch, 3, spec, 1, "all", {"bald", "member_logps"}, budget, stems=keeper)
        torch.testing.assert_close(found.bald, expected.bald, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.member_logps, expected.member_logps, rtol=1e-4, atol=1e-5)


def test_the_lower_layers_are_not_read_again(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged()
    keeper, calls = kept(model, batch, TOP, 6, True), []
    lowest = anatomy.decoder_layers(model)[0].mlp
    with hooks.hooked(lowest.register_forward_hook, lambda *_: calls.append(1)):
        measure(model, batch, 3, TOP, 1, "last", {"bald"}, stems=keeper)
        assert not calls
        measure(model, batch, 3, TOP, 1, "last", {"bald"})
        assert len(calls) == 2


@pytest.mark.parametrize(("kind", "spec"), [("qwen2", replace(TOP, scope="full", last_k=None)), ("lfm2", TOP)])
def test_nothing_is_kept_where_nothing_could_be_used(
    kind: str, spec: EnsembleSpec, tiny_model: Callable, ragged: Callable
) -> None:
    """Members that differ from the first layer on; models that read prompt and completion together."""
    model, batch = tiny_model(kind), ragged()
    keeper = kept(model, batch, spec, 6, None)
    assert not keeper.is_full
    found = measure(model, batch, 3, spec, 1, "all", {"bald"}, stems=keeper).bald
    assert torch.equal(found, measure(model, batch, 3, spec, 1, "all", {"bald"}).bald)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gemma2", "opt"])
def test_architectures(kind: str, tiny_model: Callable, ragged: Callable) -> None:
    model = tiny_model(kind)
    for batch in (ragged(), ragged(length=1)):
        expected = measure(model, batch, 3, TOP, 1, "all", {"bald"}).bald
        found = measure(model, batch, 3, TOP, 1, "all", {"bald"}, stems=kept(model, batch, TOP, 4, None)).bald
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
