"""One of two ranks in the folder argv[1]: the ensemble by whole models and layer by layer, gathers counted."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch

from vdr_cli.cli.app import leave
from vdr_cli.config import Config
from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.export import export_model
from vdr_cli.engine.processes import start_distributed
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling

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
            if rank == 0:
                raise ZeroDivisionError
    except Exception as error:
        found["error"] = type(error).__name__
before = dict(moved)
with whole.gathered_model():
    found["copy"] = since(before)


class NoTokenizer:
    def save_pretrained(self, path): ...


export_model(layers, NoTokenizer(), Path(folder) / "exported")
Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
leave(0)  # as `vdr` ends a rank
