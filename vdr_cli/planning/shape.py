"""A decoder's sizes, from its config.json or by name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vdr_cli.errors import ConfigError
from vdr_cli.models.sizes import EXPERT_COUNTS


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json describes it."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    attention_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Keys and values of one token in one layer, numbers."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden * (2 * self.query_width + self.kv_width)
        mlp = 3 * self.hidden * self.intermediate * self.experts
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + mlp + router

    @property
    def layer_parameters(self) -> int:
        bias = self.query_width + self.kv_width if self.attention_bias else 0
        return self.layer_matrices + bias + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        ends = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends + self.hidden


SIZES = {
    "0.5B": Shape(896, 24, 4864, 14, 2, 64, 151_936, tied=True, attention_bias=True),
    "7B": Shape(3584, 28, 18_944, 28, 4, 128, 152_064, attention_bias=True),
    "32B": Shape(5120, 64, 27_648, 40, 8, 128, 152_064, attention_bias=True),
    "70B": Shape(8192, 80, 28_672, 64, 8, 128, 128_256),
}
"""Qwen2.5 0.5B, 7B, 32B and Llama 3 70B."""


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a Hugging Face config.json. ConfigError when it describes no decoder that we know."""
    inner: Mapping[str, Any] = config.get("text_config") or config
    names = {"hidden": ("hidden_size", "n_embd", "d_model"), "layers": ("num_hidden_layers", "n_layer")}
    names |= {"heads": ("num_attention_heads", "n_head"), "vocabulary": ("vocab_size",)}
    found = {ours: next((inner[key] for key in keys if inner.get(key)), None) for ours, keys in names.items()}
    missing = [names[ours][0] for ours, value in found.items() if value is None]
    if missing:
        raise ConfigError(f"the model's config.json has no {missing[0]}; give a causal language model or a size")
    hidden, heads = int(found["hidden"]), int(found["heads"])  # type: ignore[arg-type]
    bias = inner.get("attention_bias", inner.get("model_type") == "qwen2")
    return Shape(
        hidden=hidden,
        layers=int(found["layers"]),  # type: ignore[arg-type]
        intermediate=int(inner.get("moe_intermediate_size") or inner.get("intermediate_size") or 4 * hidden),
        heads=heads,
        kv_heads=int(inner.get("num_key_value_heads") or heads),
        head_dim=int(inner.get("head_dim") or hidden // heads),
        vocabulary=int(found["vocabulary"]),  # type: ignore[arg-type]
        # transformers 4 left the key out of the files of tied models (GPT-2, Gemma) and wrote it for all others
        tied=bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))),
        experts=int(next((inner[key] for key in EXPERT_COUNTS if inner.get(key)), 1)),
        attention_bias=bool(bias),
    )
