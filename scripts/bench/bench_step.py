"""Whole training steps of vdr and of TRL's GRPOTrainer, in turn, each repetition in a process of its own.

    python scripts/bench/bench_step.py [--case starter|qwen2|qwen2-long] [--bonus] [--repeats 3] [--json PATH]

Same model, prompts, lengths, group size, optimizer (AdamW), number of threads, loss (dapo) and reward; no
gradient checkpointing, no KL. --bonus: vdr with its default bonus, TRL without. Printed: medians over
repetitions of the median step (the first step of a process warms up), their ratios by phase, and peak memory.
TRL comes with the `test` extra.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import in_own_process, medians, parser_of, write_results


@dataclass(frozen=True)
class Case:
    title: str
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    asked: float
    """Largest ratio of step times that counts as met."""
    micro_batch: int
    steps: int
    """Measured in each repetition: of short steps many, or the machine's moods decide."""


CASES = {
    "starter": Case("starter model, 256 completions x up to 7 tokens, G 16", 16, 16, 0, 7, 0.6, 256, 30),
    "qwen2": Case("66.6M Qwen2, 16 x (128 + 64), G 8", 2, 8, 128, 64, 0.6, 16, 4),
    "qwen2-long": Case("66.6M Qwen2, 16 x (512 + 64), G 8", 2, 8, 512, 64, 0.45, 16, 4),
}

VOCABULARY = 32_000

REWARD = """
def digits(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


PARTS = ("rollout", "collect", "update")
SHOWN = ("step", "step_cpu", "rollout", "update", "peak_gb")


def now() -> tuple[float, float]:
    """Wall time and the processor time of this process; on a shared machine the second is the steadier."""
    return time.perf_counter(), time.process_time()


class Clock:
    """Seconds of each call of some functions."""

    def __init__(self) -> None:
        self.spent: dict[tuple[str, str], list[float]] = defaultdict(list)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before = now()
            result = call(*args, **kwargs)
            for kind, begin, end in zip(("wall", "cpu"), before, now(), strict=True):
                self.spent[name, kind].append(end - begin)
            return result

        return wrapper


def make_inputs(case: str, folder: Path) -> tuple[str, list[str]]:
    """Model path and prompt strings."""
    if case == "starter":
        from vdr_cli.beds.registry import BEDS
        from vdr_cli.config import DataConfig
        from vdr_cli.data.prompts import load_prompts
        from vdr_cli.models.loading import load_tokenizer

        found = load_prompts(DataConfig(), "train", load_tokenizer("starter"))
        return str(BEDS["starter"].model_path), [str(found[index].value) for index in range(512)]
    import string

    import numpy as np
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # a token a letter; the rest of the vocabulary only the model reaches
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", *letters, *(f"w{i}" for i in range(VOCABULARY - 2 - len(letters)))]
    letter_by_letter = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    letter_by_letter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letter_by_letter.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_by_letter, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chosen = np.random.default_rng(0).choice(list(string.ascii_letters), (64, CASES[case].prompt_tokens))
    return str(folder / "model"), ["".join(row) for row in chosen]


def run_vdr(case: Case, folder: Path, model: str, steps: int, bonus: bool, ds_config: str) -> list[dict[str, float]]:
    from vdr_cli import train as loop
    from vdr_cli.config import Config
    from vdr_cli.rollout.transformers_backend import TransformersRollout

    clock = Clock()
    loop.collect = clock.timed("collect", loop.collect)
    loop.update = clock.timed("update", loop.update)
    TransformersRollout.start = clock.timed("rollout", TransformersRollout.start)  # type: ignore[method-assign]
    output = Path(tempfile.mkdtemp(dir=folder))
    config = Config.model_validate(
        {
            "model": {"name": model},
            "data": {"name": str(folder / "prompts.jsonl")},
            "rollout": {"group_size": case.group, "max_new_tokens": case.new_tokens},
            "rewards": {"functions": [{"name": f"{folder / 'reward.py'}:digits"}]},
            "disagreement": {} if bonus else {"mode": "none"},
            "train": {
                "steps": steps,
                "prompts_per_step": case.prompts,
                "micro_batch_size": case.micro_batch,
                "output": str(output / "run"),
                "checkpoint_every": 0,
                "save_model": False,
            },
            "engine": {"ds_config": ds_config},
            "observe": {"tensorboard": False, "report": False, "completions_every": 0, "live": "off"},
        }
    )
    loop.train(config)
    kinds = ("wall", "cpu")
    rollout, collect, update = ({kind: clock.spent[name, kind] for kind in kinds} for name in PARTS)
    return [
        {"rollout": rollout["wall"][step], "update": update["wall"][step]}
        | {"step" if kind == "wall" else "step_cpu": collect[kind][step] + update[kind][step] for kind in kinds}
        for step in range(steps)
    ]


def run_trl(case: Case, folder: Path, model: str, steps: int) -> list[dict[str, float]]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    sys.path.insert(0, str(folder))
    from reward import digits  # type: ignore[import-not-found]

    clock, times = Clock(), []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = (after - before for before, after in zip(self.begin, now(), strict=True))
            rollout = clock.spent["rollout", "wall"][-1]
            times.append({"rollout": rollout, "update": wall - rollout, "step": wall, "step_cpu": cpu})

    lines = (folder / "prompts.jsonl").read_text().splitlines()
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=case.prompts * case.group,
        num_generations=case.group,
        max_completion_length=case.new_tokens,
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        gradient_checkpointing=False,
        disable_dropout=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        reward_funcs=digits,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Steps()],
    )
    trainer._generate = clock.timed("rollout", trainer._generate)  # type: ignore[method-assign]
    trainer.train()
    return times


def work(args: argparse.Namespace) -> None:
    """One side, one repetition: the median step by phase and the process's peak memory, as JSON on the last line."""
    import torch

    torch.set_num_threads(args.threads)
    case, folder = CASES[args.case], Path(args.folder)
    if args.side == "vdr":
        steps = run_vdr(case, folder, args.model, args.steps + 1, args.bonus, args.ds_config)
    else:
        steps = run_trl(case, folder, args.model, args.steps + 1)
    result = medians(steps[1:])
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(result))


