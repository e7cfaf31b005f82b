"""Files with a head of their own under a configuration that says "tied": every loader reads that head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from vdr_cli.models.loading import load_causal_lm
from vdr_cli.models.tied_head import untied_if_files_are

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def saved(directory: Path, tied: bool, head: str | None = None, **save: object) -> Path:
    """head: "own" or "equal" adds a head to the files, whatever the configuration says."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied)).save_pretrained(directory, **save)
    if head is not None:
        file = directory / "model.safetensors"
        weights = load_file(file)
        table = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = table.clone() if head == "equal" else table + torch.randn_like(table)
        save_file(weights, file, {"format": "pt"})
    return directory


def sharded(directory: Path) -> Path:
    """The same head, in a shard of its own."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)).save_pretrained(directory, max_shard_size="3KB")
    config = AutoConfig.from_pretrained(directory)
    config.tie_word_embeddings = True
    config.save_pretrained(directory)
    assert (directory / "model.safetensors.index.json").is_file()
    return directory


def pickled(directory: Path) -> Path:
    saved(directory, True, "own")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: saved(path, True, "own"), True),
        (sharded, True),
        (pickled, True),
        (lambda path: saved(path, True, "equal"), False),
        (lambda path: saved(path, True), False),
        (lambda path: saved(path, False), False),
    ],
    ids=["own head", "own head, sharded", "own head, pickled", "equal head", "tied", "untied"],
)
def test_only_another_head_is_untied(make, expected: bool, tmp_path: Path) -> None:
    directory = make(tmp_path)
    config = AutoConfig.from_pretrained(directory)
    before = config.tie_word_embeddings
    assert untied_if_files_are(config, str(directory), None) is expected
    assert config.tie_word_embeddings == (before and not expected)


def test_the_loaded_configuration_says_what_was_loaded(tmp_path: Path) -> None:
    model = load_causal_lm(str(saved(tmp_path, True, "own")))
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)
    assert not model.config.tie_word_embeddings
