"""What disagreement costs, side by side with the way the original code computed it.

    python scripts/bench/bench_disagreement.py --table TABLE.md     the asked cases beside the measured
    python scripts/bench/bench_disagreement.py --curves docs/images/disagreement_cost.png    cost against M, T, G and P

Every case runs in a process of its own, so that its peak memory is its own. Times are the least of the repeats, ours
and the original's taken in turns. The matrix rate is measured in the same process, between the repeats. Wall time and
CPU time are both given: on a machine that others use at the same time only the ratios of CPU time mean anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bench_bonus
import psutil
import torch
from torch import Tensor, nn

from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.models import anatomy
from vdr_cli.models.products import product, with_products
from vdr_cli.samples import Completions


@dataclass(frozen=True)
class Case:
    """One way of computing one mode on one model and batch."""

    way: str = "ours"  # ours | original
    mode: str = "per_token"  # per_token | end_of_sequence
    members: int = 8
    group_size: int = 8
    groups: int = 1
    prompt: int = 256
    completion: int = 128
    last_k: int | None = None
    layers: int = 12
    width: int = 512
    inner: int = 2048
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 32_000
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    repeats: int = 2


# ---- the two ways ------------------------------------------------------------------------------------------------


def ours(model: nn.Module, completions: Completions, case: Case) -> Statistics:
    spec = EnsembleSpec(case.members, scope="last_k" if case.last_k else "full", last_k=case.last_k)
    positions = "last" if case.mode == "end_of_sequence" else "all"
    return measure(model, completions, case.group_size, spec, 0, positions, {"bald"})


@torch.no_grad()
def original(model: nn.Module, completions: Completions, case: Case) -> Tensor:
    """As grpo-vdr does: M passes one after another in train mode with independent dropout, full logits, softmax,
    all M probability tensors stacked, entropies with an epsilon inside the logarithm."""
    ids = torch.cat([completions.prompt_ids, completions.completion_ids], 1)
    mask = torch.cat([completions.prompt_mask, completions.completion_mask], 1).long()
    width = completions.prompt_ids.shape[1]
    model.train()
    probabilities = []
    with independent_dropout(model, 0.1):
        for _ in range(case.members):
            logits = model(input_ids=ids, attention_mask=mask).logits
            probabilities.append(torch.softmax(logits[:, width - 1 : -1], -1))
    model.eval()
    stacked = torch.stack(probabilities)  # (M, B, T, V)
    mean = stacked.mean(0)
    total = -(mean * torch.log(mean + 1e-10)).sum(-1)
    aleatoric = -(stacked * torch.log(stacked + 1e-10)).sum(-1).mean(0)
    information = total - aleatoric
    if case.mode == "end_of_sequence":
        return information[:, -1]
    return (information * completions.completion_mask).sum(-1) / completions.completion_mask.sum(-1)


@contextmanager
def independent_dropout(model: nn.Module, p: float) -> Iterator[None]:
    """Fresh dropout at every element of both residual branches of every layer."""

    def drop(module: nn.Module, arguments: object, output: object) -> object:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], p, training=True), *output[1:])
        return nn.functional.dropout(output, p, training=True)

    blocks = [block for layer in anatomy.decoder_layers(model) for block in anatomy.residual_blocks(layer)]
    handles = [block.register_forward_hook(drop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- one case in its own process -----------------------------------------------------------------------------------


def build(case: Case) -> tuple[nn.Module, Completions]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.inner,
        tie_word_embeddings=True,
        dtype=getattr(torch, case.dtype),
    )
    with torch.device(case.device):
        model = Qwen2ForCausalLM(config).to(getattr(torch, case.dtype)).eval()
        if case.way == "ours":
            with_products(model)  # as vdr loads it
        prompts = torch.randint(0, case.vocabulary, (case.groups, case.prompt)).repeat_interleave(case.group_size, 0)
        rows = len(prompts)
        answers = torch.randint(0, case.vocabulary, (rows, case.completion))
        batch = Completions(
            prompts,
            torch.ones_like(prompts, dtype=torch.bool),
            answers,
            torch.ones_like(answers, dtype=torch.bool),
            torch.zeros(rows, case.completion),
            torch.zeros(rows, dtype=torch.bool),
        )
    return model, batch


def run_case(case: Case) -> dict[str, float]:
    torch.set_num_threads(case.threads)
    model, batch = build(case)
    way = ours if case.way == "ours" else original
    small = replace(case, members=2)
    way(model, trimmed(batch, case.group_size), small)  # first call: thread pools, kernels
    times, products = [], [matrix_product(case)]
    with PeakMemory(case.device) as memory:
        for _ in range(case.repeats):
            times.append(timed(lambda: way(model, batch, case), case.device))
            products.append(matrix_product(case))
    wall, cpu = (min(column) for column in zip(*times, strict=True))
    wall_flop, cpu_flop = (min(column) for column in zip(*products, strict=True))
    work = useful_work(case)
    return {
        "seconds": wall,
        "cpu": cpu,
        "peak_gb": memory.peak / 2**30,
        "rate": 1 / wall_flop,
        "share": work * wall_flop / wall,
        "cpu_share": work * cpu_flop / cpu if cpu_flop else 0.0,
    }


def trimmed(batch: Completions, group_size: int) -> Completions:
    part = batch.rows(slice(0, group_size))
    return replace(
        part,
        prompt_ids=part.prompt_ids[:, :4],
        prompt_mask=part.prompt_mask[:, :4],
        completion_ids=part.completion_ids[:, :4],
        completion_mask=part.completion_mask[:, :4],
        sampler_logps=part.sampler_logps[:, :4],
    )


def timed(function: Callable[[], object], device: str) -> tuple[float, float]:
    """(wall, CPU) seconds; CPU counts all threads of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def matrix_product(case: Case) -> tuple[float, float]:
    """(wall, CPU) seconds a FLOP of the product that the model's MLP makes, in the case's dtype: torch's or ours,
    whichever is faster."""
    rows = 1024 if case.device == "cpu" else 8192
    a = torch.randn(rows, case.width, device=case.device, dtype=getattr(torch, case.dtype))
    b = torch.randn(case.inner, case.width, device=case.device, dtype=getattr(torch, case.dtype))
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [nn.functional.linear, product]
    runs = [timed(lambda: [way(a, b) for _ in range(8)], case.device) for way in ways for _ in range(4)]  # noqa: B023
    flop = 8 * 2 * rows * case.width * case.inner
    wall, cpu = (min(column) for column in zip(*runs, strict=True))
    return wall / flop, cpu / flop


