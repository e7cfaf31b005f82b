"""Disagreement alone against the way the original code computed it: 8 completions of 512 + 256 tokens, 8 members."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from common import SHAPES, device_of, parser_of, write_result

# isort: split
import bench_disagreement as bench  # found through the path that common sets


def case_of(shape: str, toy: bool) -> bench.Case:
    found = SHAPES[shape]
    return bench.Case(
        layers=found["num_hidden_layers"],
        width=found["hidden_size"],
        inner=found["intermediate_size"],
        heads=found["num_attention_heads"],
        kv_heads=found["num_key_value_heads"],
        vocabulary=found["vocab_size"],
        prompt=16 if toy else 512,
        completion=8 if toy else 256,
        dtype="float32" if toy else "bfloat16",
        device="cpu" if toy else "cuda",
        repeats=2,
    )


def cases_of(shape: str, toy: bool) -> dict[str, bench.Case]:
    base = case_of(shape, toy)
    end = replace(base, mode="end_of_sequence")
    return {
        "original": replace(base, way="original"),
        "per_token": base,
        "end_of_sequence": end,
        "end_of_sequence, last quarter": replace(end, last_k=-(-base.layers // 4)),
    }


def main() -> None:
    args = parser_of(__doc__).parse_args()
    device_of(args.toy)
    result: dict[str, Any] = {"shapes": {}, "headlines": []}
    for shape in ("toy",) if args.toy else ("0.5B", "7B"):
        found: dict[str, dict[str, float]] = {}
        for name, case in cases_of(shape, args.toy).items():
            try:
                found[name] = bench.run_case(case)
            except torch.cuda.OutOfMemoryError as error:  # the original's stack of probabilities may not fit
                found[name] = {"out_of_memory": 1.0}
                result.setdefault("errors", {})[f"{shape} {name}"] = str(error)[:300]
            gc.collect()
            torch.cuda.empty_cache()
            result["shapes"][shape] = found
            write_result(args.json, result)
        result["headlines"] += lines_of(shape, found)
        write_result(args.json, result)


def lines_of(shape: str, found: dict[str, dict[str, float]]) -> list[str]:
    original = found["original"].get("seconds")
    lines = []
    for name, numbers in found.items():
        if "seconds" not in numbers:
            lines.append(f"{shape} {name}: out of memory")
            continue
        ratio = f"{numbers['seconds'] / original:.2f} of the original's time, " if original else ""
        lines.append(
            f"{shape} {name}: {numbers['seconds']:.3f} s, {ratio}peak {numbers['peak_gb']:.2f} GiB, "
            f"{numbers['share']:.2f} of the matrix rate"
        )
    return lines


if __name__ == "__main__":
    main()
