"""The model that is trained and the prompts that it reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vdr_cli.config.paths import PathText
from vdr_cli.config.sections.base import Positive, Section


class LoraConfig(Section):
    """Low-rank adapters through PEFT (extra: lora)."""

    rank: Positive = 16
    """Rank of the low-rank update that an adapter adds to a weight."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's alpha: the update is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter, like PEFT's target_modules."""


class ModelConfig(Section):
    name: PathText = "starter"
    """An embedded bed (`starter`, `countdown4`, `routes`, `guess`), a local directory in Hugging Face format, or a hub
    id."""
    revision: str | None = None
    """Hub branch, tag or commit; None: the default branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on accelerators that support it, float32 on a CPU, where bfloat16 is slower."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, with all of your permissions."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights. None: train every parameter."""


class DataConfig(Section):
    name: PathText = "starter"
    """An embedded bed (`starter`, `countdown4`, `routes`, `guess`), a hub id, a JSONL/CSV/Parquet file, a directory
    that `datasets` can load, or tasks of reasoning-gym, `reasoning_gym:TASK[=WEIGHT],...` (extra: gym)."""
    options: dict[str, Any] = {}
    """For `reasoning_gym`: `size` (training problems, default 1000), `eval_size` (held-out problems, default 200),
    `seed` (default 0) and the generator's own settings; with several tasks, each task's settings go under its name."""
    split: str = "train"
    """Split of the training prompts."""
    subset: str | None = None
    """Configuration (subset) of a hub data set, such as `main` of openai/gsm8k. None: its default."""
    eval_name: PathText | None = None
    """Source of the held-out prompts. None: the same as `name`."""
    eval_split: str = "test"
    """Split of the held-out prompts."""
    prompt_column: str = "prompt"
    """Column that holds the prompts: strings or chat messages."""
    as_chat: bool = False
    """Turn each string prompt into one user message, formatted with the model's chat template."""
    system_prompt: str | None = None
    """System message to put at the start of every prompt (chat prompts only)."""
    max_prompt_tokens: Positive | None = None
    """Longer prompts are cut to their last tokens, and a warning says how many were cut. None: no limit."""
    shuffle: bool = True
    """Shuffle the prompts in each epoch, in an order derived from train.seed."""
