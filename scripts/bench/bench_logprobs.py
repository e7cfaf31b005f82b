"""Memory and time of the LM head's update: chunked with recomputation against all logits at once.

Runs each way in a process of its own and compares peak memory over the start, wall time and results. Default: the
16 × 512 completion tokens, D 896 and V 151,936 of a Qwen2.5-0.5B.
    python scripts/bench/bench_logprobs.py [--tokens 8192] [--hidden 896] [--vocabulary 151936] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys

import torch
from harness import in_own_process, parser_of, seconds_of, write_results
from torch import Tensor

from vdr_cli.models.logprobs import chunked_logps


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The update's way."""
    return chunked_logps(hidden, weight, None, targets)


def dense_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The usual way: float32 logits of all tokens, log-softmax, autograd."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def dense_logps_without_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All logits at once, but the entropy, which no gradient needs, is left out: the leanest dense way."""
    logits = (hidden @ weight.t()).float()
    logps = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return logps, torch.zeros_like(logps)


WAYS = {"chunked": chunked, "dense": dense_logps, "dense_lean": dense_logps_without_entropy}


def memory(device: str) -> float:
    """Peak GiB so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward; memory above the inputs, seconds, and numbers to compare the results by."""
    device, dtype = options.device, getattr(torch, options.dtype)
    torch.manual_seed(0)
    weight = torch.randn(options.vocabulary, options.hidden, device=device).mul_(0.02).to(dtype).requires_grad_()
    hidden = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, options.vocabulary, (options.tokens,), device=device)
    advantages = torch.randn(options.tokens, device=device)
    if device == "cuda":
        warm_up = WAYS[options.way](hidden[:64], weight, targets[:64])[0].sum()
        torch.autograd.grad(warm_up, (hidden, weight))
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    found: dict[str, Tensor] = {}

    def step() -> None:
        found["logps"], found["entropy"] = WAYS[options.way](hidden, weight, targets)
        loss = (found["logps"] * advantages).sum() / options.tokens
        found["grad_hidden"], found["grad_weight"] = torch.autograd.grad(loss, (hidden, weight))

    before = memory(device)
    seconds, cpu_seconds = seconds_of(step, device)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gib": memory(device) - before,
        **{name: found[name].double().mean().item() for name in ("logps", "entropy")},
        **{name: found[name].double().norm().item() for name in ("grad_hidden", "grad_weight")},
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=16 * 512)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--way", choices=list(WAYS), help="run only this one, here, and print JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    results: dict[str, dict[str, float]] = {}
    for _ in range(options.repeats):
        for way in WAYS:
            result = in_own_process(__file__, *sys.argv[1:], "--way", way)
            if way not in results or result["seconds"] < results[way]["seconds"]:
                results[way] = result
    for way, result in results.items():
        print(f"{way:>10}  " + "  ".join(f"{name} {value:.6g}" for name, value in result.items()))
    ratio = {
        way: {key: results["chunked"][key] / results[way][key] for key in ("gib", "seconds", "cpu_seconds")}
        for way in ("dense", "dense_lean")
    }
    for way, found in ratio.items():
        print(
            f"chunked / {way}: peak {found['gib']:.3f}, time {found['seconds']:.3f}, "
            f"processor time {found['cpu_seconds']:.3f}"
        )
    write_results(options.json, {**results, "ratio": ratio})


if __name__ == "__main__":
    main()
