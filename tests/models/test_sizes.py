"""Numbers of configurations: nested, renamed, missing, None, lists; and how long a sequence a model can read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import Gemma3Config, GPT2Config, LlamaConfig, MptConfig, Phi3Config, Qwen2Config

from vdr_cli.models.sizes import language_part, largest, usable_length


def test_the_first_name_that_holds_a_number_counts_and_of_a_list_the_largest() -> None:
    config = SimpleNamespace(absent_is=None, widths=[8, 32, 16], width=4, flag=True, empty=[])
    assert largest(config, "absent", "absent_is", "widths", "width") == 32
    assert largest(config, "empty", "width") == 4
    assert largest(config, "flag") is None
    assert largest(config, "absent") is None


def test_the_language_part_of_a_multimodal_configuration() -> None:
    config = Gemma3Config(text_config={"hidden_size": 24, "num_hidden_layers": 2})
    assert largest(language_part(config), "hidden_size") == 24


def rope(kind: str, **more: float) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **more}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (GPT2Config(n_positions=96), 96),
        (Qwen2Config(max_position_embeddings=64), 64),
        (MptConfig(max_seq_len=48), 48),  # beyond it there are no attention biases
        (LlamaConfig(max_position_embeddings=64, rope_parameters=rope("linear", factor=4.0)), 256),
        # Qwen2.5's YaRN stretches the length in the file; gpt-oss's is stretched already
        (
            Qwen2Config(
                max_position_embeddings=64,
                rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=64),
            ),
            256,
        ),
        (
            LlamaConfig(
                max_position_embeddings=256,
                rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=64),
            ),
            256,
        ),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=rope("dynamic", factor=4.0)), 64),
        (
            Phi3Config(
                max_position_embeddings=256,
                original_max_position_embeddings=48,
                rope_parameters=rope(
                    "longrope",
                    short_factor=[1.0] * 48,
                    long_factor=[2.0] * 48,
                    original_max_position_embeddings=48,
                ),
            ),
            48,
        ),
        (SimpleNamespace(max_position_embeddings=None), None),
        (SimpleNamespace(), None),
        (SimpleNamespace(max_position_embeddings=[32, 64]), 64),
        (SimpleNamespace(max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 2.0}), 64),
    ],
)
def test_usable_length(config: object, tokens: int | None) -> None:
    found = usable_length(config)
    assert (None if found is None else found.tokens) == tokens


def test_each_kind_of_layer_may_have_rotary_settings_of_its_own() -> None:
    scaled = {"full_attention": rope("linear", factor=8.0), "sliding_attention": rope("default")}
    assert str(usable_length(SimpleNamespace(max_position_embeddings=64, rope_parameters=scaled))) == "512 tokens"


def test_the_cause_of_a_shorter_length_is_named() -> None:
    config = SimpleNamespace(
        max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 16},
    )
    assert str(usable_length(config)).startswith("16 tokens (rope type longrope gives other numbers to a row")
