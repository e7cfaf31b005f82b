"""Out of memory: smaller pieces and the same numbers, down to one member and one completion; never zeros."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vdr_cli.disagreement import hooks, information, members
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.errors import MachineError
from vdr_cli.models import anatomy
from vdr_cli.samples import Completions

SPEC = EnsembleSpec(members=4, dropout=0.2, seed=5)
TOP = EnsembleSpec(members=4, dropout=0.2, seed=5, scope="last_k", last_k=1)


def test_out_of_memory_splits_and_tries_again(
    tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, asked = tiny_model(), ragged(), []
    truth = measure(model, batch, 3, SPEC, 1).bald
    real = members.plan

    def scarce(model: nn.Module, completions: Completions, group_size: int, count: int, budget: int) -> object:
        asked.append(budget)
        if budget > 2**22:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, completions, group_size, count, budget)

    monkeypatch.setattr(members, "plan", scarce)
    torch.testing.assert_close(measure(model, batch, 3, SPEC, 1, budget=2**25).bald, truth, rtol=1e-5, atol=1e-7)
    assert asked == [2**25, 2**24, 2**23, 2**22]


@pytest.mark.parametrize("spec", [SPEC, TOP], ids=["full", "top"])
def test_out_of_memory_goes_down_to_one_member_and_one_completion(
    spec: EnsembleSpec, tiny_model: Callable, ragged: Callable
) -> None:
    """A network that holds one row at a time, whatever a plan says."""
    model, batch, sizes = tiny_model(), ragged(), []
    truth = measure(model, batch, 3, spec, 1).bald

    def scarce(module: nn.Module, arguments: tuple, output: object) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with hooks.hooked(anatomy.decoder_layers(model)[-1].register_forward_hook, scarce):
        torch.testing.assert_close(measure(model, batch, 3, spec, 1).bald, truth, rtol=1e-4, atol=1e-6)
    assert max(sizes) > 1 == min(sizes)


def test_out_of_memory_in_the_head_halves_the_logits_alone(
    tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, rows, trunks = tiny_model(), ragged(), [], []
    truth = measure(model, batch, 3, SPEC, 1).bald
    real = information.project

    def scarce(hidden: Tensor, head: anatomy.Head, out: Tensor) -> Tensor:
        rows.append(len(hidden))
        if len(hidden) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(hidden, head, out)

    monkeypatch.setattr(information, "project", scarce)
    first = anatomy.decoder_layers(model)[0]
    with hooks.hooked(first.register_forward_hook, lambda *_: trunks.append(1)):
        torch.testing.assert_close(measure(model, batch, 3, SPEC, 1).bald, truth, rtol=1e-5, atol=1e-7)
        assert len(trunks) == 2, "prompts and completions once: the trunk is not read again"
        assert max(rows) > 4 == min(rows), "one position of four members"
        monkeypatch.setattr(information, "project", _never)
        with pytest.raises(MachineError, match="not enough memory"):
            measure(model, batch, 3, SPEC, 1)


def _never(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_at_the_smallest_size_is_an_error_not_zeros(
    tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "plan", _never)
    with pytest.raises(MachineError, match="not enough memory"):
        measure(tiny_model(), ragged(), 3, SPEC, 1)