def useful_work(case: Case) -> float:
    """FLOP of the ideal: trunk over M·(P + G·T) tokens a group (less for last_k), head where it is needed."""
    kept = case.kv_heads / case.heads
    layer = 2 * (case.width**2 * (2 + 2 * kept) + 3 * case.width * case.inner)
    tokens = case.groups * (case.prompt + case.group_size * (case.completion - 1))
    repeats = (
        case.members * case.layers if case.last_k is None else case.layers - case.last_k + case.members * case.last_k
    )
    positions = case.groups * case.group_size * (1 if case.mode == "end_of_sequence" else case.completion)
    return tokens * layer * repeats + case.members * positions * 2 * case.width * case.vocabulary


class PeakMemory:
    """Bytes above what was held on entry, at the highest: sampled resident size, or the CUDA allocator's own peak."""

    def __init__(self, device: str) -> None:
        self.device, self.peak, self._done = device, 0, threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        if self.device != "cpu":
            self.peak = torch.cuda.max_memory_allocated() - self._before
            return
        self._done.set()
        self._thread.join()


def in_own_process(case: Case) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(finished.stdout.splitlines()[-1])
    shape = f"M {case.members} G {case.group_size} P {case.prompt} T {case.completion} k {case.last_k}"
    print(
        f"{case.way:8} {case.mode:15} {shape:34} V {case.vocabulary:7} {result['seconds']:8.2f} s "
        f"{result['cpu']:8.2f} CPU s {result['peak_gb']:6.2f} GB  {result['rate'] / 1e9:7.0f} GFLOP/s  "
        f"share {result['share']:.2f} (CPU {result['cpu_share']:.2f})",
        flush=True,
    )
    return result


# ---- the asked table -----------------------------------------------------------------------------------------------


