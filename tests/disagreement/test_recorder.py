"""With last_k, sampling is the undropped pass of the lower layers: what it saw is what would be read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from vdr_cli.disagreement import hooks, recorder
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.disagreement.recorder import StemRecorder, recorder_of
from vdr_cli.disagreement.stems import StemKeeper
from vdr_cli.models import anatomy
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling

TOP = EnsembleSpec(members=4, dropout=0.2, seed=5, scope="last_k", last_k=1)
PROMPTS = [[7, 8, 9], [4, 5, 6, 7, 8], [9], [11, 12, 13, 14]]
G, T = 5, 9


def sampled(model: nn.Module, spec: EnsembleSpec, batch_tokens: int = 4096) -> tuple[Completions, StemRecorder]:
    """Ragged completions: ends are frequent, so rows leave the decode batch."""
    found = recorder_of(model, spec, tokens=1000)
    assert found is not None
    rollout = TransformersRollout(pad_id=0, eos_ids=range(2, 20), batch_tokens=batch_tokens)
    with found.watching():
        completions = rollout.generate(model, PROMPTS, G, Sampling(T), range(len(PROMPTS)), watcher=found)
    lengths = completions.completion_mask.sum(1)
    assert len(lengths.unique()) > 3
    return completions, found


def calls_of(module: nn.Module, action: Callable[[], object]) -> int:
    calls: list[int] = []
    with hooks.hooked(module.register_forward_hook, lambda *_: calls.append(1)):
        action()
    return len(calls)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma2", "bloom", "opt", "mixtral"])
@pytest.mark.parametrize("batch_tokens", [4096, 60, 1])
def test_recorded_stems_are_those_that_would_be_made(kind: str, batch_tokens: int, tiny_model: Callable) -> None:
    """One decode batch, some, and one for every completion."""
    model, spec = tiny_model(kind), replace(TOP, last_k=2)
    completions, found = sampled(model, spec, batch_tokens)
    expected = measure(model, completions, G, spec, 1, "all", {"bald", "member_logps"})
    keeper = StemKeeper(model, spec, completions, G, found)
    assert keeper.is_full and not found.prompts and not found.tokens
    for budget in (None, 1):
        measured = measure(model, completions, G, spec, 1, "all", {"bald", "member_logps"}, budget, stems=keeper)
        torch.testing.assert_close(measured.bald, expected.bald, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(measured.member_logps, expected.member_logps, rtol=1e-4, atol=1e-5)


def test_the_lower_layers_are_not_read_again(tiny_model: Callable) -> None:
    model = tiny_model()
    completions, found = sampled(model, TOP)
    lowest, top = (anatomy.decoder_layers(model)[number].mlp for number in (0, -1))
    keeper = StemKeeper(model, TOP, completions, G, found)
    for module, stems, expected in ((lowest, keeper, 0), (lowest, None, 2), (top, keeper, 2)):
        counted = calls_of(module, lambda stems=stems: measure(model, completions, G, TOP, 1, "last", stems=stems))
        assert counted == expected
    assert not anatomy.decoder_layers(model)[1]._forward_hooks


def test_a_part_of_the_rows_has_its_own_stems(tiny_model: Callable) -> None:
    """What is shown of a step is its first group."""
    model = tiny_model()
    completions, found = sampled(model, TOP)
    keeper, first = StemKeeper(model, TOP, completions, G, found), completions.rows(slice(0, G))
    expected = measure(model, first, G, TOP, 1, "all").bald
    torch.testing.assert_close(
        measure(model, first, G, TOP, 1, "all", stems=keeper).bald, expected, rtol=1e-4, atol=1e-6
    )


def test_nothing_is_recorded_where_nothing_could_be_used(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorder_of(tiny_model(), replace(TOP, scope="full", last_k=None), 10) is None
    assert recorder_of(tiny_model("lfm2"), TOP, 10) is None
    model, tokens = tiny_model(), 10
    monkeypatch.setattr(recorder, "MOST_BYTES", 4 * 16 * tokens)
    assert recorder_of(model, TOP, tokens) is not None
    assert recorder_of(model, TOP, tokens + 1) is None


def test_a_backend_that_reads_elsewhere_leaves_the_stems_to_be_made(tiny_model: Callable) -> None:
    model = tiny_model()
    completions, _ = sampled(model, TOP)
    told_nothing = recorder_of(model, TOP, 10)
    assert not StemKeeper(model, TOP, completions, G, told_nothing).is_full
