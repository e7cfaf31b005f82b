#!/usr/bin/env python3
"""`vdr plan`'s formulas beside what a small run on two processes really moves and holds.

    scripts/verify/plan_check.py [--layers 4] [--hidden 128] [--micro-batch-size 4] [--checkpointing] [--by-layers]
                          [--new-tokens 8]

Makes a small random model, trains it for a few steps, counts the bytes of every collective of a step by phase, of a
rank's model states and of its copy of the weights, and prints each beside the formula. Exit code 1 beyond 10 %.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOLERANCE = 0.10
RANKS, PROMPTS, GROUP = 2, 4, 4


def make_model(folder: Path, layers: int, hidden: int) -> None:
    """A random Qwen2 with the starter's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from vdr_cli.beds.registry import BEDS

    tokenizer = AutoTokenizer.from_pretrained(BEDS["starter"].model_path)
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, torch_dtype="float32",
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_collectives() -> tuple[dict[str, int], Callable[[str], None]]:
    """Bytes this process receives, by `phase operation`, from now on; and how to say which phase it is."""
    import torch
    import torch.distributed as dist

    counted: dict[str, int] = defaultdict(int)
    current = ["start"]
    depth = [0]

    def size(value: Any) -> int:
        if torch.is_tensor(value):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                # The first argument is the full tensor of a gather or reduce, the second the one of a reduce-scatter.
                words = list(args) + [
                    kwargs[k] for k in ("output_tensor", "output", "tensor", "input_tensor", "input") if k in kwargs
                ]
                full = words[1] if name.startswith("reduce_scatter") else words[0]
                counted[f"{current[0]} {name}"] += size(full)
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    names = [
        "all_gather_into_tensor",
        "all_gather",
        "reduce_scatter_tensor",
        "reduce_scatter",
        "all_reduce",
        "broadcast",
    ]
    for name in names:
        setattr(dist, name, counting(name, getattr(dist, name)))
    return counted, lambda name: current.__setitem__(0, name)


def rank(config_path: str, out: str) -> None:
    """One rank: train, and write what was counted."""
    counted, say = count_collectives()
    from vdr_cli.config.load import load_config
    from vdr_cli.launch import watchdog

    watchdog.phase = say  # type: ignore[assignment]
    from vdr_cli import train
    from vdr_cli.engine import collectives

    copied = count_copy()
    snapshots: list[dict[str, int]] = []
    held: dict[str, int] = {}
    original = train.step_metrics

    def step_metrics(res: Any, *rest: Any) -> dict[str, float]:
        snapshots.append(dict(counted))
        held.update(states(res.engine.ds_engine), copy=max(copied))
        return original(res, *rest)

    train.step_metrics = step_metrics
    train.train(load_config(config_path))
    last = {key: snapshots[-1].get(key, 0) - snapshots[-2].get(key, 0) for key in snapshots[-1]}
    if collectives.rank() == 0:
        Path(out).write_text(json.dumps({"moved": {k: v for k, v in last.items() if v}, "held": held}))


def count_copy() -> list[int]:
    """Bytes of the weights that the gathered model has each time it gets some, from now on."""
    from vdr_cli.engine.gathered import GatheredModel

    counted: list[int] = []
    original = GatheredModel._bound

    @contextlib.contextmanager
    def bound(model: Any, *rest: Any) -> Any:
        with original(model, *rest):
            counted.append(sum(p.numel() * p.element_size() for p in model.module.parameters() if not p.is_meta))
            yield

    GatheredModel._bound = bound  # type: ignore[method-assign]
    return counted


def states(engine: Any) -> dict[str, int]:
    """Bytes of this rank's model states."""
    import torch

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    optimizer = engine.optimizer
    shards = [p.ds_tensor if hasattr(p, "ds_tensor") else p.data for p in engine.module.parameters()]
    inner = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", [])
    gradients = getattr(optimizer, "averaged_gradients", {})
    flat = [g for group in gradients.values() for g in (group or [])] if isinstance(gradients, dict) else []
    flat += [optimizer.grad_partitions_flat_buffer] if hasattr(optimizer, "grad_partitions_flat_buffer") else []
    return {"weights": size(shards), "moments": size(inner), "masters": size(masters), "gradients": size(flat)}


