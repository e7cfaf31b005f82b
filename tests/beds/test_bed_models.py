"""The embedded models: what the package promises of each, measured exactly."""

import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vdr_cli
from vdr_cli.beds.registry import BEDS, SPLITS, with_answers
from vdr_cli.config import Config, DataConfig, RewardsConfig
from vdr_cli.data.sources import open_table
from vdr_cli.models.paths import resolve_model_path
from vdr_cli.rewards.builtin import BUILT_IN
from vdr_cli.rewards.loading import load_rewards

STARTS = {"starter": {1: (0.15, 0.40), 8: (0.75, 0.90)}, "countdown4": {1: (0.01, 0.03), 256: (0.40, 0.60)}}
"""The starting model's pass@k on held-out problems, at least and at most."""
ONE_TURN = [bed.name for bed in with_answers()]
RARE = {"starter": 0.0, "countdown4": 0.5, "routes": 0.2}
"""Least share of problems that have a solution class which the start takes less than once in 256 samples."""


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


@pytest.mark.parametrize("name", ONE_TURN)
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


@pytest.mark.parametrize("name", ONE_TURN)
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


@pytest.mark.parametrize("name", ONE_TURN)
def test_the_starting_model_almost_never_takes_some_solutions(name):
    """Solutions that a method that keeps exploring could find and a sharpened start could not."""
    bed = BEDS[name]
    classify = sys.modules[BUILT_IN[bed.reward].__module__].solution_class
    rare, groups = 0, bed.rows("test")[:64]
    for row in groups:
        chances: dict[str, float] = {}
        for answer, chance in zip(classify(list(bed.answers(row))), answer_rates(name, row).tolist(), strict=True):
            chances[answer] = chances.get(answer, 0.0) + chance
        rare += min(chances.values()) < 1 / 256
    assert rare / len(groups) >= RARE[name]


def test_every_file_of_the_beds_is_in_the_package():
    """The wheel takes vdr_cli/ whole, except what git ignores."""
    root = Path(vdr_cli.__file__).parent
    files = [file for bed in BEDS.values() for file in (bed.recipe_path, *sorted(bed.model_path.iterdir()))]
    assert len(files) == 6 * len(BEDS) + 1  # the game's chat template
    if (root.parent / ".git").exists():
        names = [str(file.relative_to(root.parent)) for file in files]
        listed = subprocess.run(
            ["git", "ls-files", *names], cwd=root.parent, capture_output=True, text=True, check=True
        ).stdout.split()
        assert sorted(listed) == sorted(names)


def test_the_wheel_holds_the_beds(tmp_path):
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
    (wheel,) = builder(str(Path(vdr_cli.__file__).parents[1])).build(directory=str(tmp_path), versions=["standard"])
    packed = set(zipfile.ZipFile(wheel).namelist())
    for name in BEDS:
        assert {f"vdr_cli/beds/shipped/{name}/{file}" for file in ("recipe.yaml", "model/model.safetensors")} <= packed


@pytest.mark.parametrize("name", ONE_TURN)
def test_the_name_finds_data_reward_model_and_classes(name):
    assert resolve_model_path(name) == str(BEDS[name].model_path)
    table = open_table(DataConfig(name=name), "eval")
    (reward,) = load_rewards(RewardsConfig(), name)
    assert reward.name == BEDS[name].reward
    row = table.rows[0]
    columns = {column: [row[column]] * 2 for column in row if column != "prompt"}
    answer = BEDS[name].answers(row)[0]
    assert reward.function(completions=[answer, "?"], **columns) == [1.0, 0.0]
    assert reward.solution_class(completions=[answer, "?"], **columns)[1] is None
    known = set(reward.solution_class(completions=list(BEDS[name].answers(row)), **columns))
    assert reward.known_classes(**columns) == [len(known)] * 2
