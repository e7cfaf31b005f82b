"""Random numbers of completions: from the seed and the prompt's place alone."""

from __future__ import annotations

import torch

from vdr_cli.audit import streams
from vdr_cli.exploration.draws import uniforms
from vdr_cli.samples import Stream


def test_a_completions_numbers_do_not_depend_on_who_draws_them() -> None:
    whole = uniforms(3, Stream.PERMUTATION, [5, 5, 8, 8], 2, 4)
    assert torch.equal(uniforms(3, Stream.PERMUTATION, [8, 8], 2, 4), whole[2:])
    assert len(set(whole.flatten().tolist())) == 16
    assert not torch.equal(uniforms(4, Stream.PERMUTATION, [5, 5, 8, 8], 2, 4), whole)
    assert not torch.equal(uniforms(3, Stream.TRAINING, [5, 5, 8, 8], 2, 4), whole)


def test_the_audits_generator_gives_the_same() -> None:
    (row,) = uniforms(3, Stream.PERMUTATION, [8, 8], 2, 4)[1:]
    assert row.tolist() == streams.completion_uniforms(3, 8, 1, 4, int(Stream.PERMUTATION)).tolist()
