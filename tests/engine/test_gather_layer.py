"""One layer at a time in two processes: the numbers of a full copy, and one gather of the model for the ensemble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

pytestmark = pytest.mark.integration

PROGRAMS = Path(__file__).parent / "programs"
WORKER = PROGRAMS / "gather_worker.py"

LAYERS, PARAMETERS = 3, 12
"""Decoder layers, and parameters of each: DeepSpeed gathers parameter by parameter."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, forked: Run) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what both ranks found."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("layers")
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero | {"stage3_prefetch_bucket_size": "auto"}}))
    ended = forked(str(WORKER), str(folder), ranks=2)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_numbers_are_those_of_a_full_copy(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Ranks with unequal prompts, lengths, budgets: everything in one piece on one, a row at a time on the other."""
    import torch

    for found in ranks[1]:
        for M in (2, 8, 32):
            whole, layers = torch.tensor(found[f"whole{M}"]), torch.tensor(found[f"layers{M}"])
            assert whole.max() > 1e-3
            torch.testing.assert_close(layers, whole, rtol=1e-4, atol=1e-6)


def test_the_ensemble_gathers_a_layer_once_whatever_the_members(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    from vdr_cli.models.anatomy import decoder_layers
    from vdr_cli.models.loading import load_causal_lm

    layers = decoder_layers(load_causal_lm(str(ranks[0])))
    size = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    for found in ranks[1]:
        assert found["moved2"] == found["moved8"] == found["moved32"]
        assert found["moved8"] == {"gathers": LAYERS * PARAMETERS, "bytes": size}
        assert size < found["copy"]["bytes"]


def test_a_rank_short_of_memory_splits_its_work_and_the_other_does_not_notice(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    """One layer of rank 1 holds four rows at a time: the numbers and gathers of both ranks are those of plenty."""
    import torch

    assert ranks[1][0]["tries"] == ranks[1][0]["layer tries"] == []
    for name in ("tries", "layer tries"):
        tries = ranks[1][1][name]
        assert max(tries) > 4 >= min(tries)
    for found in ranks[1]:
        truth = torch.tensor(found["whole8"])
        for way in ("scarce whole", "scarce layers"):
            torch.testing.assert_close(torch.tensor(found[way]), truth, rtol=1e-4, atol=1e-6)
        assert found["moved scarce whole"] == {"gathers": 0, "bytes": 0}
        assert found["moved scarce layers"] == found["moved8"]


def test_a_forward_gathers_each_layer_once(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["forward"]["gathers"] for found in ranks[1]] == [LAYERS * PARAMETERS] * 2


def test_ranks_with_fewer_micro_batches_take_part_in_the_others_gathers(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Five micro-batches on the rank with three groups, each read in two passes: prompts, then completions."""
    assert [found["read"]["gathers"] for found in ranks[1]] == [5 * 2 * LAYERS * PARAMETERS] * 2


def test_an_error_of_one_rank_is_one_of_both(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["error"] for found in ranks[1]] == ["ZeroDivisionError", "RuntimeError"]


def test_the_model_is_exported_whole(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    import torch

    from vdr_cli.models.loading import load_causal_lm

    ids = torch.tensor([[3, 4, 5]])
    before, after = (load_causal_lm(str(path)) for path in (ranks[0], ranks[0] / "exported"))
    with torch.no_grad():
        assert torch.equal(before(input_ids=ids).logits, after(input_ids=ids).logits)
