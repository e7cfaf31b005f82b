"""Peak memory of one update of a long completion, on one rank and divided between two (engine.sequence_parallel).

A tiny random Qwen2 in float32 under ZeRO-3; every case is made by processes of their own, forks of this one. `kept` is
what autograd keeps of the micro-batch for backward, the parameters aside; `peak` is the process's memory at its
highest in forward, backward and step, over what it had before. `planned` is the kept part by the formula of `vdr plan`.
    python scripts/bench/bench_sequence.py [--tokens 4096 8192 16384] [--ranks 1 2] [--json benchmarks/sequence.json]
"""

from __future__ import annotations

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
from vdr_cli.engine import collectives
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.processes import start_distributed
from vdr_cli.launch.environment import free_port
from vdr_cli.planning.resources import Work, activations, shape_of
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


def resident(key: str) -> int:
    """Bytes by this key of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measured(engine: Any, tokens: int) -> dict[str, float]:
    """One update of one row. Collective."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 64, (1, PROMPT), generator=generator)
    completion = torch.randint(3, 64, (1, tokens - PROMPT), generator=generator)
    rows = prompt, torch.ones_like(prompt).bool(), completion, torch.ones_like(completion).bool()
    parameters = {p.untyped_storage().data_ptr() for p in engine.causal_lm.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.dim() > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    before = resident("VmRSS")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps, _ = engine.forward(*rows, 1.0)
    engine.backward(-logps.mean() / (engine.sequence.size if engine.sequence else 1), last=True)
    engine.step(1e-6)
    largest = collectives.all_reduce_max([float(resident("VmHWM") - before), float(sum(kept.values()))])
    return {"peak_mib": largest[0] / MIB, "kept_mib": largest[1] / MIB}


def be_rank(folder: Path, rank: int, ranks: int, port: int, tokens: int) -> NoReturn:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        torch.set_num_threads(1)
        device = start_distributed()
        model = {"name": str(folder), "dtype": "float32"}
        config = Config(model=model, rollout={"max_new_tokens": tokens}, engine={"sequence_parallel": ranks})
        found = measured(build_engine(config, device), tokens)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        end_process(code)


def case(folder: Path, tokens: int, ranks: int) -> dict[str, float]:
    port = free_port()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_rank(folder, rank, ranks, port, tokens)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    if any(ended):
        sys.exit(f"{tokens} tokens on {ranks} ranks failed")
    found: dict[str, float] = json.loads((folder / "found.json").read_text())
    work = Work(ranks, element_bytes=4, group_size=1, prompt_tokens=PROMPT, new_tokens=tokens - PROMPT)
    shape = shape_of({**MODEL, "model_type": "qwen2"})
    planned = activations(shape, Work(**{**vars(work), "micro_batch_size": 1, "sequence": ranks}))
    return found | {"planned_mib": planned / MIB}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **MODEL)).save_pretrained(name)
        for tokens in options.tokens:
            for ranks in options.ranks:
                found = results[f"tokens_{tokens}_ranks_{ranks}"] = case(Path(name), tokens, ranks)
                print(tokens, ranks, {key: round(value, 1) for key, value in found.items()}, flush=True)
    write_results(options.json, results)


if __name__ == "__main__":
    main()
