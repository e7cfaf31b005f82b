"""Decoding alone against the memory-bandwidth limit, transformers' generate beside it.

The limit is the time to read every weight once per token step and every cached key and value once per row and step, at
the bandwidth that a large copy reaches. No completion ends early, so both sides decode the same tokens.
"""

from __future__ import annotations

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

from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling


@dataclass(frozen=True)
class Case:
    shape: str
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    repeats: int


FULL = (Case("0.5B", 8, 8, 512, 256, 2), Case("7B", 8, 8, 512, 128, 1))
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
    sampling = Sampling(max_new_tokens=case.new_tokens)
    rollout, eager = (TransformersRollout(0, [], cuda_graphs=graphs) for graphs in ("on", "off"))
    ours = median_seconds(lambda: rollout.generate(model, prompts, case.group, sampling, keys), device, case.repeats)
    without = median_seconds(lambda: eager.generate(model, prompts, case.group, sampling, keys), device, case.repeats)
    theirs = median_seconds(lambda: generate(model, ids, case), device, case.repeats)
    prefill = seconds_of(lambda: rollout.generate(model, prompts, case.group, Sampling(max_new_tokens=1), keys), device)
    limit = bytes_read(case, torch.finfo(dtype).bits // 8) / bandwidth
    tokens = case.prompts * case.group * case.new_tokens
    return {
        "case": vars(case),
        "seconds": {"vdr": ours, "without graphs": without, "generate": theirs, "first token": prefill, "limit": limit},
        "tokens_per_second": {
            "vdr": tokens / ours,
            "without graphs": tokens / without,
            "generate": tokens / theirs,
            "limit": tokens / limit,
        },
        "ratio_to_generate": ours / theirs,
        "times_the_limit": ours / limit,
    }


def main() -> None:
    args = parser_of(__doc__).parse_args()
    device, dtype = device_of(args.toy), dtype_of(args.toy)
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "cases": [], "headlines": []}
    for case in TOY if args.toy else FULL:
        found = measure(case, device, dtype, bandwidth)
        rates = found["tokens_per_second"]
        result["cases"].append(found)
        result["headlines"].append(
            f"{case.shape} {case.prompts * case.group} x ({case.prompt_tokens} + {case.new_tokens}): "
            f"{rates['vdr']:.0f} tokens/s, without graphs {rates['without graphs']:.0f}, "
            f"generate {rates['generate']:.0f} (ratio of times {found['ratio_to_generate']:.2f}), "
            f"{found['times_the_limit']:.1f} times the bandwidth limit"
        )
        write_result(args.json, result)


if __name__ == "__main__":
    main()
