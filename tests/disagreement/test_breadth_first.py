"""Layer by layer the same numbers as with the whole model, in any pieces; every layer is made whole once, in order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from vdr_cli.disagreement import hooks
from vdr_cli.disagreement.information import MEASURES
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine.gathered import GatheredModel
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.models import anatomy
from vdr_cli.models.anatomy import WholeLayer
from vdr_cli.models.head import Head
from vdr_cli.samples import Completions

SPEC = EnsembleSpec(members=4, dropout=0.2, seed=5)
SPECS = {
    "full": SPEC,
    "top": replace(SPEC, scope="last_k", last_k=1),
    "token": replace(SPEC, mask_sharing="token"),
}


@contextmanager
def empty_model(model: nn.Module, entered: list[int]) -> Iterator[tuple[nn.Module, WholeLayer]]:
    """A copy of the model whose decoder layers are empty but for the one that is whole."""
    with GatheredModel(model, torch.device("cpu"), None).layer_by_layer() as (twin, whole_layer):

        @contextmanager
        def noted(layer: int) -> Iterator[None]:
            entered.append(layer)
            with whole_layer(layer):
                yield

        assert any(parameter.is_meta for parameter in twin.parameters())
        yield twin, noted


def by_layers(spec: EnsembleSpec, whole_layer: WholeLayer) -> EnsembleReader:
    return EnsembleReader(spec, partial(nullcontext, whole_layer))


def check_agreement(
    model: nn.Module, batch: Completions, spec: EnsembleSpec, positions: str, budget: int | None
) -> None:
    request = MeasureRequest(batch, 3, 1, positions=positions, measures=MEASURES)
    whole = EnsembleReader(spec).measure(model, request)
    entered: list[int] = []
    with empty_model(model, entered) as (twin, whole_layer):
        found = by_layers(spec, whole_layer).measure(
            twin, MeasureRequest(batch, 3, 1, positions=positions, measures=MEASURES, budget=budget)
        )
    assert entered == [0, 1, 2]
    for name in MEASURES:
        torch.testing.assert_close(found.get(name), whole.get(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layer_by_layer_is_the_whole_model(
    spec: EnsembleSpec, positions: str, tiny_model: Callable, ragged: Callable
) -> None:
    for budget in (None, 1, 40_000):
        check_agreement(tiny_model(), ragged(), spec, positions, budget)


def test_every_architecture_can_be_read_layer_by_layer(
    architecture: str, tiny_model: Callable, ragged: Callable
) -> None:
    model = tiny_model(architecture)
    check_agreement(model, ragged(), SPECS["full"], "all", None)
    check_agreement(model, ragged(), replace(SPECS["top"], last_k=2), "last", 1)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "olmo2", "mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("spec", [SPECS["full"], SPECS["top"]], ids=["full", "top"])
def test_peft_wrapped_models_too(
    kind: str, spec: EnsembleSpec, tiny_model: Callable, adapted: Callable, ragged: Callable
) -> None:
    model = adapted(tiny_model(kind))
    for positions, budget in (("all", None), ("last", 1)):
        check_agreement(model, ragged(), spec, positions, budget)


def test_one_token_and_empty_completions(tiny_model: Callable, ragged: Callable) -> None:
    check_agreement(tiny_model(), ragged(length=1), SPEC, "all", None)
    batch = ragged()
    batch.completion_mask[:3] = False
    check_agreement(tiny_model(), batch, SPEC, "all", 1)
    batch.completion_mask[:] = False
    check_agreement(tiny_model(), batch, SPEC, "last", None)


@pytest.mark.parametrize("spec", [SPECS["full"], SPECS["top"]], ids=["full", "top"])
def test_out_of_memory_halves_members_then_rows(spec: EnsembleSpec, tiny_model: Callable, ragged: Callable) -> None:
    model, batch, sizes, entered = tiny_model(), ragged(groups=3, group_size=4), [], []
    truth = EnsembleReader(spec).measure(model, MeasureRequest(batch, 4, 1)).bald

    def scarce(module: nn.Module, arguments: tuple, output: object) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with empty_model(model, entered) as (twin, whole_layer):
        layer = anatomy.decoder_layers(twin)[-1]
        with hooks.hooked(layer.register_forward_hook, scarce):
            found = by_layers(spec, whole_layer).measure(twin, MeasureRequest(batch, 4, 1)).bald
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    assert max(sizes) > 2 and min(sizes) <= 2
    assert entered == [0, 1, 2]


def test_a_rank_that_fails_goes_on_gathering(tiny_model: Callable, ragged: Callable) -> None:
    """The others are waiting for it in every layer that is left."""
    entered: list[int] = []

    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with empty_model(tiny_model(), entered) as (twin, whole_layer):
        layer = anatomy.decoder_layers(twin)[0]
        with hooks.hooked(layer.register_forward_hook, never), pytest.raises(MachineError, match="not enough memory"):
            by_layers(SPEC, whole_layer).measure(twin, MeasureRequest(ragged(), 3, 1))
    assert entered == [0, 1, 2]


def test_a_head_that_cannot_hold_the_logits_of_one_position(
    tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Head, "logits_into", never)
    with (
        empty_model(tiny_model(), []) as (twin, whole_layer),
        pytest.raises(MachineError, match="not enough memory for one member"),
    ):
        by_layers(SPEC, whole_layer).measure(twin, MeasureRequest(ragged(), 3, 1))


def test_layers_that_use_each_others_keys_are_refused(tiny_model: Callable, ragged: Callable) -> None:
    model = tiny_model("qwen2", hidden_act="gelu")
    model.config.num_kv_shared_layers = 1
    with empty_model(model, []) as (twin, whole_layer), pytest.raises(ConfigError, match=r"engine\.gather"):
        by_layers(SPEC, whole_layer).measure(twin, MeasureRequest(ragged(), 3, 1))