def table(base: Case, rounds: int) -> str:
    """Every asked number beside the measured one. Rounds take all cases in turns; the least time of each counts."""
    short = replace(base, prompt=32)
    end = replace(base, mode="end_of_sequence")
    cases = {
        "original": replace(base, way="original"),
        "ours": base,
        "original end": replace(end, way="original"),
        "ours end": end,
        "original short": replace(short, way="original"),
        "ours short": short,
        "ours last_k": replace(base, last_k=3),
        "ours end last_k": replace(end, last_k=3),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(in_own_process(case))
    large = in_own_process(LARGE_VOCABULARY)
    step = bench_bonus.measured(rounds, base.threads)

    def least(name: str, key: str) -> float:
        return min(result[key] for result in found[name])

    def most(name: str, key: str) -> float:
        return max(result[key] for result in found[name])

    def times(what: str, asked: str, one: str, other: str) -> tuple[str, str, float, float | None]:
        wall, cpu = (least(one, key) / least(other, key) for key in ("seconds", "cpu"))
        return what, asked, wall, cpu

    steps = [step["with"][key] / step["without"][key] for key in ("step", "step_cpu")]
    memory = most("ours", "peak_gb") / most("original", "peak_gb")
    lines = [
        times("per_token, P 256, T 128, full: time against the original's way", "≤ 0.333", "ours", "original"),
        ("the same: peak memory above the model", "≤ 0.125", memory, None),
        times("per_token, P 32, T 128, full: time", "≤ 0.75", "ours short", "original short"),
        times("end_of_sequence, P 256, T 128, full: time", "≤ 0.3", "ours end", "original end"),
        times("end_of_sequence, last_k 3 against full: time", "≤ 0.4", "ours end last_k", "ours end"),
        times("per_token, last_k 3 against full: time", "≤ 0.6", "ours last_k", "ours"),
        ("per_token, full: share of the matrix rate", "≥ 0.6", most("ours", "share"), most("ours", "cpu_share")),
        ("end_of_sequence, full: share", "≥ 0.6", most("ours end", "share"), most("ours end", "cpu_share")),
        ("V 151,936, d 896, 24 layers, per_token: peak GB above the model", "≤ 1.5", large["peak_gb"], None),
        ("default training configuration: step with bonus over without", "≤ 1.25", steps[0], steps[1]),
    ]
    rows = "\n".join(
        f"| {what} | {asked} | {wall:.3f} | {'' if cpu is None else f'{cpu:.3f}'} |" for what, asked, wall, cpu in lines
    )
    keys = ("seconds", "cpu")
    absolute = "\n".join(
        f"| {name} | {' | '.join(f'{least(name, key):.2f}' for key in keys)} | {most(name, 'peak_gb'):.2f} |"
        for name in cases
    )
    return (
        f"| case | asked | measured | measured in CPU time |\n|---|---|---|---|\n{rows}\n\n"
        f"| run | seconds | CPU seconds | peak GB above the model |\n|---|---|---|---|\n{absolute}\n"
    )


LARGE_VOCABULARY = Case(
    width=896, inner=4864, heads=14, kv_heads=2, layers=24, vocabulary=151_936, repeats=1, group_size=8
)


# ---- curves --------------------------------------------------------------------------------------------------------


SWEEPS = {
    "members": ("members M", [2, 4, 8, 16, 32]),
    "completion": ("completion length T, tokens", [8, 16, 32, 64, 128]),
    "group_size": ("completions in the group G", [2, 4, 8, 16]),
    "prompt": ("prompt length P, tokens", [16, 64, 128, 256]),
}


def curves(base: Case, path: Path) -> None:
    """CPU seconds against M, T, G and P, both modes, ours; the original's per_token beside them."""
    from matplotlib import pyplot

    small = replace(base, layers=4, width=256, inner=1024, vocabulary=4000, prompt=64, completion=32, repeats=3)
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    for axis, (name, (label, values)) in zip(axes, SWEEPS.items(), strict=True):
        for way, mode in (("original", "per_token"), ("ours", "per_token"), ("ours", "end_of_sequence")):
            times = [run_case(replace(small, way=way, mode=mode, **{name: v}))["cpu"] for v in values]
            axis.plot(values, times, marker="o", label=f"{way}, {mode}")
            print(f"{label:30} {way:8} {mode:15} {straightness(values, times)}", flush=True)
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds")
    axes[0].legend()
    others = f"M {small.members}, G {small.group_size}, P {small.prompt}, T {small.completion} where not varied"
    figure.suptitle(f"Reading one group: Qwen2 of {small.layers} layers, d {small.width}; {others}")
    figure.savefig(path, dpi=110)


def straightness(values: list[int], times: list[float]) -> str:
    """The line through a curve and the share of its variance that the line explains."""
    x, y = torch.tensor(values).double(), torch.tensor(times).double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    start = y.mean() - slope * x.mean()
    left = (y - start - slope * x).square().sum() / (y - y.mean()).square().sum()
    return f"{float(start):.3f} + {float(slope):.5f} x seconds, R² {1 - float(left):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="a case as JSON: run it here and print its numbers as JSON")
    parser.add_argument("--table", type=Path, help="run the asked cases and write the Markdown table here")
    parser.add_argument("--curves", type=Path, help="run the cost curves and write the plot here")
    parser.add_argument("--rounds", type=int, default=2, help="times that every case of the table runs")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    base = Case(threads=arguments.threads)
    if arguments.one:
        print(json.dumps(run_case(Case(**json.loads(arguments.one)))))
    if arguments.table:
        text = table(replace(base, repeats=1), arguments.rounds)
        arguments.table.write_text(text)
        print(text)
    if arguments.curves:
        curves(base, arguments.curves)


if __name__ == "__main__":
    main()
