"""Out of memory: smaller pieces and the same numbers, down to one member and one completion; never zeros."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vdr_cli.disagreement import hooks, memory
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.errors import MachineError
from vdr_cli.models import anatomy
from vdr_cli.models.head import Head

SPEC = EnsembleSpec(members=4, dropout=0.2, seed=5)
TOP = EnsembleSpec(members=4, dropout=0.2, seed=5, scope="last_k", last_k=1)


def test_out_of_memory_halves_members_then_rows(tiny_model: Callable, ragged: Callable) -> None:
    """A piece that does not fit, and from then on those as large before they are tried."""
    model, batch, sizes = tiny_model(), ragged(groups=4), []
    truth = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald

    def scarce(module: nn.Module, arguments: tuple, output: object) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    row, prompt = memory.bytes_per_row(model, batch)
    two_groups = 2 * 4 * (3 * row + prompt)
    with hooks.hooked(anatomy.decoder_layers(model)[-1].register_forward_hook, scarce):
        found = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1, budget=two_groups)).bald
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)
    prompts_of = {8: 24, 4: 12, 2: 6}  # rows of both passes: four members of two groups, two members, one
    assert sizes[0] == 8, "the prompts of two groups for four members"
    assert sizes.count(8) == sizes.count(4) == 1, "no size fails twice"
    assert [size for size in sizes if size in prompts_of] == [8, 4, *[2] * 8]
    assert sizes.count(6) == 8


@pytest.mark.parametrize("spec", [SPEC, TOP], ids=["full", "top"])
def test_out_of_memory_goes_down_to_one_member_and_one_completion(
    spec: EnsembleSpec, tiny_model: Callable, ragged: Callable
) -> None:
    """A network that holds one row at a time, whatever a plan says."""
    model, batch, sizes = tiny_model(), ragged(), []
    truth = EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1)).bald

    def scarce(module: nn.Module, arguments: tuple, output: object) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with hooks.hooked(anatomy.decoder_layers(model)[-1].register_forward_hook, scarce):
        torch.testing.assert_close(
            EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1)).bald, truth, rtol=1e-4, atol=1e-6
        )
    assert max(sizes) > 1 == min(sizes)


def test_out_of_memory_in_the_head_halves_the_logits_alone(
    tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, rows, trunks = tiny_model(), ragged(), [], []
    truth = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald
    real = Head.logits_into

    def scarce(head: Head, out: Tensor, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        if len(hidden) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(head, out, hidden)

    monkeypatch.setattr(Head, "logits_into", scarce)
    first = anatomy.decoder_layers(model)[0]
    with hooks.hooked(first.register_forward_hook, lambda *_: trunks.append(1)):
        torch.testing.assert_close(
            EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald, truth, rtol=1e-5, atol=1e-7
        )
        assert len(trunks) == 2, "prompts and completions once: the trunk is not read again"
        assert max(rows) > 4 == min(rows), "one position of four members"
        monkeypatch.setattr(Head, "logits_into", _never)
        with pytest.raises(MachineError, match="not enough memory"):
            EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1))


def _never(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_at_the_smallest_size_is_an_error_not_zeros(tiny_model: Callable, ragged: Callable) -> None:
    model = tiny_model()
    with (
        hooks.hooked(anatomy.decoder_layers(model)[0].register_forward_hook, _never),
        pytest.raises(MachineError, match="not enough memory"),
    ):
        EnsembleReader(SPEC).measure(model, MeasureRequest(ragged(), 3, 1))
