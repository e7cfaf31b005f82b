"""Models that cannot be used are refused in one line, whatever is wrong with their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vdr_cli.beds.registry import BEDS
from vdr_cli.config import ModelConfig
from vdr_cli.errors import ConfigError
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_for_training, load_model_config, load_tokenizer

WEIGHTS = "model.safetensors"


def without_a_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_setting(name: str, value: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return edit


@pytest.mark.parametrize(
    ("file", "spoil", "load", "expected"),
    [
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:9000]), load_causal_lm, "incomplete metadata"),
        (WEIGHTS, lambda path: path.write_bytes(b""), load_causal_lm, "header too small"),
        (WEIGHTS, lambda path: path.unlink(), load_causal_lm, "no file named model.safetensors"),
        (WEIGHTS, without_a_weight, load_causal_lm, "its files lack 1 weight (model.layers.1.mlp.up_proj"),
        ("config.json", with_setting("vocab_size", 99), load_causal_lm, "cannot be loaded"),
        ("config.json", with_setting("model_type", "t5"), load_causal_lm, "t5 is an encoder-decoder"),
        ("config.json", with_setting("model_type", "alien"), load_model_config, "model type `alien`"),
        ("config.json", with_setting("hidden_size", "big"), load_causal_lm, "cannot be loaded"),
        ("config.json", lambda path: path.write_text("{"), load_model_config, "not a valid JSON file"),
        ("config.json", lambda path: path.write_text("[]"), load_model_config, "cannot be loaded"),
        ("tokenizer.json", lambda path: path.write_text("{}"), load_tokenizer, "cannot be loaded"),
        ("tokenizer.json", lambda path: path.unlink(), load_tokenizer, "its files include no tokenizer"),
    ],
)
def test_spoilt_files(tmp_path: Path, file, spoil, load, expected) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BEDS["starter"].model_path, folder)
    spoil(folder / file)
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert message.startswith(f"model {folder}: ") and expected in message and "\n" not in message


def test_what_is_no_decoder_or_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = transformers.BartConfig(**small, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    with pytest.raises(ConfigError, match=r"bart is an encoder-decoder; give a decoder-only"):
        load_causal_lm(str(tmp_path / "bart"))
    shutil.copytree(BEDS["starter"].model_path, tmp_path / "fp8")
    with_setting("quantization_config", {"quant_method": "fp8"})(tmp_path / "fp8" / "config.json")
    with pytest.raises(ConfigError, match=r"its weights are quantized .* cannot be trained"):
        load_for_training(ModelConfig(name=str(tmp_path / "fp8")), torch.float32)


def test_names_that_no_path_can_have() -> None:
    for name, expected in [("~nosuchuser/x", "no such user"), ("x" * 300, "longer than a file name"), ("", "is empty")]:
        with pytest.raises(ConfigError, match=expected):
            load_tokenizer(name)


def test_loading_leaves_the_loudness_of_transformers_alone() -> None:
    before = transformers.utils.logging.get_verbosity()
    load_causal_lm("starter")
    assert transformers.utils.logging.get_verbosity() == before


def test_a_completion_ends_at_every_end_token_of_generation_config_and_tokenizer() -> None:
    model, tokenizer = load_causal_lm("starter"), load_tokenizer("starter")
    assert eos_token_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [7, 5]
    assert eos_token_ids(model, tokenizer) == [1, 5, 7]
    model.generation_config.eos_token_id = 6
    assert eos_token_ids(model, tokenizer) == [1, 6]


def test_an_eos_token_outside_the_models_vocabulary_ends_nothing() -> None:
    model, tokenizer = load_causal_lm("starter"), load_tokenizer("starter")
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    assert tokenizer.eos_token_id >= model.config.vocab_size
    model.generation_config.eos_token_id = 6
    assert eos_token_ids(model, tokenizer) == [6]
    model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match=r"EOS token \d+ is outside its vocabulary of \d+, so that no completion"):
        eos_token_ids(model, tokenizer)


class InPython(transformers.PreTrainedTokenizer):
    """Characters, as a tokenizer in Python has them that looks ids up in a list."""

    TOKENS = ("<pad>", "<eos>", *"0123456789+-*()= ")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"pad_token": "<pad>", "eos_token": "<eos>", **settings})

    @property
    def vocab_size(self) -> int:
        return len(self.TOKENS)

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.TOKENS)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.TOKENS.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.TOKENS[index]

    def save_vocabulary(self, *_: Any, **__: Any) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize(("entries", "refused"), [(19, False), (20, True), (64, True)])
def test_a_tokenizer_in_python_must_decode_whatever_the_model_samples(
    entries: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(BEDS["starter"].model_path, tmp_path / "model")
    with_setting("vocab_size", entries)(tmp_path / "model" / "config.json")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: InPython())
    assert len(InPython()) == 19
    if not refused:
        assert load_tokenizer(str(tmp_path / "model")).decode([18]) == " "
        return
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path / "model"))
    message = str(caught.value)
    assert f"model {tmp_path}/model: its tokenizer (InPython, 19 tokens) cannot decode token 19" in message
    assert f"until it has {entries}" in message and "\n" not in message


def test_a_pad_token_outside_the_models_vocabulary_is_not_used(tmp_path: Path) -> None:
    """As the fine-tunes of Llama 2 have it, which added one and did not resize the embeddings."""
    folder = tmp_path / "model"
    shutil.copytree(BEDS["starter"].model_path, folder)
    tokenizer = load_tokenizer(str(folder))
    vocabulary = load_model_config(str(folder)).vocab_size
    tokenizer.add_tokens([f"<{n}>" for n in range(vocabulary - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == vocabulary
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token_id == tokenizer.eos_token_id
