"""Decoding alone against the memory-bandwidth limit, transformers' generate beside it.

The limit is the time to read every weight once per token step and every cached key and value once per row and step, at
the bandwidth that a large copy reaches. No completion ends early, so both sides decode the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    SHAPES,
    build_model,
    copy_bandwidth,
    device_of,
    dtype_of,
    median_seconds,
    parser_of,
    seconds_of,
    write_result,
)
from torch import Tensor

from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import CudaGraphs, TransformersRollout
from vdr_cli.samples import Sampling


@dataclass(frozen=True)
class Case:
    shape: str
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    repeats: int


FULL = (Case("0.5B", 8, 8, 512, 128, 1), Case("7B", 8, 8, 512, 48, 1))
TOY = (Case("toy", 2, 4, 16, 8, 1),)


def bytes_read(case: Case, element_size: int) -> int:
    """Least bytes that decoding reads. The head is a matrix that every step reads, whether it is tied or not."""
    shape = SHAPES[case.shape]
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    D, inner, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * head_dim
    layer = 2 * D * D + 2 * D * kv + 3 * D * inner
    weights = shape["num_hidden_layers"] * layer + shape["vocab_size"] * D
    column = 2 * shape["num_hidden_layers"] * kv
    cached = sum(case.prompt_tokens + t for t in range(1, case.new_tokens))
    return element_size * ((case.new_tokens - 1) * weights + case.prompts * case.group * column * cached)


def generate(model: Any, ids: Tensor, case: Case) -> Tensor:
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=case.new_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    rows = ids.repeat_interleave(case.group, 0)
    return model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config)


def measure(case: Case, device: torch.device, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    model = build_model(case.shape, device, dtype)
    ids = torch.randint(300, 1000, (case.prompts, case.prompt_tokens), device=device)
    prompts, keys = ids.tolist(), list(range(case.prompts))

    def ours(graphs: CudaGraphs, new_tokens: int = case.new_tokens) -> object:
        rollout = TransformersRollout(0, [], cuda_graphs=graphs)
        return rollout.generate(model, RolloutRequest(prompts, case.group, Sampling(max_new_tokens=new_tokens), keys))

    ways: dict[str, Callable[[], object]] = {
        "vdr": lambda: ours("on"),
        "without graphs": lambda: ours("off"),
        "generate": lambda: generate(model, ids, case),
        "first token": lambda: ours("off", 1),
    }
    warming = {name: seconds_of(way, device) for name, way in ways.items()}
    seconds = {name: median_seconds(way, device, case.repeats, warm_up=False) for name, way in ways.items()}
    limit = bytes_read(case, torch.finfo(dtype).bits // 8) / bandwidth
    tokens = case.prompts * case.group * case.new_tokens
    return {
        "case": vars(case),
        "first_call_seconds": warming,
        "seconds": seconds | {"limit": limit},
        "tokens_per_second": {name: tokens / s for name, s in seconds.items() if name != "first token"},
    }


def headline(found: dict[str, Any]) -> str:
    case, seconds = found["case"], found["seconds"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found["tokens_per_second"].items())
    name = next(iter(found["tokens_per_second"]))
    text = f"{case['shape']} {case['prompts'] * case['group']} x ({case['prompt_tokens']} + {case['new_tokens']}): "
    text += f"{rates} tokens/s; {name} takes {seconds[name] / seconds['limit']:.1f} times the bandwidth limit"
    if "generate" in seconds:
        text += f", {seconds[name] / seconds['generate']:.2f} of generate's time"
    return text


def main() -> None:
    args = parser_of(__doc__).parse_args()
    device, dtype = device_of(args.toy), dtype_of(args.toy)
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "cases": [], "headlines": []}
    for case in TOY if args.toy else FULL:
        found = measure(case, device, dtype, bandwidth)
        result["cases"].append(found)
        result["headlines"].append(headline(found))
        write_result(args.json, result)


if __name__ == "__main__":
    main()
