"""A real engine in a process of its own, on whatever device there is: python engine_worker.py FOLDER DTYPE.

Writes FOLDER/found.json: what test_gpu_engine.py asserts.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **PLACE)

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from gpu_reference import ragged, tokens

from vdr_cli.config import Config
from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.processes import start_distributed
from vdr_cli.models.loading import load_causal_lm
from vdr_cli.models.policy import completion_logps
from vdr_cli.samples import Completions
from vdr_cli.system.processes import end_process

RATE, EPSILON = 1e-2, 1e-2
"""An epsilon as large as the gradients: the first update of Adam is then a smooth function of them."""


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_dropout": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape, **heads)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "model")
    return folder / "model"


def build(folder: Path, dtype: str, device: torch.device, stage: int = 3) -> Engine:
    """Every parameter is really partitioned: no threshold keeps small ones whole."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": "auto"}
    (folder / f"ds_{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    config = Config(
        model={"name": str(folder / "model"), "dtype": dtype},
        train={"max_grad_norm": 1.0, "adam_epsilon": EPSILON, "weight_decay": 0.1},
        engine={"ds_config": str(folder / f"ds_{stage}.json")},
    )
    return build_engine(config, device)


def loss_of(logps: Tensor, batch: Completions) -> Tensor:
    return -(logps * batch.completion_mask).sum() / 10


def step(engine: Engine, batch: Completions, poison: float = 1.0) -> tuple[Tensor, Any]:
    logps, _ = engine.forward(*tokens(batch), 0.7)
    engine.backward(loss_of(logps, batch) * poison, last=True)
    return logps.detach(), engine.step(RATE)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    with engine.gathered_model() as model:
        return {name: parameter.clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.no_grad()
def twin_logps(engine: Engine, batch: Completions) -> Tensor:
    with engine.gathered_model() as model:
        ways = {"share_prompts": engine.share_prompts, "as_trees": engine.as_trees, "packed": engine.packed}
        return completion_logps(model, *tokens(batch), 0.7, **ways)[0]


def plain_step(path: Path, dtype: str, batch: Completions, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """torch alone: float32 masters, gradients of a model in dtype, clipping, AdamW; (weights, gradient norm)."""
    model = load_causal_lm(str(path), getattr(torch, dtype), device=device)
    loss_of(completion_logps(model, *tokens(batch), 0.7)[0], batch).backward()
    masters = {name: parameter.detach().float().requires_grad_() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        masters[name].grad = parameter.grad.float()
    norm = float(torch.nn.utils.clip_grad_norm_(list(masters.values()), 1.0))
    groups = [
        {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPSILON).step()
    return {name: master.detach().to(getattr(torch, dtype)) for name, master in masters.items()}, norm


def update_error(engine: Engine, start: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of what the engine's update differs by from the plain one, over the plain one's."""
    after = weights_of(engine)
    difference = sum((after[name].double() - expected[name].double()).square().sum() for name in expected)
    whole = sum((start[name].double() - expected[name].double()).square().sum() for name in expected)
    return float((difference / whole).sqrt())


def main(folder: Path, dtype: str) -> None:
    path, device = save_model(folder), start_distributed()
    batch = ragged(device, groups=2, group_size=4)
    found: dict[str, Any] = {"device": device.type}

    engine = build(folder, dtype, device)
    found["device of the shards"] = next(engine.causal_lm.parameters()).ds_tensor.device.type
    start = weights_of(engine)
    logps, refused = step(engine, batch, math.nan)
    found["twin is the policy"] = torch.equal(twin_logps(engine, batch), logps)
    found["furthest apart"] = float((twin_logps(engine, batch) - logps).abs().max())
    found["refused"] = [refused.refused, refused.grad_norm == math.inf, same(weights_of(engine), start)]

    expected, norm = plain_step(path, dtype, batch, device)
    _, result = step(engine, batch)  # the step that would have come without the refused one
    found["grad norm"] = result.grad_norm / norm
    found["update error"] = update_error(engine, start, expected)
    second = build(folder, dtype, device, stage=2)
    step(second, batch)
    found["stage 2 update error"] = update_error(second, start, expected)

    again = build(folder, dtype, device)
    step(again, batch)
    found["run to run"] = same(weights_of(engine), weights_of(again))

    checkpoints.save(engine, folder / "checkpoints", 1, {"loop": {}})
    complete, _ = checkpoints.newest_complete(folder / "checkpoints")
    assert complete is not None
    other = build(folder, dtype, device)
    checkpoints.load(other, complete)
    found["loaded"] = same(weights_of(engine), weights_of(other))
    ends = [step(each, batch) for each in (engine, other)]
    found["resumed"] = [
        torch.equal(ends[0][0], ends[1][0]),
        ends[0][1] == ends[1][1],
        same(weights_of(engine), weights_of(other)),
    ]
    (folder / "found.json").write_text(json.dumps(found))
    end_process(0)  # as `vdr` ends a rank


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
