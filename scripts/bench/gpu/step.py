"""Whole training steps at the shape of Qwen2.5-0.5B in bfloat16: 64 completions of 512 tokens after 512, groups of 8.

--side vdr with --mode none or end_of_sequence, or --side trl: GRPOTrainer on the same model, prompts, lengths, group
size, micro-batches, loss (dapo), reward and learning rate; no gradient checkpointing, no KL. vdr keeps float32 master
weights (DeepSpeed's bfloat16 engine); TRL trains the bfloat16 weights themselves.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import device_of, dtype_of, model_directory, parser_of, peak_gigabytes, write_result


@dataclass(frozen=True)
class Case:
    shape: str
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    micro_batch: int
    steps: int
    """After the one that warms up."""

    @property
    def completion_tokens(self) -> int:
        return self.prompts * self.group * self.new_tokens


FULL = Case("0.5B", 8, 8, 512, 512, 16, 2)
TOY = Case("toy", 2, 4, 16, 8, 4, 1)


def digits(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """Reward of the bench: says nothing, but differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def write_prompts(case: Case, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    count = case.prompts * (case.steps + 2)
    letters = torch.randint(ord("a"), ord("z") + 1, (count, case.prompt_tokens), generator=generator)
    rows = [{"prompt": "".join(map(chr, row))} for row in letters.tolist()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_vdr(
    case: Case, model: Path, prompts: Path, output: Path, mode: str, dtype: str, ds_config: str = "zero3"
) -> list[dict[str, float]]:
    """The metrics of each step, without the first."""
    from vdr_cli.config import Config
    from vdr_cli.train import train

    config = Config.model_validate(
        {
            "model": {"name": str(model), "dtype": dtype},
            "data": {"name": str(prompts)},
            "rollout": {"group_size": case.group, "max_new_tokens": case.new_tokens},
            "rewards": {"functions": [{"name": f"{Path(__file__).resolve()}:digits"}]},
            "disagreement": {"mode": mode},
            "train": {
                "steps": case.steps + 1,
                "prompts_per_step": case.prompts,
                "micro_batch_size": case.micro_batch,
                "output": str(output),
                "checkpoint_every": 0,
                "save_model": False,
            },
            "engine": {"ds_config": ds_config},
            "observe": {"tensorboard": False, "report": False, "completions_every": 0, "live": "off"},
        }
    )
    if code := train(config):
        raise SystemExit(f"vdr train ended with {code}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]


def run_trl(case: Case, model: Path, prompts: Path, output: Path, device: torch.device) -> list[dict[str, float]]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    sampled: list[float] = []
    steps: list[dict[str, float]] = []

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = clock(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = clock(device) - self.began
            steps.append({"step_time": seconds, "time/rollout": sampled[-1], "time/update": seconds - sampled[-1]})

    on_gpu = device.type == "cuda"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    arguments = GRPOConfig(
        output_dir=str(output),
        use_cpu=not on_gpu,
        bf16=on_gpu,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.prompts * case.group // case.micro_batch,
        num_generations=case.group,
        max_completion_length=case.new_tokens,
        max_steps=case.steps + 1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        gradient_checkpointing=False,
        disable_dropout=True,
        beta=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype_of(not on_gpu)),
        reward_funcs=digits,
        args=arguments,
        # A given fingerprint: hashing the table pickles it, which fails where dill cannot find pyarrow's types.
        train_dataset=datasets.Dataset(datasets.table.InMemoryTable.from_pylist(rows), fingerprint="prompts"),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Steps()],
    )
    generate = trainer._generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = clock(device)
        result = generate(*args, **kwargs)
        sampled.append(clock(device) - began)
        return result

    trainer._generate = timed
    trainer.train()
    return steps[1:]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(case: Case, steps: list[dict[str, float]], peak: float) -> dict[str, Any]:
    """Medians over steps, and completion tokens per second of the step and of each phase."""
    names = [name for name in steps[0] if name == "step_time" or name.startswith(("time/", "mfu/"))]
    medians = {name: statistics.median(step[name] for step in steps) for name in names}
    rates = {
        name: case.completion_tokens / seconds
        for name, seconds in medians.items()
        if not name.startswith("mfu/") and seconds > 0
    }
    phases = {name.removeprefix("time/"): value for name, value in medians.items() if name.startswith("time/")}
    spent = ", ".join(f"{name} {value:.2f}" for name, value in phases.items() if value >= 0.005)
    used = ", ".join(f"{name} {value:.3f}" for name, value in medians.items() if name.startswith("mfu/"))
    return {
        "medians": medians,
        "tokens_per_second": rates,
        "peak_gb": peak,
        "steps": steps,
        "headlines": [
            f"step {medians['step_time']:.2f} s ({spent}); {rates['step_time']:.0f} tokens/s; peak {peak:.1f} GB",
            *([used] if used else []),
        ],
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--side", choices=["vdr", "trl"], required=True)
    parser.add_argument("--mode", choices=["none", "end_of_sequence", "per_token"], default="none")
    parser.add_argument("--ds-config", default="zero3", help="vdr's engine.ds_config")
    parser.add_argument("--micro-batch", type=int, help="completions in one forward and backward")
    args = parser.parse_args()
    device, case = device_of(args.toy), TOY if args.toy else FULL
    if args.micro_batch:
        case = replace(case, micro_batch=min(args.micro_batch, case.prompts * case.group))
    dtype = "float32" if args.toy else "bfloat16"
    model = model_directory(case.shape, args.work, device, dtype_of(args.toy))
    prompts, output = args.work / "prompts.jsonl", args.work / args.json.stem
    write_prompts(case, prompts)
    if args.side == "vdr":
        steps = run_vdr(case, model, prompts, output, args.mode, dtype, args.ds_config)
    else:
        steps = run_trl(case, model, prompts, output, device)
    result = {"case": vars(case), "side": args.side, "mode": args.mode, "ds_config": args.ds_config}
    write_result(args.json, result | summary(case, steps, peak_gigabytes(device)))


if __name__ == "__main__":
    main()
