"""Build a bed's model: a small Qwen2 that knows the task's format and some of its answers.

    python scripts/build/bed.py starter --output vdr_cli/beds/shipped/starter/model

Pretraining never reads a held-out problem. It has two phases: first every completion is a right
answer, then the share of right ones falls to the bed's `right` (demonstrations.py). So the model learns to
solve and then to doubt, which leaves reinforcement learning something to find.

The seed and one thread make the result repeat on one machine; another CPU may round differently.
docs/beds.md has what the shipped models do at the start, and how long they took.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demonstrations import PRETRAINING, Draw, Pretraining
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from vdr_cli.beds.registry import BEDS, Bed
from vdr_cli.models.anatomy import decoder_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from harness import write_results

PAD, EOS = 0, 1
IGNORED = -100  # target of positions that give no loss
REPORTED_K = (1, 8, 256)
REPORTED_ROWS = 512


def vocabulary(characters: str) -> list[str]:
    return ["<pad>", "<eos>", *characters]


def build_tokenizer(characters: str) -> Qwen2Tokenizer:
    """One token a character: byte-level BPE without merges (Qwen2's kind: AutoTokenizer imposes the class)."""
    ids = {"Ġ" if token == " " else token: index for index, token in enumerate(vocabulary(characters))}
    return Qwen2Tokenizer(
        vocab=ids, merges=[], unk_token=None, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(plan: Pretraining) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(vocabulary(plan.characters)),
        hidden_size=plan.hidden,
        intermediate_size=2 * plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def encode(characters: str, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt, completion and EOS, and the targets: the completion's only."""
    tokens = vocabulary(characters)
    ids = [tokens.index(character) for character in prompt + completion] + [EOS]
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def pad_right(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and targets as (B, W); padding comes last, so causal attention needs no mask."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor([targets + [IGNORED] * (width - len(targets)) for _, targets in rows])
    return ids, targets


def token_logps(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (B, W-1), 0 where there is none, and where there is one."""
    logits = model(input_ids=ids[:, :-1]).logits.float()
    wanted = targets[:, 1:]
    valid = wanted != IGNORED
    picked = logits.log_softmax(-1).gather(-1, wanted.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return picked * valid, valid


@torch.no_grad()
def answer_rates(model: nn.Module, bed: Bed, characters: str, rows: Sequence[dict[str, Any]]) -> list[NDArray[Any]]:
    """Each row's (answers,) probabilities that one sample at temperature 1 is that right answer."""
    answers = [bed.answers(row) for row in rows]
    cases = [
        encode(characters, row["prompt"], text) for row, found in zip(rows, answers, strict=True) for text in found
    ]
    ids, targets = pad_right(cases)
    logps = torch.cat(
        [token_logps(model, i, t)[0].double().sum(1) for i, t in zip(ids.split(256), targets.split(256), strict=True)]
    )
    return [part.exp().numpy() for part in logps.split([len(found) for found in answers])]


def report(model: nn.Module, bed: Bed, characters: str) -> dict[str, float]:
    """Exact pass@k of both splits."""
    found: dict[str, float] = {}
    for split in ("train", "test"):
        rates = answer_rates(model, bed, characters, bed.rows(split)[:REPORTED_ROWS])
        solved = np.array([chances.sum() for chances in rates])
        found |= {f"{split} pass@{k}": round(float((1 - (1 - solved) ** k).mean()), 4) for k in REPORTED_K}
    return found


def fit(
    model: nn.Module,
    rows_at: Callable[[int], list[tuple[list[int], list[int]]]],
    steps: int,
    peak: float,
    warmup: int = 100,
    measured: Callable[[], dict[str, float]] = dict,
) -> None:
    """AdamW on the rows (ids, targets) of each step; every 100 steps and at the end a line with what is measured.

    The learning rate rises over the warmup and falls linearly to 2 %.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1)
    start = time.monotonic()
    for step in range(steps):
        ids, targets = pad_right(rows_at(step))
        logps, valid = token_logps(model, ids, targets)
        loss = -logps.sum() / valid.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / warmup, 1.0) * (1 - 0.98 * step / steps)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            figures = {"step": step + 1, "seconds": round(time.monotonic() - start), "loss": round(loss.item(), 4)}
            print(json.dumps(figures | measured()), flush=True)


def drop(model: nn.Module, share: float) -> None:
    """Mask the outputs of attention and MLP as dropout members do, a mask per row, wherever gradients are computed."""

    def masked(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        mask = nn.functional.dropout(hidden.new_ones(len(hidden), 1, hidden.shape[-1]), share)
        return (hidden * mask, *output[1:]) if isinstance(output, tuple) else hidden * mask

    for layer in decoder_layers(model):
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(masked)


def pretrain(
    model: nn.Module, bed: Bed, plan: Pretraining, draw: Draw, seed: int, steps: int, right: float, peak: float
) -> None:
    """One phase; the share of right answers falls linearly from 1 to `right` in the first 60 % of the steps."""
    rng = random.Random(seed)

    def rows_at(step: int) -> list[tuple[list[int], list[int]]]:
        share = 1 - (1 - right) * min(step / (0.6 * steps), 1.0)
        return [encode(plan.characters, *draw(rng, share)) for _ in range(plan.batch)]

    fit(model, rows_at, steps, peak, measured=lambda: report(model, bed, plan.characters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=PRETRAINING)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the seconds that it took here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0, help="train with the masks of dropout members")
    for name, default in vars(PRETRAINING["starter"]).items():
        if isinstance(default, (int, float)):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help="default: the bed's")
    arguments = parser.parse_args()
    bed, plan = BEDS[arguments.bed], PRETRAINING[arguments.bed]
    given = {name: value for name, value in vars(arguments).items() if hasattr(plan, name) and value is not None}
    plan = replace(plan, **given)

    start, start_cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = build_model(plan)
    if arguments.dropout:
        drop(model, arguments.dropout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    pretrain(model, bed, plan, plan.learn, arguments.seed, plan.learn_steps, 1.0, plan.learn_lr)
    if plan.doubt_steps:
        pretrain(model, bed, plan, plan.doubt, arguments.seed + 1, plan.doubt_steps, plan.right, plan.doubt_lr)
    model.save_pretrained(arguments.output)
    build_tokenizer(plan.characters).save_pretrained(arguments.output)
    seconds = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - start_cpu}
    write_results(arguments.json, seconds)


if __name__ == "__main__":
    main()
