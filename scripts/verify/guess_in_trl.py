"""The embedded game in TRL's GRPOTrainer: the same environment class, model and rows as `vdr train --model guess`.

    python scripts/verify/guess_in_trl.py --steps 80 --output runs/guess-trl
    vdr eval guess runs/guess-trl

Needs TRL (extra test). Prints the mean reward of each step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from vdr_cli.beds.guess import GUESSES, Guess
from vdr_cli.beds.registry import BEDS


def trainer_of(
    steps: int, output: Path, seed: int = 0, prompts: int | None = None, group_size: int | None = None
) -> Any:
    """A GRPOTrainer with the settings of the bed's recipe. None: the recipe's."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template

    bed, recipe = BEDS["guess"], BEDS["guess"].recipe()
    prompts, group_size = prompts or recipe["train"]["prompts_per_step"], group_size or recipe["rollout"]["group_size"]
    tokenizer = AutoTokenizer.from_pretrained(bed.model_path)
    tokenizer.response_template = qwen3_template  # TRL knows it for the templates of hub models; calls look alike
    settings = GRPOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=prompts * group_size,
        num_generations=group_size,
        learning_rate=recipe["train"]["learning_rate"],
        lr_scheduler_type=recipe["train"]["lr_schedule"],
        max_completion_length=recipe["rollout"]["episode_tokens"],
        max_tool_calling_iterations=GUESSES,
        loss_type="dapo",
        beta=0.0,
        seed=seed,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    return GRPOTrainer(
        model=str(bed.model_path),
        reward_funcs=[],
        args=settings,
        train_dataset=Dataset.from_list(bed.rows("train")),
        processing_class=tokenizer,
        environment_factory=Guess,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    trainer = trainer_of(arguments.steps, arguments.output, arguments.seed)
    trainer.train()
    trainer.save_model(str(arguments.output))
    for line in trainer.state.log_history:
        if "reward" in line:
            print(line["step"], line["reward"])


if __name__ == "__main__":
    main()
