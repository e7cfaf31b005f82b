"""Peak memory of one update of a long completion, on one rank and divided between two (engine.sequence_parallel).

A tiny random Qwen2 in float32 under ZeRO-3; every case is made by processes of their own, forks of this one. `kept` is
what autograd keeps of the micro-batch for backward, the parameters aside; `peak` is the process's memory at its
highest in forward, backward and step, over what it had after a short update before. `planned` are both by the formulas
of `vdr plan`. `masked` is the update on one rank with the prompt read before its completion, which needs a mask;
`checkpointed` is one rank with gradient checkpointing.
    python scripts/bench/bench_sequence.py [--tokens 4096 8192 16384] [--ways ranks_1 ranks_2 masked checkpointed]
                                           [--json benchmarks/sequence.json]
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import deepspeed  # noqa: F401  once for all forks
import torch
from harness import parser_of, write_results
from transformers import AutoConfig, AutoModelForCausalLM

from vdr_cli.config import Config
from vdr_cli.engine import build, collectives
from vdr_cli.engine.processes import start_distributed
from vdr_cli.launch.environment import free_port
from vdr_cli.planning.shape import shape_of
from vdr_cli.planning.update_memory import activations, update_memory
from vdr_cli.planning.work import Work
from vdr_cli.system.processes import end_process

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL = {
    **SHAPE,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
PROMPT = 64
MIB = 2**20
M_MMAP_THRESHOLD = -3
WAYS = {"ranks_1": 1, "ranks_2": 2, "masked": 1, "checkpointed": 1}
"""Ranks of each way."""


def resident(key: str) -> int:
    """Bytes by this key of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def update(engine: Any, tokens: int, keep: Any) -> None:
    """One update of one row. Collective."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 64, (1, PROMPT), generator=generator)
    completion = torch.randint(3, 64, (1, tokens - PROMPT), generator=generator)
    rows = prompt, torch.ones_like(prompt).bool(), completion, torch.ones_like(completion).bool()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps, _ = engine.forward(*rows, 1.0)
    engine.backward(-logps.mean() / (engine.sequence.size if engine.sequence else 1), last=True)
    engine.step(1e-6)


def measured(engine: Any, tokens: int) -> dict[str, float]:
    """Memory of one update of one row. Collective."""
    parameters = {p.untyped_storage().data_ptr() for p in engine.causal_lm.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.dim() > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    update(engine, 2 * PROMPT, lambda tensor: tensor)  # from now on gradients, moments and buckets are there
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before = resident("VmRSS")
    update(engine, tokens, keep)
    largest = collectives.all_reduce_max([float(resident("VmHWM") - before), float(sum(kept.values()))])
    return {"peak_mib": largest[0] / MIB, "kept_mib": largest[1] / MIB}


def be_rank(folder: Path, rank: int, way: str, port: int, tokens: int) -> NoReturn:
    ranks = WAYS[way]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        torch.set_num_threads(1)
        device = start_distributed()
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system
        model = {"name": str(folder), "dtype": "float32", "gradient_checkpointing": way == "checkpointed"}
        config = Config(model=model, rollout={"max_new_tokens": tokens}, engine={"sequence_parallel": ranks})
        build.PACKED_TOKENS = sys.maxsize if way == "masked" else tokens
        found = measured(build.build_engine(config, device), tokens)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        end_process(code)


def case(folder: Path, tokens: int, way: str) -> dict[str, float]:
    port = free_port()
    children = []
    for rank in range(WAYS[way]):
        child = os.fork()
        if child == 0:
            be_rank(folder, rank, way, port, tokens)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    if any(ended):
        sys.exit(f"{tokens} tokens {way} failed")
    found: dict[str, float] = json.loads((folder / "found.json").read_text())
    return found | planned(tokens, way)


def planned(tokens: int, way: str) -> dict[str, float]:
    if way == "masked":  # which the settings do not choose
        return {}
    ranks = WAYS[way]
    work = Work(
        ranks, element_bytes=4, group_size=1, prompt_tokens=0, new_tokens=tokens, micro_batch_size=1,
        sequence=ranks, checkpointing=way == "checkpointed",
    )  # fmt: skip
    shape = shape_of({**MODEL, "model_type": "qwen2"})
    peak, kept = update_memory(shape, work, "cpu"), activations(shape, work)
    return {"planned_peak_mib": peak / MIB, "planned_kept_mib": kept / MIB}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **MODEL)).save_pretrained(name)
        for tokens in options.tokens:
            for way in options.ways:
                found = results[f"tokens_{tokens}_{way}"] = case(Path(name), tokens, way)
                print(tokens, way, {key: round(value, 1) for key, value in found.items()}, flush=True)
    write_results(options.json, results)


if __name__ == "__main__":
    main()
