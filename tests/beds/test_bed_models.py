"""The embedded models: what the package promises of each, measured exactly."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vdr_cli.beds.registry import BEDS, SPLITS
from vdr_cli.config import Config

STARTS = {"starter": {1: (0.15, 0.40), 8: (0.75, 0.90)}, "countdown4": {1: (0.01, 0.03), 256: (0.40, 0.60)}}
"""The starting model's pass@k on held-out problems, at least and at most."""


@cache
def loaded(name):
    path = BEDS[name].model_path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def answer_rates(name, row):
    """(answers,) probability that one sample at temperature 1 is that answer."""
    model, tokenizer = loaded(name)
    prompt = tokenizer(row["prompt"]).input_ids
    answers = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for answer in BEDS[name].answers(row)]
    width = max(map(len, answers))
    padded = [answer + [tokenizer.pad_token_id] * (width - len(answer)) for answer in answers]
    ids = torch.tensor([prompt + answer for answer in padded])
    with torch.no_grad():
        logps = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)  # (answers, T, V)
    picked = logps.gather(-1, ids[:, len(prompt) :].unsqueeze(-1)).squeeze(-1)
    lengths = torch.tensor([len(answer) for answer in answers])
    return (picked * (torch.arange(width) < lengths[:, None])).sum(1).exp()


@pytest.mark.parametrize("name", BEDS)
def test_size(name):
    model, _ = loaded(name)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert sum(file.stat().st_size for file in BEDS[name].model_path.iterdir()) <= 4 * 2**20
    assert model.config.model_type == "qwen2"


@pytest.mark.parametrize("name", [name for name in STARTS if name in BEDS])
def test_held_out_problems_are_solved_as_often_as_promised(name):
    rates = torch.stack([answer_rates(name, row).sum() for row in BEDS[name].rows("test")]).double()
    for k, (least, most) in STARTS[name].items():
        assert least <= (1 - (1 - rates) ** k).mean() <= most


@pytest.mark.parametrize("name", BEDS)
def test_tokenizer_is_one_token_a_character(name):
    model, tokenizer = loaded(name)
    row = BEDS[name].rows("test")[0]
    for text in (row["prompt"], BEDS[name].answers(row)[0]):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    every = "".join(dict.fromkeys("".join(row["prompt"] for row in BEDS[name].rows("train"))))
    assert tokenizer.decode(tokenizer(every).input_ids) == every


@pytest.mark.parametrize("name", BEDS)
def test_every_prompt_and_answer_fits(name):
    model, tokenizer = loaded(name)
    rows = [row for split in SPLITS for row in BEDS[name].rows(split)]
    answer = max(len(tokenizer(text).input_ids) for row in rows[:400] for text in BEDS[name].answers(row))
    room = BEDS[name].recipe()["rollout"]["max_new_tokens"]
    assert answer + 1 <= room
    longest = max(len(tokenizer(row["prompt"]).input_ids) for row in rows)
    assert longest + room <= model.config.max_position_embeddings


@pytest.mark.parametrize("name", BEDS)
def test_recipe_is_a_valid_configuration(name):
    config = Config.model_validate({"model": {"name": name}})
    assert config.train.output is None
    assert config.model.name == config.data.name == name
    assert config.train.steps == BEDS[name].recipe()["train"]["steps"]


def test_registry_does_not_load_torch():
    code = "import sys; from vdr_cli.beds.registry import BEDS; [(b.recipe(), b.rows('test')) for b in BEDS.values()]"
    assert (
        subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False).returncode == 0
    )
