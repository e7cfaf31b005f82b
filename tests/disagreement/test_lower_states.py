"""With last_k, sampling is the undropped pass of the lower layers: what it saw is what would be read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from vdr_cli.disagreement import hooks, lower_states
from vdr_cli.disagreement.lower_states import cache_for
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.models import anatomy
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling

TOP = EnsembleSpec(members=4, dropout=0.2, seed=5, scope="last_k", last_k=1)
PROMPTS = [[7, 8, 9], [4, 5, 6, 7, 8], [9], [11, 12, 13, 14]]
G, T = 5, 9


def sampled(model: nn.Module, reader: EnsembleReader, batch_tokens: int = 4096) -> Completions:
    """Ragged completions: ends are frequent, so rows leave the decode batch."""
    rollout = TransformersRollout(pad_id=0, eos_ids=range(2, 20), batch_tokens=batch_tokens)
    with reader.watching(model, tokens=1000) as watcher:
        completions = rollout.generate(
            model, RolloutRequest(PROMPTS, G, Sampling(T), range(len(PROMPTS)), watcher=watcher)
        )
    assert watcher is not None
    watcher.completions = completions
    lengths = completions.completion_mask.sum(1)
    assert len(lengths.unique()) > 3
    return completions


def calls_of(module: nn.Module, action: Callable[[], object]) -> int:
    calls: list[int] = []
    with hooks.hooked(module.register_forward_hook, lambda *_: calls.append(1)):
        action()
    return len(calls)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma2", "bloom", "opt", "mixtral"])
@pytest.mark.parametrize("batch_tokens", [4096, 60, 1])
def test_states_from_sampling_are_those_of_a_pass_of_their_own(
    kind: str, batch_tokens: int, tiny_model: Callable
) -> None:
    """One decode batch, some, and one for every completion; the batch whole, and a row at a time."""
    model, spec = tiny_model(kind), replace(TOP, last_k=2)
    for budget in (None, 1):
        reader = EnsembleReader(spec)
        completions = sampled(model, reader, batch_tokens)
        request = MeasureRequest(completions, G, 1, measures=("bald", "member_logps"), budget=budget)
        found = reader.measure(model, request)
        expected = EnsembleReader(spec).measure(model, request)
        torch.testing.assert_close(found.bald, expected.bald, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.member_logps, expected.member_logps, rtol=1e-4, atol=1e-5)


def test_lower_layers_do_not_run_again(tiny_model: Callable) -> None:
    model, reader = tiny_model(), EnsembleReader(TOP)
    lowest, top = (anatomy.decoder_layers(model)[number].mlp for number in (0, -1))
    for module, expected in ((lowest, 0), (top, 2)):
        request = MeasureRequest(sampled(model, reader), G, 1, positions="last")
        assert calls_of(module, lambda request=request: reader.measure(model, request)) == expected
    assert calls_of(lowest, lambda: reader.measure(model, request)) == 2, "the states are gone with the first measure"
    assert not anatomy.decoder_layers(model)[1]._forward_hooks


def test_states_serve_no_other_completions(tiny_model: Callable) -> None:
    """Completions that were selected or replaced are other ones, whatever their shape."""
    model, reader = tiny_model(), EnsembleReader(TOP)
    completions = sampled(model, reader)
    other = completions.rows(torch.arange(len(completions)).flip(0))
    lowest = anatomy.decoder_layers(model)[0].mlp
    found: list[torch.Tensor] = []
    request = MeasureRequest(other, G, 1)
    assert calls_of(lowest, lambda: found.append(reader.measure(model, request).bald)) == 2
    assert torch.equal(found[0], EnsembleReader(TOP).measure(model, request).bald)


def test_shown_rows_use_the_states_too(tiny_model: Callable) -> None:
    """The first group, token by token, beside the measure at the end of the sequence."""
    model, reader = tiny_model(), EnsembleReader(TOP)
    completions = sampled(model, reader)
    lowest = anatomy.decoder_layers(model)[0].mlp
    request = MeasureRequest(completions, G, 1, positions="last", shown_rows=G)
    assert calls_of(lowest, lambda: reader.measure(model, request)) == 0
    expected = EnsembleReader(TOP).measure(model, MeasureRequest(completions.rows(slice(0, G)), G, 1)).bald
    assert reader.shown is not None
    torch.testing.assert_close(reader.shown.bald, expected, rtol=1e-4, atol=1e-6)
    reader.measure(model, replace(request, shown_rows=0))
    assert reader.shown is None


def test_nothing_is_kept_where_nothing_could_be_used(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_for(tiny_model(), replace(TOP, scope="full", last_k=None), 10) is None
    assert cache_for(tiny_model("lfm2"), TOP, 10) is None
    model, tokens = tiny_model(), 10
    monkeypatch.setattr(lower_states, "MOST_BYTES", 4 * 16 * tokens)
    assert cache_for(model, TOP, tokens) is not None
    assert cache_for(model, TOP, tokens + 1) is None


def test_a_backend_that_reads_elsewhere_leaves_the_pass_to_be_made(tiny_model: Callable) -> None:
    """The states of an earlier sampling stay: a server that samples ahead must not drop them."""
    model, reader = tiny_model(), EnsembleReader(TOP)
    completions = sampled(model, reader)
    with reader.watching(model, 10) as told_nothing:
        assert told_nothing is not None and not told_nothing.has_states
    lowest = anatomy.decoder_layers(model)[0].mlp
    assert calls_of(lowest, lambda: reader.measure(model, MeasureRequest(completions, G, 1))) == 0
