"""The cost of disagreement, side by side with the way the original code computed it.

    python scripts/bench/bench_disagreement.py --asked [--json PATH]      the asked cases beside the measured
    python scripts/bench/bench_disagreement.py --shortcuts --rounds 9     what each shortcut saves
    python scripts/bench/bench_disagreement.py --curves docs/images/disagreement_cost.png    cost against M, T, G and P

Every case runs in a process of its own, so that its peak memory is its own. Times are the least of the repeats, ours
and the original's taken in turns. The matrix rate is measured in the same process, between the repeats. Wall time and
CPU time are both given: on a machine that others use at the same time only the ratios of CPU time mean anything.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_bonus
import harness
import psutil
import torch
from harness import parser_of, seconds_of, write_results
from torch import Tensor, nn

from vdr_cli.disagreement import reading
from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.models import anatomy
from vdr_cli.models.cpu_linear import product, with_cpu_linears
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
    return EnsembleReader(spec).measure(model, MeasureRequest(completions, case.group_size, 0, positions=positions))


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
            with_cpu_linears(model)  # as vdr loads it
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
            times.append(seconds_of(lambda: way(model, batch, case), case.device))
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
        policy_mask=part.policy_mask[:, :4],
    )


def matrix_product(case: Case) -> tuple[float, float]:
    """(wall, CPU) seconds a FLOP of the product that the model's MLP makes, in the case's dtype: torch's or ours,
    whichever is faster."""
    rows = 1024 if case.device == "cpu" else 8192
    a = torch.randn(rows, case.width, device=case.device, dtype=getattr(torch, case.dtype))
    b = torch.randn(case.inner, case.width, device=case.device, dtype=getattr(torch, case.dtype))
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [nn.functional.linear, product]
    runs = [seconds_of(lambda: [way(a, b) for _ in range(8)], case.device) for way in ways for _ in range(4)]  # noqa: B023
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
    result = harness.in_own_process(__file__, "--one", json.dumps(asdict(case)))
    shape = f"M {case.members} G {case.group_size} P {case.prompt} T {case.completion} k {case.last_k}"
    print(
        f"{case.way:8} {case.mode:15} {shape:34} V {case.vocabulary:7} {result['seconds']:8.2f} s "
        f"{result['cpu']:8.2f} CPU s {result['peak_gb']:6.2f} GB  {result['rate'] / 1e9:7.0f} GFLOP/s  "
        f"share {result['share']:.2f} (CPU {result['cpu_share']:.2f})",
        flush=True,
    )
    return result


# ---- the asked table -----------------------------------------------------------------------------------------------


def cases_of(base: Case) -> dict[str, Case]:
    """The runs that the asked numbers come from."""
    short, end = replace(base, prompt=32), replace(base, mode="end_of_sequence")
    return {
        "original": replace(base, way="original"),
        "ours": base,
        "original end": replace(end, way="original"),
        "ours end": end,
        "original short": replace(short, way="original"),
        "ours short": short,
        "ours last_k": replace(base, last_k=3),
        "ours end last_k": replace(end, last_k=3),
    }


RATIOS = {
    "per_token": ("ours", "original", 0.333),
    "per_token, short prompt": ("ours short", "original short", 0.75),
    "end_of_sequence": ("ours end", "original end", 0.3),
    "end_of_sequence, last_k": ("ours end last_k", "ours end", 0.4),
    "per_token, last_k": ("ours last_k", "ours", 0.6),
}
"""Name to two runs, whose times are divided, and the largest quotient that was asked for."""


def asked(base: Case, rounds: int) -> dict[str, Any]:
    """Every asked number and the runs behind it. Rounds take all cases in turns; the least time of each counts."""
    cases = cases_of(base)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(in_own_process(case))
    runs = {name: best(results) for name, results in found.items()}
    step = bench_bonus.measured(rounds, base.threads)["ratio"]
    times = {
        name: {"seconds": runs[one]["seconds"] / runs[other]["seconds"], "cpu": runs[one]["cpu"] / runs[other]["cpu"]}
        for name, (one, other, _) in RATIOS.items()
    }
    times["step with the default bonus"] = {"seconds": step["step"], "cpu": step["step_cpu"]}
    return {
        "runs": runs,
        "ratio": times,
        "peak_ratio": runs["ours"]["peak_gb"] / runs["original"]["peak_gb"],
        "large_vocabulary_peak_gb": in_own_process(LARGE_VOCABULARY)["peak_gb"],
    }


def best(results: list[dict[str, float]]) -> dict[str, float]:
    """Least time, most memory and largest share of the matrix rate."""
    least = {key: min(result[key] for result in results) for key in ("seconds", "cpu")}
    return least | {key: max(result[key] for result in results) for key in ("peak_gb", "rate", "share", "cpu_share")}


def show(found: dict[str, Any]) -> None:
    for name, ratio in found["ratio"].items():
        limit = RATIOS[name][2] if name in RATIOS else 1.25
        print(f"{name:28} {ratio['seconds']:.3f} (CPU {ratio['cpu']:.3f}); asked: at most {limit}")
    print(f"peak memory over the original's: {found['peak_ratio']:.3f}; asked: at most 0.125")
    print(f"V 151,936: peak {found['large_vocabulary_peak_gb']:.2f} GB above the model; asked: at most 1.5")
    for name in ("ours", "ours end"):
        print(f"{name}: share of the matrix rate {found['runs'][name]['share']:.2f}; asked: at least 0.6")


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


# ---- shortcuts -----------------------------------------------------------------------------------------------------


@contextmanager
def without_shortcut(name: str) -> Iterator[None]:
    """Inside the block members read without one of the ways to do less in the first or the last layer."""

    @contextmanager
    def whole_mlp(mlp: nn.Module, column: Tensor) -> Iterator[None]:
        yield

    changes: dict[str, tuple[object, str, object]] = {
        "first attention once for all members": (reading.Reading, "shared_attention", lambda self, count: None),
        "last MLP at one column": (reading, "mlp_at_one_column", whole_mlp),
    }
    owner, attribute, replacement = changes[name]
    kept = getattr(owner, attribute)
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        setattr(owner, attribute, kept)


def shortcuts(base: Case, rounds: int) -> str:
    """CPU time of the ensemble without each shortcut over that with both, in turns in one process; medians."""
    cases = {
        "per_token, full": base,
        "per_token, last_k 3": replace(base, last_k=3),
        "end_of_sequence, full": replace(base, mode="end_of_sequence"),
        "end_of_sequence, last_k 3": replace(base, mode="end_of_sequence", last_k=3),
    }
    names = ("first attention once for all members", "last MLP at one column")
    torch.set_num_threads(base.threads)
    rows = []
    for label, case in cases.items():
        model, batch = build(case)
        ours(model, batch, case)  # first call: thread pools, kernels
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                with_both = seconds_of(lambda: ours(model, batch, case), case.device)[1]  # noqa: B023
                with without_shortcut(name):
                    found[name].append(seconds_of(lambda: ours(model, batch, case), case.device)[1] / with_both)  # noqa: B023
        medians = [sorted(found[name])[rounds // 2] for name in names]
        rows.append(f"| {label} | " + " | ".join(f"{value:.3f}" for value in medians) + " |")
        print(rows[-1], flush=True)
    return f"| case | {' | '.join(f'without: {name}' for name in names)} |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--one", help="a case as JSON: run it here and print its numbers as JSON")
    parser.add_argument("--asked", action="store_true", help="run the asked cases")
    parser.add_argument("--shortcuts", action="store_true", help="CPU time without each shortcut over that with it")
    parser.add_argument("--curves", type=Path, help="run the cost curves and write the plot here")
    parser.add_argument("--rounds", type=int, default=2, help="times that every asked case runs")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    base = Case(threads=arguments.threads)
    if arguments.one:
        print(json.dumps(run_case(Case(**json.loads(arguments.one)))))
    if arguments.asked:
        found = asked(replace(base, repeats=1), arguments.rounds)
        show(found)
        write_results(arguments.json, found)
    if arguments.shortcuts:
        shape = {"width": 256, "inner": 1024, "heads": 4, "kv_heads": 4, "vocabulary": 8000, "completion": 64}
        print(shortcuts(replace(base, threads=1, **shape), arguments.rounds))
    if arguments.curves:
        curves(base, arguments.curves)


if __name__ == "__main__":
    main()
