"""One layer at a time in two processes: the numbers of a full copy, and one gather of the model for the ensemble."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

WORKER = """
import json, sys
from contextlib import nullcontext
import deepspeed, torch
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.cli.app import leave
from vdr_cli.config import Config
from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.processes import start_distributed
from vdr_cli.engine.export import export_model
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.samples import Completions, Sampling
from vdr_cli.rollout.transformers_backend import TransformersRollout

torch.set_num_threads(1)
folder = sys.argv[1]
device = start_distributed()
rank = collectives.rank()
moved = {"gathers": 0, "bytes": 0}

def counted(function):
    def call(output, *args, **kwargs):
        moved["gathers"] += 1
        parts = output if isinstance(output, (list, tuple)) else [output]
        moved["bytes"] += sum(part.numel() * part.element_size() for part in parts)
        return function(output, *args, **kwargs)
    return call

for name in ("allgather_fn", "all_gather_into_tensor", "all_gather"):
    setattr(deepspeed.comm, name, counted(getattr(deepspeed.comm, name)))

def engine_of(gather):
    sections = {"ds_config": folder + "/ds.json", "gather": gather}
    model = {"name": folder, "dtype": "float32"}
    return build_engine(Config(model=model, engine=sections, rollout={"backend": "vllm"}), device)

def since(before):
    return {name: moved[name] - before[name] for name in moved}

def no_more_than_four_rows(module, arguments, output):
    tries.append(len(arguments[0]))
    if len(arguments[0]) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory")

def scarce(model):  # on rank 1 alone the last layer has memory for four rows
    layer = decoder_layers(model)[-1]
    return hooked(layer.register_forward_hook, no_more_than_four_rows) if rank else nullcontext()

tries = []
whole, layers = engine_of("whole"), engine_of("layer")
assert layers.by_layers and not whole.by_layers
prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]][: 1 + 2 * rank]  # one prompt here, three there
rollout, sampling = TransformersRollout(0, [2]), Sampling(max_new_tokens=3 + 4 * rank)
keys = list(range(10 * rank, 10 * rank + len(prompts)))
found = {}
with whole.gathered_model() as model:
    completions = rollout.generate(model, RolloutRequest(prompts, 3, sampling, keys))
    for M in (2, 8, 32):
        spec = EnsembleSpec(M, dropout=0.2, seed=1)
        found[f"whole{M}"] = EnsembleReader(spec).measure(model, MeasureRequest(completions, 3, 4)).bald.tolist()
    before = dict(moved)
    with scarce(model):
        reader, request = EnsembleReader(EnsembleSpec(8, dropout=0.2, seed=1)), MeasureRequest(completions, 3, 4)
        again = reader.measure(model, request)
        collectives.barrier()
    found |= {"scarce whole": again.bald.tolist(), "moved scarce whole": since(before), "tries": tries.copy()}
with layers.gathered_model() as model:
    before = dict(moved)
    logps, entropies = layers.read_logps(model, completions, 2, 1.0)  # two micro-batches here, five there
    found["read"] = since(before)
    torch.testing.assert_close(logps, completions.sampler_logps)
    assert (entropies > 0).equal(completions.completion_mask)
    for M in (2, 8, 32):
        spec = EnsembleSpec(M, dropout=0.2, seed=1)
        collectives.barrier()
        before = dict(moved)
        budget = None if rank == 0 else 1  # all at once here, a member and a row at a time there
        request = MeasureRequest(completions, 3, 4, budget=budget)
        statistics = EnsembleReader(spec, layers.whole_layers).measure(model, request)
        found[f"moved{M}"] = since(before)
        found[f"layers{M}"] = statistics.bald.tolist()
    tries.clear()
    before = dict(moved)
    with scarce(model):
        reader = EnsembleReader(EnsembleSpec(8, dropout=0.2, seed=1), layers.whole_layers)
        again = reader.measure(model, MeasureRequest(completions, 3, 4))
    found |= {"scarce layers": again.bald.tolist(), "moved scarce layers": since(before), "layer tries": tries.copy()}
    before = dict(moved)
    model(input_ids=torch.tensor([prompts[0]]))
    found["forward"] = since(before)
    try:
        with collectives.agreed():
            None if rank else 1 / 0
    except Exception as error:
        found["error"] = type(error).__name__
before = dict(moved)
with whole.gathered_model():
    found["copy"] = since(before)

class NoTokenizer:
    def save_pretrained(self, path): ...

from pathlib import Path
export_model(layers, NoTokenizer(), Path(folder) / "exported")
Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
leave(0)  # as `vdr` ends a rank
"""

LAYERS, PARAMETERS = 3, 12
"""Decoder layers, and parameters of each: DeepSpeed gathers parameter by parameter."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
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
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(folder)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=180)[1] for process in running]
    assert not any(process.returncode for process in running), errors[0][-3000:] + errors[1][-3000:]
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