def run_yaml(folder: Path, micro_batch_size: int, checkpointing: bool, new_tokens: int) -> Path:
    """The configuration of a run in which every parameter is sharded and nothing is kept between uses."""
    zero = {
        "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = {
        "model": {"name": str(folder / "model"), "gradient_checkpointing": checkpointing},
        "data": {"name": "starter"},
        "rollout": {"group_size": GROUP, "max_new_tokens": new_tokens},
        "train": {"steps": 3, "prompts_per_step": PROMPTS, "micro_batch_size": micro_batch_size,
                  "output": str(folder / "run"), "save_model": False},
        "engine": {"ds_config": str(folder / "ds.json")},
        "observe": {"tensorboard": False, "report": False, "completions_every": 0},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def measured(folder: Path, settings: Path) -> dict[str, dict[str, int]]:
    """The counts of rank 0 of two."""
    from vdr_cli.launch.commands import Target, node_command
    from vdr_cli.launch.environment import free_port

    target = Target(("--rank", str(settings), str(folder / "counted.json")))
    command = node_command(target, {"localhost": list(range(RANKS))}, 0, "127.0.0.1", free_port())
    at = command.index("--module")
    command[at : at + 2] = [__file__]
    subprocess.run(command, check=True)
    return dict(json.loads((folder / "counted.json").read_text()))


def rows(
    folder: Path, micro_batch_size: int, checkpointing: bool, new_tokens: int, counted: Any
) -> list[tuple[str, float, float]]:
    """Name, bytes measured, bytes by formula."""
    from vdr_cli.planning import resources as plan
    from vdr_cli.planning.shape import shape_of
    from vdr_cli.planning.work import Work

    shape = shape_of(json.loads((folder / "model" / "config.json").read_text()))
    work = Work(
        gpus=RANKS, element_bytes=4, prompts_per_step=PROMPTS, group_size=GROUP, new_tokens=new_tokens,
        micro_batch_size=micro_batch_size, checkpointing=checkpointing, members=8,
    )  # fmt: skip
    moved, states, held = plan.traffic(shape, work), plan.model_states(shape, work), counted["held"]
    payload = RANKS / (RANKS - 1)  # the formula has what a rank receives of it
    in_update = sum(size for name, size in counted["moved"].items() if name.startswith("update "))
    elsewhere = sum(counted["moved"].values()) - in_update
    return [
        ("a step, rollout and disagreement", elsewhere, (sum(moved.values()) - moved["update"]) * payload),
        ("a step, update", in_update, moved["update"] * payload),
        ("a rank, weights", held["weights"], states["weights"]),
        ("a rank, gradients", held["gradients"], states["gradients"]),
        ("a rank, master weights and moments", held["masters"] + held["moments"], states["master weights, moments"]),
        ("a rank, what rollout reads", held["copy"], plan.copy_of_weights(shape, work)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=8, help="65 and more: prompts are read before completions")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(*arguments.rank)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        how = arguments.micro_batch_size, arguments.checkpointing, arguments.new_tokens
        make_model(folder / "model", arguments.layers, arguments.hidden)
        counted = measured(folder, run_yaml(folder, *how))
        table = rows(folder, *how, counted)
    print("| bytes of | measured | formula | formula / measured |\n|---|---|---|---|")
    for what, found, expected in table:
        print(f"| {what} | {found:,} | {expected:,.0f} | {expected / found:.3f} |")
    for what, found in counted["moved"].items():
        print(f"  {what}: {found:,}")
    sys.exit(any(abs(expected / found - 1) > TOLERANCE for _, found, expected in table))


if __name__ == "__main__":
    main()
