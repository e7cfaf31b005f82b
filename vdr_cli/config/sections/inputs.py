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
    """The update is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter, as PEFT's target_modules."""


class ModelConfig(Section):
    name: PathText = "starter"
    """An embedded bed (`starter`, `countdown4`, `routes`, `guess`), a local directory in Hugging Face format, or a hub
    id."""
    revision: str | None = None
    """Hub branch, tag or commit; None: the default branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on an accelerator that has it, float32 on CPU (bf16 is slower there)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. It has all your permissions."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """None: train every parameter."""


class DataConfig(Section):
    name: PathText = "starter"
    """An embedded bed (`starter`, `countdown4`, `routes`, `guess`), a hub id, a JSONL/CSV/Parquet file, a directory
    that `datasets` can load, or tasks of reasoning-gym, `reasoning_gym:TASK[=WEIGHT],...` (extra: gym)."""
    options: dict[str, Any] = {}
    """For `reasoning_gym`: `size` (1000 training problems), `eval_size` (200 held-out ones), `seed` (0), the
    generator's settings, with several tasks each under its task's name."""
    split: str = "train"
    """Split of the training prompts."""
    subset: str | None = None
    """The hub data set's configuration (`main` of openai/gsm8k); None: its default."""
    eval_name: PathText | None = None
    """The source of held-out prompts; None: the same as `name`."""
    eval_split: str = "test"
    """Split of the held-out prompts."""
    prompt_column: str = "prompt"
    """Column of the prompts: strings or chat messages."""
    as_chat: bool = False
    """Prompts that are strings become one user message, in the format of the model's chat template."""
    system_prompt: str | None = None
    """System message at the start of every prompt (chat prompts only)."""
    max_prompt_tokens: Positive | None = None
    """Longer prompts keep their last tokens, with a warning that counts them; None: no limit."""
    shuffle: bool = True
    """Shuffle the prompts in each epoch, from train.seed."""