def repetition(side: str, args: argparse.Namespace, folder: Path, model: str) -> dict[str, float]:
    asked = ["--side", side, "--folder", str(folder), "--model", model, "--case", args.case]
    asked += ["--steps", str(args.steps), "--threads", str(args.threads), "--ds-config", args.ds_config]
    return in_own_process(__file__, *asked, *(["--bonus"] if args.bonus else []))


def compared(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each side, vdr over TRL by repetition, and the median of that."""
    pairs = list(zip(runs["vdr"], runs["trl"], strict=True))
    ratios = {phase: [own[phase] / other[phase] for own, other in pairs] for phase in SHOWN}
    ratio = {phase: statistics.median(found) for phase, found in ratios.items()}
    return {"vdr": medians(runs["vdr"]), "trl": medians(runs["trl"]), "ratio": ratio, "ratios": ratios}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--case", choices=list(CASES), default="qwen2")
    parser.add_argument("--bonus", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="measured in each repetition (default: the case's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ds-config", default="zero3")
    parser.add_argument("--side", choices=["vdr", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args)
        return
    case = CASES[args.case]
    args.steps = args.steps or case.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = make_inputs(args.case, folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        (folder / "reward.py").write_text(REWARD)
        runs: dict[str, list[dict[str, float]]] = {"vdr": [], "trl": []}
        for _ in range(args.repeats):
            for side, found in runs.items():
                found.append(repetition(side, args, folder, model))
                print(side, {name: round(value, 3) for name, value in found[-1].items()}, flush=True)
    print(f"{case.title}; {args.threads} threads, {args.ds_config}, {'default bonus' if args.bonus else 'no bonus'}")
    print(f"{'':10}{'vdr':>10}{'TRL':>10}{'ratio':>10}")
    found = compared(runs)
    for phase in SHOWN:
        print(f"{phase:10}{found['vdr'][phase]:10.2f}{found['trl'][phase]:10.2f}{found['ratio'][phase]:10.2f}")
    print(f"asked: step ratio at most {1.0 if args.bonus else case.asked:.2f}")
    write_results(args.json, {"case": args.case, "bonus": args.bonus, "repetitions": args.repeats, **found})


if __name__ == "__main__":
    main()
