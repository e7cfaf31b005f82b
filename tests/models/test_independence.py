"""Models whose forward depends on the longest row of a call are refused at the start."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.test_anatomy import ARCHITECTURES, tiny
from vdr_cli.errors import ConfigError
from vdr_cli.models import independence
from vdr_cli.models.independence import check_independence
from vdr_cli.models.sizes import UsableLength


def longrope(original: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0 + 3.0 * i for i in range(4)],
        "original_max_position_embeddings": original,
    }
    shape = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = LlamaConfig(**shape, **heads, max_position_embeddings=64, rope_parameters=rope, initializer_range=0.5)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_of_ordinary_models_stand_alone(kind: str) -> None:
    check_independence(tiny(kind))


def test_a_switching_point_that_is_known_is_not_passed() -> None:
    check_independence(longrope(12))


def test_one_that_is_not_known_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(independence, "usable_length", lambda config: UsableLength(64))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM gives a row other numbers .* one of 64 tokens"):
        check_independence(longrope(12))


def test_a_model_that_reads_padding_is_found() -> None:
    with pytest.raises(ConfigError, match="RwkvForCausalLM gives a row other numbers"):
        check_independence(tiny("rwkv"))


def test_a_model_that_sees_later_tokens_is_found() -> None:
    with pytest.raises(ConfigError, match=r"BertLMHeadModel lets a token see later ones .* give a causal"):
        check_independence(tiny("bert"))


def test_a_model_that_trips_over_padded_rows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object) -> object:
        if len(input_ids) > 1:
            raise ValueError("matC_old has wrong shape\nand more")
        return (torch.zeros(1, input_ids.shape[1], model.config.hidden_size),)

    monkeypatch.setattr(model.model, "forward", forward)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot read a row of 4 tokens beside one of \d+ \(matC"):
        check_independence(model)
