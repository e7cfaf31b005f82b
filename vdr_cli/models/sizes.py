"""Numbers that a transformers configuration holds, read in one place.

Configurations nest the language part, call the same thing by different names, leave keys out, set them to None, or give
a list with a value per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Names of the MLP's inner width."""

LENGTHS = ("max_position_embeddings", "max_seq_len")
"""Names of the longest sequence."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def language_part(config: Any) -> Any:
    """The decoder's configuration; multimodal models keep it one level down."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def largest(config: Any, *names: str) -> int | None:
    """The first of these keys that holds a number, or the largest of its list; None if there is none."""
    for name in names:
        value = getattr(config, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [int(n) for n in values if isinstance(n, (int, float)) and not isinstance(n, bool)]
        if numbers:
            return max(numbers)
    return None


def foreign_token(ids: Iterable[int], vocabulary: int | None, tokenizer: Any) -> str | None:
    """Names a token that the model has no entry for, and what to do about it; None where it has all.

    vocabulary: the model's entries; None: not known.
    """
    highest = max(ids, default=-1)
    if vocabulary is None or highest < vocabulary:
        return None
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return (
        f"token {highest} of tokenizer {name} is outside the model's vocabulary of {vocabulary}: use the model's own "
        "tokenizer, or resize the model's embeddings (resize_token_embeddings) and save it"
    )


@dataclass(frozen=True)
class UsableLength:
    """Tokens that a model can read, prompt and completion together."""

    tokens: int
    why: str = ""
    """The cause, where it is not the model's own maximum."""

    def __str__(self) -> str:
        return f"{self.tokens} tokens{f' ({self.why})' if self.why else ''}"


def usable_length(config: Any) -> UsableLength | None:
    """The longest sequence whose numbers depend on nothing but itself; None if the configuration does not say.

    Scaled rotary positions reach `factor` times the original length. Two kinds take their frequencies from the longest
    position of a call (dynamic NTK and LongRoPE): beyond their switching point a row's numbers depend on the rows
    beside it, and cached keys on the length at which they were made, so they are used up to that point only.
    """
    text = language_part(config)
    longest = largest(text, *LENGTHS)
    if longest is None or longest <= 0:
        return None
    scaled = longest
    for rope in _rope_settings(text):
        kind = rope.get("rope_type") or rope.get("type")
        original = rope.get("original_max_position_embeddings") or largest(text, "original_max_position_embeddings")
        if kind in ("dynamic", "longrope"):
            point = int(original or longest)
            return UsableLength(
                min(point, longest), f"rope type {kind} gives other numbers to a row beside a longer one beyond them"
            )
        factor = rope.get("factor")
        if isinstance(factor, (int, float)):
            scaled = max(scaled, int((original or longest) * factor))
    return UsableLength(scaled)


def _rope_settings(text: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings, which may be one dictionary per kind of layer."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return
    nested = [value for value in rope.values() if isinstance(value, dict)]
    yield from nested or [rope]
